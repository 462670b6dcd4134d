"""Every syntax error of a text in which lark has found one: goes on at the next statement or clause.

Characters that no token has are reported and read as what was probably meant. `explain` has the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from lark import Lark, Token
from lark.exceptions import UnexpectedCharacters, UnexpectedToken
from lark.parsers.lalr_interactive_parser import InteractiveParser

from patchc.diagnostics import Diagnostic, Source
from patchc.parse.characters import explain_character, slashed_comments
from patchc.parse.explain import explain
from patchc.parse.situation import CLAUSES, NAME_ONLY, STATEMENTS, Situation, is_stray

MAX_ERRORS = 20
"""More would not be read; and each costs a look at every terminal."""


def syntax_errors(source: Source, lark: Lark) -> list[Diagnostic]:
    """The syntax errors of a text, at most `MAX_ERRORS`, in the order of their places."""
    tokens, found = _tokens(source, lark)
    bad = [d.span.start for d in found if d.span is not None]
    for situation in _Walk(lark, tokens).situations():
        if len(found) >= MAX_ERRORS:
            break
        # An unreadable character is the likelier cause of what follows it in the same clause.
        if not any(situation.start <= offset < situation.end for offset in bad):
            found.append(explain(situation, source))
    return sorted(found, key=lambda d: d.span.start if d.span else 0)


def _tokens(source: Source, lark: Lark) -> tuple[list[Token], list[Diagnostic]]:
    """All tokens, `$END` last, and a diagnostic for each run of characters that is no token."""
    text, found = slashed_comments(source, MAX_ERRORS)
    while True:
        try:
            tokens = list(_lexed(text, lark))
        except UnexpectedCharacters as error:
            diagnostic, text = explain_character(source, text, error.pos_in_stream or 0)
            found.append(diagnostic)
            if len(found) == MAX_ERRORS:
                text = text[: error.pos_in_stream] + " " * (len(text) - (error.pos_in_stream or 0))
        else:
            end = len(text)
            return [*tokens, Token("$END", "", end, text.count("\n") + 1, 0, None, None, end)], found


def _lexed(text: str, lark: Lark) -> Iterator[Token]:
    """The tokens by the parser's own lexer, which needs no parser state; `Lark.lex` would build another."""
    state = lark.parse_interactive(text)
    return state.lexer_thread.lex(state.parser_state)


@dataclass
class _Walk:
    """Feeds the tokens to the parser; after an error starts afresh at the next statement or clause."""

    lark: Lark
    tokens: list[Token]
    index: int = 0
    start: int = 0
    """The first token of the statement or clause being read."""
    braces: list[int] = field(default_factory=list[int])
    """The `{` that are open, by their tokens' numbers; the first is the block of a statement."""

    def situations(self) -> Iterator[Situation]:
        """Where the parser could not go on, and why."""
        state = self.lark.parse_interactive("")
        while self.index < len(self.tokens):
            token, before = self.tokens[self.index], state.copy(deepcopy_values=False)
            try:
                state.feed_token(token)
            except UnexpectedToken:
                accepts = frozenset(before.accepts())
                yield Situation(self.tokens, self.index, self.start, accepts)
                state = self._restart(skip=accepts == NAME_ONLY and not self._starts_line(self.index))
            else:
                self._note(token)
                self.index += 1

    def _note(self, token: Token) -> None:
        """Keep count of where we are, after a token that was in its place."""
        if token.type in STATEMENTS | CLAUSES:
            self.start = self.index
        elif token.type == "LBRACE":
            self.braces.append(self.index)
        elif token.type == "RBRACE" and self.braces:
            self.braces.pop()

    @property
    def _in_experiment(self) -> bool:
        if not self.braces:
            return False
        block = self.braces[0]
        return any(t.type == "EXPERIMENT" for t in self.tokens[max(0, block - 3) : block])

    def _starts_line(self, index: int) -> bool:
        return index == 0 or self.tokens[index].line != self.tokens[index - 1].line

    def _restart(self, skip: bool) -> InteractiveParser:
        """A parser that stands before the next clause or statement, and `index` at its first token."""
        inside = self._in_experiment
        depth = len(self.braces) - inside
        if skip:
            self.index += 1
        while self.index < len(self.tokens):
            kind = self.tokens[self.index].type
            if kind in STATEMENTS and not (inside and is_stray(self.tokens, self.index)):
                return self._fresh()
            if inside and kind in CLAUSES:
                return self._fresh_clause()
            depth += (kind == "LBRACE") - (kind == "RBRACE")
            self.index += 1
            if inside and depth < 0:
                return self._fresh()
        return self._fresh()

    def _fresh(self) -> InteractiveParser:
        self.start, self.braces = self.index, []
        return self.lark.parse_interactive("")

    def _fresh_clause(self) -> InteractiveParser:
        self.start, self.braces = self.index, self.braces[:1]
        state = self.lark.parse_interactive("")
        for kind, text in (("EXPERIMENT", "experiment"), ("NAME", "_"), ("LBRACE", "{")):
            state.feed_token(Token(kind, text))
        return state
