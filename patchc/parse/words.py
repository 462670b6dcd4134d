"""A spec's text as words in lines: what stands on one line where nothing is too long, with the comments.

Words are kept as written. How long lines break and what is aligned is `layout`'s matter. Nothing here knows a
statement: whatever the grammar gains is words with a space between them, where no rule below says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from lark import Token, Tree

from patchc.parse.parser import concrete_parser

_START = -1
"""Where the word before the first word starts."""

_IN_GAP = re.compile(r"#[^\n]*|\n")

_BLOCKS = frozenset({"fields", "experiment"})
"""The rules whose braces hold lines; other braces stand in a line."""

_TIGHT_BEFORE = frozenset({"COMMA", "RPAR", "RSQB", "LSQB", "DOT"})
_TIGHT_AFTER = frozenset({"LPAR", "LSQB", "DOT"})


@dataclass(frozen=True, slots=True)
class Comment:
    """`# ...`, without white space at its end. `alone`: no word stands before it on its line."""

    text: str
    alone: bool
    after_blank: bool


@dataclass(frozen=True, slots=True)
class Word:
    """A token as written. `rule` is the grammar's that it stands in; `leads`, whether it is the first thing there.
    `comments` follow it."""

    kind: str
    text: str
    rule: str
    leads: bool
    spaced: bool = True
    after_blank: bool = False
    comments: tuple[Comment, ...] = ()

    @property
    def is_sign(self) -> bool:
        """Whether it is the minus before one operand."""
        return self.kind == "MINUS" and self.leads and self.rule != "offset"

    @property
    def is_block(self) -> bool:
        """Whether it is one of a block's two braces."""
        return self.rule in _BLOCKS and self.kind in ("LBRACE", "RBRACE")


@dataclass(frozen=True, slots=True)
class Line:
    """A statement, a clause or field, or a block's first or last line. `level` is 1 inside a block. `comments` follow
    its last word."""

    words: tuple[Word, ...]
    rule: str
    level: int = 0
    comments: tuple[Comment, ...] = ()

    @property
    def opens(self) -> bool:
        """Whether it is a block's first line."""
        return self.words[-1].is_block and not self.closes

    @property
    def closes(self) -> bool:
        """Whether it is a block's last line."""
        return self.words[0].kind == "RBRACE"


def lines_of(text: str) -> tuple[tuple[Comment, ...], list[Line]]:
    """The comments before the first word of a text that parses, and its lines."""
    spec = concrete_parser().parse(text)
    placed = _Placed(text, spec)
    statements = [child for child in spec.children if isinstance(child, Tree)]
    return tuple(placed.after[_START]), [line for item in statements for line in _statement(item, placed)]


class _Placed:
    """What stands after each word, by where the word starts: comments, and whether a blank line is before the next."""

    def __init__(self, text: str, spec: Tree[Token]):
        self.after: dict[int, list[Comment]] = {}
        self.blank: dict[int, bool] = {}
        start, end = _START, 0
        for token in spec.scan_values(lambda _: True):
            following = token.start_pos or 0
            self._gap(text, start, end, following)
            start, end = following, token.end_pos or 0
        self._gap(text, start, end, len(text))

    def _gap(self, text: str, word: int, start: int, end: int) -> None:
        """Between the word at `word` and the next is nothing but white space and comments."""
        found, breaks = list[Comment](), 0
        for match in _IN_GAP.finditer(text, start, end):
            if match[0] == "\n":
                breaks += 1
            else:
                found.append(Comment(match[0].rstrip(), breaks > 0, breaks > 1))
                breaks = 0
        self.after[word], self.blank[end] = found, breaks > 1

    def word(self, token: Token, rule: str, leads: bool) -> Word:
        start = token.start_pos or 0
        after_blank, comments = self.blank[start], tuple(self.after[start])
        return Word(token.type, str(token), rule, leads, after_blank=after_blank, comments=comments)


# ---- lines


def _statement(statement: Tree[Token], placed: _Placed) -> Iterator[Line]:
    """A statement's lines: one, or those of its block."""
    words: list[Word] = []
    inside = False
    for rule, leads, part in _parts(statement):
        brace = rule in _BLOCKS and isinstance(part, Token) and part.type in ("LBRACE", "RBRACE")
        if inside and not brace:
            yield _line(_words(rule, leads, part, placed), str(part.data), 1)  # type: ignore[union-attr]
            continue
        words += _words(rule, leads, part, placed)
        if brace and not inside:
            yield _line(words, str(statement.data))
            words = []
        inside = inside != brace
    yield _line(words, str(statement.data))


_Part = tuple[str, bool, Token | Tree[Token]]
"""A rule, whether this comes first in it, and what comes."""


def _parts(tree: Tree[Token]) -> Iterator[_Part]:
    """What a statement is made of; the braces of a block, and what is between them, as parts of the statement."""
    for index, child in enumerate(tree.children):
        if isinstance(child, Tree) and child.data in _BLOCKS:
            yield from _parts(child)
        else:
            yield str(tree.data), index == 0, child


def _words(rule: str, leads: bool, part: Token | Tree[Token], placed: _Placed) -> list[Word]:
    if isinstance(part, Token):
        return [placed.word(part, rule, leads)]
    inner = str(part.data)
    return [word for index, child in enumerate(part.children) for word in _words(inner, index == 0, child, placed)]


def _line(words: list[Word], rule: str, level: int = 0) -> Line:
    words = _without_last_commas(words)
    spaced = [
        replace(word, spaced=before is not None and not _is_tight(before, word))
        for before, word in zip([None, *words], words, strict=False)
    ]
    last = replace(spaced[-1], comments=())
    return Line((*spaced[:-1], last), rule, level, words[-1].comments)


def _without_last_commas(words: list[Word]) -> list[Word]:
    """`{1, 4,}` is `{1, 4}`; what was said about the comma goes to the word before it."""
    out: list[Word] = []
    for word in words:
        if word.kind == "RBRACE" and out and out[-1].kind == "COMMA":
            comma = out.pop()
            out[-1] = replace(out[-1], comments=_joined(out[-1].comments, comma.comments))
        out.append(word)
    return out


def _joined(comments: tuple[Comment, ...], others: tuple[Comment, ...]) -> tuple[Comment, ...]:
    return comments + tuple(replace(c, alone=True) for c in others) if comments else others


def _is_tight(before: Word, word: Word) -> bool:
    """Whether no space stands between two words."""
    if word.kind in _TIGHT_BEFORE or before.kind in _TIGHT_AFTER:
        return True
    if before.is_sign:
        return True
    match word.kind, before.kind:
        case (_, "EQUAL") if before.rule in ("option", "named"):
            return True
        case ("LPAR", _):
            return word.rule not in ("group", "parens")
        case ("LBRACE", "DOT") | ("RBRACE", _) | (_, "LBRACE"):
            return True
        case ("DOTS", _):
            return word.rule not in ("to_range", "to_bound")
        case (_, "DOTS"):
            return before.rule not in ("from_range", "from_bound")
        case ("STAR", _):
            return word.rule == "star"
        case ("EQUAL", _):
            return word.rule in ("option", "named")
        case _:
            return False
