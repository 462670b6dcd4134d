"""A place at which the parser could not go on: the tokens round it, the open brackets, what else could stand.

Says what is there; what it means to the user is `explain`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from lark import Token

STATEMENTS = frozenset({"MODEL", "DATA", "METRIC", "LET", "SAE", "EXPERIMENT"})
CLAUSES = frozenset(
    {"FOR", "RUN", "PATCH", "ATTRIBUTE", "FREEZE", "MEASURE", "KEEP", "PRUNE", "EXPECT", "SHOW", "SAVE"}
)
TARGETS = frozenset({"NODE", "EDGE", "PATH", "ALL"})
CONNECTIVES = frozenset("WITH AS FROM TO IN BY PER AT EXCEPT TOP FIRST LAST INTERVAL WITHIN INCLUDES".split())
RESERVED = STATEMENTS | CLAUSES | TARGETS | CONNECTIVES
"""Every reserved word's terminal: the word in capitals."""

NAME_ONLY = frozenset({"NAME"})
CLOSERS = {"(": ")", "[": "]", "{": "}"}


def is_stray(tokens: list[Token], index: int) -> bool:
    """Whether a statement's word stands among clauses: more clauses of the same experiment follow it."""
    if tokens[index].type not in STATEMENTS - {"EXPERIMENT"}:
        return False
    following = (t.type for t in tokens[index + 1 :] if t.type in STATEMENTS | CLAUSES)
    return next(following, None) in CLAUSES


@dataclass(frozen=True)
class Situation:
    """`tokens[index]` could not follow: only the terminals in `accepts` could.

    Its statement or clause begins at `tokens[first]`."""

    tokens: list[Token]
    index: int
    first: int
    accepts: frozenset[str]

    @property
    def token(self) -> Token:
        return self.tokens[self.index]

    @property
    def kind(self) -> str:
        return self.token.type

    @property
    def previous(self) -> Token | None:
        return self.tokens[self.index - 1] if self.index else None

    @property
    def previous_kind(self) -> str:
        return self.tokens[self.index - 1].type if self.index else ""

    @property
    def next_kind(self) -> str:
        return self.tokens[self.index + 1].type if self.index + 1 < len(self.tokens) else ""

    @property
    def start(self) -> int:
        return self.tokens[self.first].start_pos or 0

    @property
    def end(self) -> int:
        return self.token.end_pos or 0

    @property
    def starts_line(self) -> bool:
        return self.previous is None or self.previous.line != self.token.line

    @property
    def shown(self) -> str:
        return "the end of the file" if self.kind == "$END" else f"`{self.token}`"

    @cached_property
    def open(self) -> list[int]:
        """The brackets that are open before the token, by number: the block's, then those of the clause."""
        found: list[int] = []
        for i, token in enumerate(self.tokens[: self.index]):
            if token.type in STATEMENTS:
                found = []
            elif token.type in CLAUSES:
                found = found[:1]
            elif token in CLOSERS and token.type != "STRING":
                found.append(i)
            elif token in CLOSERS.values() and found:
                found.pop()
        return found

    @property
    def opener(self) -> Token | None:
        return self.tokens[self.open[-1]] if self.open else None

    @property
    def statement(self) -> Token | None:
        """The word of the statement that the token stands in or after."""
        return next((t for t in reversed(self.tokens[: self.index]) if t.type in STATEMENTS), None)

    @property
    def in_block(self) -> bool:
        """Whether the innermost open bracket is the `{` of an `experiment` or of `data`."""
        statement = self.statement
        return len(self.open) == 1 and statement is not None and statement.type in ("EXPERIMENT", "DATA")

    @property
    def is_stray(self) -> bool:
        return is_stray(self.tokens, self.index)

    @cached_property
    def chain(self) -> list[int]:
        """The tokens before, back to a reserved word, `=`, `,` or an open bracket; inner brackets skipped."""
        found: list[int] = []
        depth = 0
        for i in range(self.index - 1, -1, -1):
            token = self.tokens[i]
            if token.type != "STRING" and token in CLOSERS.values():
                depth += 1
            elif token.type != "STRING" and token in CLOSERS:
                if depth == 0:
                    break
                depth -= 1
            elif depth == 0 and (token.type in RESERVED - {"IN"} or token.type in ("EQUAL", "COMMA")):
                break
            if depth == 0:
                found.append(i)
        return found[::-1]

    def chain_has(self, *words: str) -> str | None:
        """The last of these words in the chain."""
        return next((str(self.tokens[i]) for i in reversed(self.chain) if self.tokens[i] in words), None)


@dataclass(frozen=True)
class Mistake:
    """What is wrong, and the token that it is about (the one that could not follow, unless told)."""

    message: str
    fix: str | None = None
    about: Token | None = None
