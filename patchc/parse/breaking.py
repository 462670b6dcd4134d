"""One line of words to one row of text, or to several where it is too long or a comment stands inside it.

A line is cut at its loosest separators first: after `=`, before `with`, after the commas of a list (as many items a
row as go), before operators; brackets open where nothing else helps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from patchc.parse.words import Line, Word

WIDTH = 100
INDENT = 2
CONTINUED = 4
"""How much further in than its start a broken line goes on."""

_HEADS = {"column": 1, "position": 2, "metric": 2}
"""The rules whose lines stand in two columns, and how many words are in the first."""

_BRACKETS = {"LPAR": "RPAR", "LSQB": "RSQB", "LBRACE": "RBRACE"}


@dataclass
class Row:
    """A row of the text: blank, a comment, or code with the comment behind it. `split`: where the code's second column
    starts, 0 where it has one."""

    indent: int = 0
    code: str = ""
    comment: str = ""
    split: int = 0
    level: int = 0
    opens: bool = False

    @property
    def is_blank(self) -> bool:
        return not self.code and not self.comment

    @property
    def is_comment(self) -> bool:
        return not self.code and bool(self.comment)


def rows_of(line: Line) -> list[Row]:
    """The rows of a line."""
    writer = _Writer(line)
    _write(_nested(line.words), writer, line.level * INDENT + CONTINUED)
    writer.rows[-1].opens = line.opens
    return writer.rows


# ---- words in brackets


@dataclass(frozen=True, slots=True)
class _Group:
    """What stands between two brackets, and the brackets; `words` are all of them."""

    open: Word
    inner: list[_Part]
    close: Word
    words: tuple[Word, ...]


_Part = Word | _Group


def _nested(words: Iterable[Word]) -> list[_Part]:
    """Words with the brackets round them made groups; those of a block have no other on their line."""
    levels: list[list[_Part]] = [[]]
    opened: list[Word] = []
    for word in words:
        if opened and word.kind == _BRACKETS[opened[-1].kind]:
            first, inner = opened.pop(), levels.pop()
            levels[-1].append(_Group(first, inner, word, (first, *_flat(inner), word)))
        elif word.kind in _BRACKETS and not word.is_block:
            opened.append(word)
            levels.append([])
        else:
            levels[-1].append(word)
    return levels[0]


def _flat(parts: Iterable[_Part]) -> list[Word]:
    return [word for part in parts for word in (part.words if isinstance(part, _Group) else (part,))]


def _is_broken(words: Sequence[Word]) -> bool:
    """Whether a comment stands inside: one behind the last word breaks nothing."""
    return any(word.comments for word in words[:-1])


# ---- where to cut


@dataclass(frozen=True, slots=True)
class _Cut:
    """A kind of place at which a line is cut: at each word that `matches`, before it or after it. `filled`: as many
    pieces a row as go; `deeper`: what is cut further goes on further in."""

    matches: Callable[[Word], bool]
    after: bool = False
    filled: bool = False
    deeper: bool = True


_ASSIGNED = _Cut(lambda word: word.kind == "EQUAL" and word.rule in ("let", "metric"), after=True, deeper=False)
_CUTS = (
    _ASSIGNED,
    _Cut(lambda word: word.kind == "WITH" and word.rule in ("patch", "attribute"), deeper=False),
    _Cut(lambda word: word.kind == "COMMA", after=True, filled=True),
    _Cut(lambda word: word.kind in ("FROM", "WITH")),
    _Cut(lambda word: word.rule in ("sequence", "union", "difference", "sum")),
    _Cut(lambda word: word.rule == "product"),
)


def _pieces(parts: Sequence[_Part], indent: int) -> tuple[_Cut | None, list[list[_Part]]]:
    """Where to cut, and what is then between the cuts; the pieces' rows start at `indent`."""
    for cut in _CUTS:
        at = [i + cut.after for i, part in enumerate(parts) if isinstance(part, Word) and cut.matches(part)]
        at = [i for i in at if 0 < i < len(parts)]
        pieces = [[*parts[a:b]] for a, b in zip([0, *at], [*at, len(parts)], strict=True)]
        if at and not (cut is _ASSIGNED and _is_in_vain(pieces, indent)):
            return cut, pieces
    return None, []


