"""The rows of a data set: from `data` blocks, from jsonl files, from Python. One record a prompt, nothing
tokenised.

A record's cells stay as they were given; what a cell has to be depends on its use, which `dataset` knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from patchc.diagnostics import RULES, Diagnostic, PatchcError, Report, Source, Span
from patchc.parse import tree
from patchc.resolve.scope import NAME_CLASH, WRONG_KIND, Scope, collecting
from patchc.spec import neighbour, not_text

MISSING_FILE = RULES.add("missing-file", "a file that the spec names is not there or cannot be read")
BAD_JSON = RULES.add("bad-json", "a line of a jsonl file is not a JSON object")
EMPTY_DATA = RULES.add("empty-data", "there is no prompt to run")
DATA_SLICE = RULES.add("data-slice", "a slice of a data file takes prompts that the file does not have")
BAD_DATA = RULES.add("bad-data", "data given in Python has a form that is not understood")

Given = Any
"""Data given in Python: a list of records (dicts of columns and named positions), a pandas DataFrame, or one
dict of columns, each with an entry a prompt (`{"clean": ids [prompt, pos], "answer": [id, ...]}`)."""

T = TypeVar("T")

MAX_DIAGNOSED_LINES = 5


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt: its columns and named positions by name, and the positions that its `data` statement
    declares."""

    cells: Mapping[str, Any]
    positions: Mapping[str, tree.Position] = field(default_factory=dict[str, tree.Position])
    where: Span | None = None
    spans: Mapping[str, Span | None] = field(default_factory=dict[str, Span | None])

    def span(self, name: str) -> Span | None:
        """Where a cell is written, or at least its record."""
        return self.spans.get(name) or self.where


def read_records(statements: Sequence[tree.Data], scope: Scope, base: Path, given: Given | None) -> list[Record]:
    """Every record of a spec, in order. Rows given in Python take the place of the spec's own columns and
    files; the positions that the spec declares hold for them too."""
    if given is not None:
        positions = {f.name.text: f for s in statements for f in s.fields if isinstance(f, tree.Position)}
        with collecting(scope.report):
            return _not_empty([Record(cells, positions) for cells in _rows(given)], None)
        return []
    records: list[Record] = []
    for statement in statements:
        with collecting(scope.report):
            records += _of_statement(statement, scope, base)
    return records


def _of_statement(statement: tree.Data, scope: Scope, base: Path) -> list[Record]:
    cells, spans = _columns(statement, scope)
    positions = {f.name.text: f for f in statement.fields if isinstance(f, tree.Position)}
    if statement.file is None:
        if not any(isinstance(f, tree.Column) for f in statement.fields):
            fix = 'as in `data { clean "..." corrupt "..." }`'
            raise EMPTY_DATA.error("this data block has no column, and names no file", fix=fix, span=statement.span)
        return [Record(cells, positions, statement.span, spans)]
    rows = _slice(_read_jsonl(statement.file, scope, base), statement, scope)
    return [Record({**row, **cells}, positions, where, spans) for row, where in rows]


def _columns(statement: tree.Data, scope: Scope) -> tuple[dict[str, Any], dict[str, Span | None]]:
    cells: dict[str, Any] = {}
    seen: set[str] = set()
    spans: dict[str, Span | None] = {}
    for item in statement.fields:
        name = item.name.text
        if name in seen:
            scope.report.add(NAME_CLASH.at(item.span, f"{name!r} stands twice in this data block"))
        seen.add(name)
        if isinstance(item, tree.Column):
            with collecting(scope.report):
                cells[name], spans[name] = _written(item.value, scope), item.value.span
    return cells, spans


def _written(value: tree.Text | tree.Parameter | tree.Braces, scope: Scope) -> str | tuple[str, ...]:
    if not isinstance(value, tree.Braces):
        return scope.text(value)
    texts: list[str] = []
    for item in value.items:
        if not isinstance(item, tree.Text | tree.Parameter):
            raise WRONG_KIND.error('a set of answers holds texts, such as {" went", " left"}', span=item.span)
        texts.append(scope.text(item))
    return tuple(texts)


# ---- jsonl

Row = tuple[dict[str, Any], Span | None]


