"""Prompts from files: JSON lines, JSON (a list of prompts, or AutoCircuit's format), csv and parquet.

The suffix decides what a file is. Nothing but data is read: no pickle, no code. What a cell has to be depends on its
use, which `data` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

from patchc.diagnostics import RULES, Diagnostic, PatchcError, Report, Source, Span
from patchc.resolve.files import FILE_TOO_LARGE, read_text
from patchc.resolve.json_text import BAD_JSON, Item, JsonText
from patchc.resolve.tables import csv_rows, parquet_rows

UNKNOWN_DATA_FORMAT = RULES.add("unknown-data-format", "a data file whose suffix names no format that is read")
BAD_PROMPT_FILE = RULES.add("bad-prompt-file", "a JSON file that holds no prompts in a form that is understood")

MAX_LINE = 2**20
"""The longest line that is read as one prompt, in characters."""
MAX_PROMPTS = 1_000_000
MAX_DIAGNOSED_LINES = 5


Locate = Callable[[str], Span | None] | None
"""Where a prompt's cell of a column stands in its file, for formats that can say it."""


@dataclass(frozen=True, slots=True)
class Counted:
    """A position that a file counts without the special tokens that a tokenizer puts in front."""

    index: int


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt of a file: its cells by column, where it stands, and where each cell does (`locate`).

    `texts`: the format has no types, so that a whole number stands there as text.
    """

    cells: Mapping[str, Any]
    where: Span | None
    locate: Locate = None
    texts: bool = False


def read_rows(path: Path, name: str, span: Span | None) -> list[Row]:
    """The prompts of a file that the spec calls `name` at `span`. Raises `PatchcError` with what is wrong with it."""
    suffix = PurePath(name).suffix.lower()
    if suffix not in READERS:
        message = f"{name} names no format that is read; the suffixes are {' '.join(READERS)}"
        raise UNKNOWN_DATA_FORMAT.error(message, span=span)
    rows = READERS[suffix](path, name, span)
    if len(rows) > MAX_PROMPTS:
        message = f"{name} has {len(rows):,} prompts; at most {MAX_PROMPTS:,} are read"
        raise FILE_TOO_LARGE.error(message, span=span)
    return rows


# ---- JSON lines


def _json_lines(path: Path, name: str, span: Span | None) -> list[Row]:
    text = JsonText(Source(name, read_text(path, name, span)))
    report, rows, start = Report(), list[Row](), 0
    for line in text.source.text.split("\n"):
        here = Span(text.source, start, start + len(line.rstrip("\r")))
        start += len(line) + 1
        if line.strip():
            try:
                rows.append(_line(text, here))
            except PatchcError as error:
                for diagnostic in error.diagnostics:
                    report.add(diagnostic)
    if report.has_errors:
        raise PatchcError(_shortened(report.diagnostics, name))
    return rows


def _line(text: JsonText, here: Span) -> Row:
    if here.end - here.start > MAX_LINE:
        message = f"this line has {here.end - here.start:,} characters; at most {MAX_LINE:,} are read as one prompt"
        raise FILE_TOO_LARGE.error(message, span=Span(here.source, here.start, here.start + 1))
    start = text.skip(here.start)
    found, end = text.value(start, here.end)
    if text.skip(end) < here.end:
        raise text.fault("something stands after the prompt; each prompt has a line of its own", text.skip(end))
    return _row(text, found, start, here.end)


def _row(text: JsonText, found: Any, start: int, end: int) -> Row:
    where = Span(text.source, start, end)
    if not isinstance(found, dict):
        raise BAD_JSON.error("a prompt is a JSON object, with columns as its keys", span=where)
    return Row(_present(found), where, partial(_locate, text.source, cache(partial(text.members, start))))


def _present(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null: the prompt lacks that column."""
    return {name: cell for name, cell in cells.items() if cell is not None}


def _locate(source: Source, members: Callable[[], Mapping[str, Item]], column: str) -> Span | None:
    """Where a prompt's value for a column stands."""
    found = members().get(column)
    return Span(source, found[1], found[2]) if found else None


def _shortened(diagnostics: list[Diagnostic], name: str) -> list[Diagnostic]:
    rest = len(diagnostics) - MAX_DIAGNOSED_LINES
    if rest <= 0:
        return diagnostics
    return [
        *diagnostics[:MAX_DIAGNOSED_LINES],
        BAD_JSON.at(None, f"{rest} more lines of {name} are not JSON objects"),
    ]


# ---- JSON: a list of prompts, or AutoCircuit's format


def _json(path: Path, name: str, span: Span | None) -> list[Row]:
    text = JsonText(Source(name, read_text(path, name, span)))
    start = text.skip(0)
    found, end = text.value(start)
    if text.skip(end) < len(text.source.text):
        raise text.fault("something stands after the end (a prompt a line is called .jsonl)", text.skip(end))
    match found:
        case list():
            return [_row(text, *item) for item in text.items(start)]
        case {"prompts": list()}:
            return _autocircuit(text, start, found)
        case _:
            has = f"an object with {', '.join(map(repr, found)) or 'no keys'}" if isinstance(found, dict) else "neither"
            message = (
                f'{name} is to be a list of prompts, or {{"prompts": [...]}} as AutoCircuit writes it; it is {has}'
            )
            raise BAD_PROMPT_FILE.error(message, span=span)


_RENAMED = {"answers": "answer", "wrong_answers": "wrong"}


def _autocircuit(text: JsonText, start: int, found: Mapping[str, Any]) -> list[Row]:
    """AutoCircuit's prompts; its `word_idxs`, which count without a BOS token, are named positions.

    Its `answers` and `wrong_answers` are the columns `answer` and `wrong`.
    """
    members = text.members(start)
    words = found.get("word_idxs") or {}
    if not isinstance(words, dict) or not all(_is_index(i) for i in words.values()):
        raise BAD_PROMPT_FILE.error(
            "`word_idxs` gives each name a position", span=Span(text.source, *members["word_idxs"][1:])
        )
    named = {name: Counted(i) for name, i in words.items()}
    return [_renamed(_row(text, *item), named) for item in text.items(members["prompts"][1])]


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _renamed(row: Row, named: Mapping[str, Counted]) -> Row:
    names = {old: new for old, new in _RENAMED.items() if old in row.cells and new not in row.cells}
    cells = {names.get(old, old): cell for old, cell in row.cells.items()}
    written = {new: old for old, new in names.items()}
    return replace(row, cells={**named, **cells}, locate=partial(_located, row.locate, written))


def _located(locate: Locate, written: Mapping[str, str], column: str) -> Span | None:
    return locate(written.get(column, column)) if locate else None


# ---- tables


def _csv(path: Path, name: str, span: Span | None) -> list[Row]:
    return [Row(cells, where, texts=True) for cells, where in csv_rows(Source(name, read_text(path, name, span)), span)]


def _parquet(path: Path, name: str, span: Span | None) -> list[Row]:
    return [Row(_present(cells), span) for cells in parquet_rows(path, name, span)]


READERS: dict[str, Callable[[Path, str, Span | None], list[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
"""How each format is read, by its suffix."""
