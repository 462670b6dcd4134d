"""Diagnostics as text for a person, with the source line and carets, and as data for a program.

Says nothing of its own: words, fixes and places all come from the diagnostics.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from patchc.diagnostics import Diagnostic, Note, Severity, Span

TAB = 4
"""Columns that a tab is shown as, wherever it stands."""
WIDEST = 160
"""Columns of a source line that are shown; of a longer one, those round the place."""

_RESET = "\x1b[0m"
_BOLD, _PLACE, _HELP = "\x1b[1m", "\x1b[1;34m", "\x1b[1;32m"
_COLORS = {Severity.ERROR: "\x1b[1;31m", Severity.WARNING: "\x1b[1;33m", Severity.NOTE: "\x1b[1;36m"}


def render(diagnostics: Iterable[Diagnostic], *, color: bool) -> str:
    """The diagnostics one after another, a blank line between; "" where there are none."""
    return "\n".join("\n".join(_drawn(d, _Paint(color))) + "\n" for d in diagnostics)


def counted(diagnostics: Iterable[Diagnostic]) -> str:
    """`3 errors, 1 warning`; `no errors` where there are none."""
    found = [d.severity for d in diagnostics]
    told = [(found.count(s), s.value) for s in Severity if s in found or s is Severity.ERROR]
    return ", ".join(f"{n or 'no'} {word}{'' if n == 1 else 's'}" for n, word in told)


def to_json(diagnostics: Iterable[Diagnostic]) -> list[dict[str, Any]]:
    """A dict each. Lines and columns count code points from 1; the end is after the last character."""
    return [
        {
            "code": d.code,
            "severity": d.severity.value,
            "message": d.message,
            **_place(d.span),
            "notes": [{"message": n.message, **_place(n.span)} for n in d.notes],
            "fix": d.fix,
        }
        for d in diagnostics
    ]


def _place(span: Span | None) -> dict[str, str | int | None]:
    if span is None:
        return dict.fromkeys(("file", "line", "column", "end_line", "end_column"))
    line, column = span.source.position(span.start)
    end_line, end_column = span.source.position(max(span.start, span.end))
    return {
        "file": span.source.name,
        "line": line,
        "column": column,
        "end_line": end_line,
        "end_column": end_column,
    }


class _Paint:
    """Colours, or none."""

    def __init__(self, color: bool) -> None:
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"{style}{text}{_RESET}" if self.color else text


def _drawn(d: Diagnostic, paint: _Paint) -> Iterator[str]:
    style = _COLORS[d.severity]
    yield paint(style, f"{d.severity.value}[{d.code}]") + paint(_BOLD, f": {_safe(d.message)}")
    margin = " " * max((len(str(_line(s))) for s in (d.span, *(n.span for n in d.notes)) if s), default=1)
    if d.span is not None:
        yield from _excerpt(d.span, margin, style, paint)
    for note in d.notes:
        yield from _noted(note, margin, paint)
    if d.fix is not None:
        yield f"{margin} {paint(_PLACE, '=')} {paint(_HELP, 'help')}: {_safe(d.fix)}"


def _noted(note: Note, margin: str, paint: _Paint) -> Iterator[str]:
    style = _COLORS[Severity.NOTE]
    yield f"{margin} {paint(_PLACE, '=')} {paint(style, 'note')}: {_safe(note.message)}"
    if note.span is not None:
        yield from _excerpt(note.span, margin, style, paint)


def _line(span: Span) -> int:
    return span.source.position(span.start)[0]


def _excerpt(span: Span, margin: str, style: str, paint: _Paint) -> Iterator[str]:
    """`--> file:line:column`, the line, and carets under what of the span stands on it."""
    number, column = span.source.position(span.start)
    text, column = _clipped(span.source.line(number), column)
    before, marked = text[: column - 1], text[column - 1 : column - 1 + span.end - span.start]
    shown, skipped = _window(_cells(text), _width(before))
    indent = " " * (_width(before) - skipped)
    carets = "^" * max(1, min(_width(marked), WIDEST - len(indent)))
    bar = paint(_PLACE, "|")
    yield f"{margin}{paint(_PLACE, '-->')} {_safe(span.source.name)}:{number}:{span.source.position(span.start)[1]}"
    yield f"{margin} {bar}"
    yield f"{paint(_PLACE, str(number).rjust(len(margin)))} {bar} {shown}".rstrip()
    yield f"{margin} {bar} {indent}{paint(style, carets)}"


def _clipped(line: str, column: int) -> tuple[str, int]:
    """The part of a very long line round a column, and the column in it: a data file may be one line."""
    skipped = max(0, column - 4 * WIDEST)
    return line[skipped : column + 4 * WIDEST], column - skipped


def _window(cells: list[str], start: int) -> tuple[str, int]:
    """The columns that are shown when what matters starts at column `start`, and how many are left out."""
    skipped = 0 if len(cells) <= WIDEST else max(0, min(start - WIDEST // 3, len(cells) - WIDEST))
    return "".join(cells[skipped : skipped + WIDEST]), skipped


def _cells(text: str) -> list[str]:
    """What each column of a terminal shows; a wide character takes two, an accent shares its letter's."""
    cells: list[str] = []
    for char in text:
        width = _char_width(char)
        if width == 0 and cells:
            cells[-1] += char
        else:
            cells += {"\t": [" "] * TAB}.get(char, [_safe(char), ""][: width or 1])
    return cells


def _width(text: str) -> int:
    return len(_cells(text))


def _char_width(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _safe(text: str) -> str:
    """The text without characters that would steer a terminal."""
    return "".join(c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cs") else "\ufffd" for c in text)