def _is_in_vain(pieces: Sequence[Sequence[_Part]], indent: int) -> bool:
    """Whether what is assigned has to be broken on a row of its own too, and inside brackets: then `= f(` is one
    row."""
    first, rest = pieces
    return (
        not _is_broken(_flat([*first, *rest[:1]]))
        and indent + _width(_flat(rest)) - 1 > WIDTH
        and _pieces(rest, indent)[0] is None
    )


def _can_open(group: _Group) -> bool:
    return any(cut.matches(word) for word in group.words for cut in _CUTS)


# ---- writing


class _Writer:
    """The rows of one line as they grow. Comments alone on a row wait until it is known where the next row starts."""

    def __init__(self, line: Line):
        self.level = line.level
        self.rows = [Row(line.level * INDENT, level=line.level)]
        self.waiting: list[str] = []
        self._head, self._count = _HEADS.get(line.rule), 0

    @property
    def must_break(self) -> bool:
        """Whether a comment has ended the row."""
        return bool(self.waiting or self.rows[-1].comment)

    def fits(self, words: Sequence[Word], indent: int) -> bool:
        """Whether words go on this row, or on one at `indent` where a comment has ended this one."""
        row = Row(indent) if self.must_break else self.rows[-1]
        return row.indent + len(row.code) + _width(words) - (words[0].spaced and not row.code) <= WIDTH

    def start_row(self, indent: int) -> None:
        for text in self.waiting:
            self.rows.append(Row(indent, comment=text, level=self.level))
        self.waiting = []
        if self.rows[-1].is_blank:
            self.rows[-1].indent = indent
        else:
            self.rows.append(Row(indent, level=self.level))

    def put(self, word: Word, indent: int) -> None:
        """Write a word and the comments that follow it, at `indent` where a comment has ended the row."""
        if self.must_break:
            self.start_row(indent)
        row = self.rows[-1]
        if self._count == self._head and len(self.rows) == 1:
            row.split = len(row.code)
        self._count += 1
        row.code += (" " if word.spaced and row.code else "") + word.text
        behind = [comment.text for comment in word.comments if not comment.alone]
        row.comment = behind[0] if behind else ""
        self.waiting = [comment.text for comment in word.comments if comment.alone]


def _width(words: Iterable[Word]) -> int:
    return sum(len(word.text) + word.spaced for word in words)


def _write(parts: Sequence[_Part], writer: _Writer, indent: int) -> None:
    """Write parts, on from where the writer is; further rows start at `indent`."""
    words = _flat(parts)
    if not words:
        return
    if not _is_broken(words) and writer.fits(words, indent):
        for word in words:
            writer.put(word, indent)
        return
    cut, pieces = _pieces(parts, indent)
    if cut is None:
        _write_opened(parts, writer, indent)
    for i, piece in enumerate(pieces):
        if i and not (cut and cut.filled and _goes_on(piece, writer, indent)):
            writer.start_row(indent)
        _write(piece, writer, indent + CONTINUED if cut and cut.deeper else indent)


def _goes_on(piece: list[_Part], writer: _Writer, indent: int) -> bool:
    words = _flat(piece)
    return not writer.must_break and not _is_broken(words) and writer.fits(words, indent)


def _write_opened(parts: Sequence[_Part], writer: _Writer, indent: int) -> None:
    """Write parts without a cut: the brackets with comments inside, or else the widest, on rows of their own."""
    widest = _widest(parts)
    for i, part in enumerate(parts):
        words = _flat([part])
        if isinstance(part, _Group) and (
            _is_broken(words) or (part is widest and not writer.fits(_flat(parts[i:]), indent))
        ):
            _write_group(part, writer, indent)
        else:
            for word in words:
                writer.put(word, indent)


def _widest(parts: Sequence[_Part]) -> _Group | None:
    groups = [part for part in parts if isinstance(part, _Group) and _can_open(part)]
    if any(_is_broken(group.words) for group in groups):
        return None
    return max(groups, key=lambda group: _width(group.words), default=None)


def _write_group(group: _Group, writer: _Writer, indent: int) -> None:
    writer.put(group.open, indent)
    outer = writer.rows[-1].indent
    writer.start_row(outer + CONTINUED)
    _write(group.inner, writer, outer + CONTINUED)
    if writer.waiting:
        writer.start_row(outer + CONTINUED)
    writer.start_row(outer)
    writer.put(group.close, indent)
