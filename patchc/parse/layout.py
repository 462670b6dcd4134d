"""Lines of words to text in one canonical layout: blocks indented by two, columns aligned, long lines broken at 100.

The layout follows from the words, the comments and the blank lines alone, never from where lines were broken before:
laying out what was laid out changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from patchc.parse.breaking import INDENT, Row, rows_of
from patchc.parse.words import Comment, Line

GAP = 2
"""Spaces before a comment, at least."""


def lay_out(leading: Sequence[Comment], lines: Sequence[Line]) -> str:
    """The text of a spec: `leading` comments, then its lines, each with the comments behind it and under it."""
    rows: list[Row] = []
    _put_comments(rows, leading, 0)
    for before, line, after in zip([None, *lines], lines, [*lines[1:], None], strict=False):
        _put_apart(rows, before, line)
        rows += rows_of(line)
        behind = [c for c in line.comments if not c.alone]
        rows[-1].comment = behind[0].text if behind else ""
        _put_comments(rows, line.comments[len(behind) :], _level_under(line, after))
    _align_columns(rows)
    _align_comments(rows)
    return "".join(f"{_text(row)}\n" for row in rows)


def _level_under(line: Line, after: Line | None) -> int:
    """How deep comments stand between a line and the next."""
    if after is None:
        return 0
    return 1 if after.closes or line.opens else after.level


# ---- blank lines and comments


def _put_comments(rows: list[Row], comments: Iterable[Comment], level: int) -> None:
    for comment in comments:
        if comment.after_blank:
            _put_blank(rows, len(rows))
        rows.append(Row(level * INDENT, comment=comment.text, level=level))


def _put_apart(rows: list[Row], before: Line | None, line: Line) -> None:
    """The blank line before a line, where the author left one; experiments stand apart, with the comments on them."""
    if line.words[0].after_blank and not line.closes:
        _put_blank(rows, len(rows))
    elif before is not None and (_starts_experiment(line) or _ends_experiment(before)):
        start = len(rows)
        while rows[start - 1].is_comment:
            start -= 1
        _put_blank(rows, start)


def _starts_experiment(line: Line) -> bool:
    return line.rule == "experiment" and line.opens


def _ends_experiment(line: Line) -> bool:
    return line.rule == "experiment" and line.closes


def _put_blank(rows: list[Row], index: int) -> None:
    """A blank line before row `index`, but none at the start of the text or of a block, and never two."""
    if index and not rows[index - 1].is_blank and not rows[index - 1].opens:
        rows.insert(index, Row())


# ---- columns


def _align_columns(rows: Sequence[Row]) -> None:
    """One column's width in each run of rows with two; a comment between them ends no run."""
    code = [row for row in rows if not row.is_comment]
    for aligned, run in groupby(code, lambda row: row.split > 0):
        if aligned:
            _pad([*run])


def _pad(run: Sequence[Row]) -> None:
    width = max(row.split for row in run)
    for row in run:
        row.code = row.code[: row.split].ljust(width) + row.code[row.split :]


def _align_comments(rows: Sequence[Row]) -> None:
    """One place for the comments of each run of rows that all have one behind their code."""
    for (commented, _), run in groupby(rows, lambda row: (bool(row.code and row.comment), row.level)):
        if commented:
            kept = [*run]
            width = max(row.indent + len(row.code) for row in kept)
            for row in kept:
                row.code = row.code.ljust(width + GAP - row.indent)


def _text(row: Row) -> str:
    return (" " * row.indent + row.code + row.comment).rstrip()