def _read_jsonl(file: tree.Text | tree.Parameter, scope: Scope, base: Path) -> list[Row]:
    name = scope.text(file)
    text = read_text(base / name, name, file.span)
    source, report, rows = Source(name, text), Report(), list[Row]()
    start = 0
    for line in text.split("\n"):
        span = Span(source, start, start + len(line.rstrip("\r")))
        start += len(line) + 1
        if line.strip():
            with collecting(report):
                rows.append((_object(line, span), span))
    if report.has_errors:
        raise PatchcError(_shortened(report.diagnostics, name))
    return _not_empty(rows, file.span, f"{name} holds no prompt")


def read_text(path: Path, name: str, span: Span | None) -> str:
    """A file's text, or `missing-file` or `not-utf8` with the reason."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_text(name, error, span) from None
    except OSError as error:
        raise MISSING_FILE.error(f"{name} cannot be read: {error.strerror}", fix=neighbour(path), span=span) from None


def _object(line: str, span: Span) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise BAD_JSON.error(f"this line is not JSON: {error}", span=span) from None
    if not isinstance(found, dict):
        raise BAD_JSON.error("this line is JSON, but not an object with columns as its keys", span=span)
    return found


def _shortened(diagnostics: list[Diagnostic], name: str) -> list[Diagnostic]:
    rest = len(diagnostics) - MAX_DIAGNOSED_LINES
    if rest <= 0:
        return diagnostics
    return [
        *diagnostics[:MAX_DIAGNOSED_LINES],
        BAD_JSON.at(None, f"{rest} more lines of {name} are not JSON objects"),
    ]


def _not_empty(rows: list[T], span: Span | None, message: str = "the data given holds no prompt") -> list[T]:
    if not rows:
        raise EMPTY_DATA.error(message, span=span)
    return rows


# ---- slices


def _slice(rows: list[Row], statement: tree.Data, scope: Scope) -> list[Row]:
    if statement.slice is None or isinstance(statement.slice, tree.Every):
        return rows
    items = statement.slice.items if isinstance(statement.slice, tree.Braces) else (statement.slice,)
    return [rows[i] for item in items for i in _indices(item, len(rows), scope)]


def _indices(item: tree.Element, n: int, scope: Scope) -> list[int]:
    if not isinstance(item, tree.Range):
        return [_index(item, n, scope)]
    first = 0 if item.first is None else _index(item.first, n, scope)
    last = n - 1 if item.last is None else _index(item.last, n, scope)
    if first > last:
        raise DATA_SLICE.error(f"this slice is empty: {first} comes after {last}", span=item.span)
    return list(range(first, last + 1))


def _index(item: tree.Element, n: int, scope: Scope) -> int:
    index = scope.number(item) if isinstance(item, tree.Number | tree.Parameter) else None
    if not isinstance(index, int):
        raise WRONG_KIND.error("a slice of a file takes whole numbers, such as [..99] or [{0, 5}]", span=item.span)
    if not -n <= index < n:
        raise DATA_SLICE.error(f"there is no prompt {index}: the file has {n}, numbered 0..{n - 1}", span=item.span)
    return index % n


# ---- Python


def _rows(given: Given) -> list[dict[str, Any]]:
    """Records from any of the forms of `Given`."""
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a pandas DataFrame, without importing pandas
        given = given.to_dict("records")
    if isinstance(given, Mapping):
        return _from_columns({str(k): plain(v) for k, v in given.items()})
    if isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(r, Mapping) for r in given):
        return [{str(k): plain(v) for k, v in record.items()} for record in given]
    message = f"data is a list of dicts, a DataFrame or a dict of columns, not {type(given).__name__}"
    raise BAD_DATA.error(message)


def _from_columns(columns: dict[str, Any]) -> list[dict[str, Any]]:
    for name, column in columns.items():
        if not isinstance(column, list):
            raise BAD_DATA.error(f"column {name!r} needs an entry for each prompt; it is {type(column).__name__}")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} has {n}" for name, n in lengths.items())
        raise BAD_DATA.error(f"the columns differ in their number of prompts: {told}")
    names = list(columns)
    return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def plain(value: Any) -> Any:
    """Tensors and arrays as lists, their numbers as Python's own; anything else as it is."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
