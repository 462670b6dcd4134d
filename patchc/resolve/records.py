"""The rows of a data set: from `data` blocks, from files (`data_files`), from Python. One record a prompt, nothing
tokenised.

A record's cells stay as they were given; what a cell has to be depends on its use, which `data` knows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from patchc.diagnostics import RULES, Span
from patchc.parse import tree
from patchc.resolve.data_files import Locate, read_rows
from patchc.resolve.scope import NAME_CLASH, WRONG_KIND, Scope, collecting

EMPTY_DATA = RULES.add("empty-data", "there is no prompt to run")
DATA_SLICE = RULES.add("data-slice", "a slice of a data file takes prompts that the file does not have")
BAD_DATA = RULES.add("bad-data", "data given in Python has a form that is not understood")

Given = Any
"""Data given in Python: a list of records (dicts of columns and named positions), a pandas DataFrame, or one
dict of columns, each with an entry a prompt (`{"clean": ids [prompt, pos], "answer": [id, ...]}`)."""

T = TypeVar("T")

_WHOLE = re.compile(r"[+-]?[0-9]{1,9}")


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt: its columns and named positions by name, and the positions that its `data` statement declares.

    `spans`: where its cells are written in the spec; `locate` says where they stand in a file. `texts`: its format
    has no types, so that a whole number stands there as text.
    """

    cells: Mapping[str, Any]
    positions: Mapping[str, tree.Position] = field(default_factory=dict[str, tree.Position])
    where: Span | None = None
    spans: Mapping[str, Span | None] = field(default_factory=dict[str, Span | None])
    locate: Locate = None
    texts: bool = False

    def span(self, name: str) -> Span | None:
        """Where a cell is written, or at least its record."""
        return self.spans.get(name) or (self.locate(name) if self.locate else None) or self.where

    def as_position(self, name: str) -> Any:
        """A cell that is used as a position: of a format without types, a whole number is one."""
        cell = self.cells[name]
        if self.texts and name not in self.spans and isinstance(cell, str) and _WHOLE.fullmatch(cell):
            return int(cell)
        return cell


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
    name = scope.text(statement.file)
    rows = _not_empty(read_rows(base / name, name, statement.file.span), statement.file.span, f"{name} holds no prompt")
    if statement.slice is not None:
        rows = [rows[i] for i in chosen(statement.slice, len(rows), scope)]
    return [Record({**r.cells, **cells}, positions, r.where, spans, r.locate, r.texts) for r in rows]


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


def _not_empty(rows: list[T], span: Span | None, message: str = "the data given holds no prompt") -> list[T]:
    if not rows:
        raise EMPTY_DATA.error(message, span=span)
    return rows


# ---- slices


def chosen(node: tree.Index, n: int, scope: Scope, what: str = "file") -> list[int]:
    """The prompts that a slice takes of `n`; `what` has them, in words. Raises `data-slice`."""
    if isinstance(node, tree.Every):
        return list(range(n))
    items = node.items if isinstance(node, tree.Braces) else (node,)
    return [i for item in items for i in _indices(item, n, scope, what)]


def _indices(item: tree.Element, n: int, scope: Scope, what: str) -> list[int]:
    if not isinstance(item, tree.Range):
        return [_index(item, n, scope, what)]
    first = 0 if item.first is None else _index(item.first, n, scope, what)
    last = n - 1 if item.last is None else _index(item.last, n, scope, what)
    if first > last:
        raise DATA_SLICE.error(f"this slice is empty: {first} comes after {last}", span=item.span)
    return list(range(first, last + 1))


def _index(item: tree.Element, n: int, scope: Scope, what: str) -> int:
    index = scope.number(item) if isinstance(item, tree.Number | tree.Parameter) else None
    if not isinstance(index, int):
        raise WRONG_KIND.error("a slice takes whole numbers, such as [..99] or [{0, 5}]", span=item.span)
    if not -n <= index < n:
        message = f"there is no prompt {index}: the {what} has {n}, numbered 0..{n - 1}"
        raise DATA_SLICE.error(message, span=item.span)
    return index % n


# ---- Python


def _rows(given: Given) -> list[dict[str, Any]]:
    """Records from any of the forms of `Given`."""
    if hasattr(given, "to_dict") and hasattr(given, "columns"):  # a pandas DataFrame, without importing pandas
        given = given.to_dict("records")
    if isinstance(given, Mapping):
        return _from_columns({str(k): plain(v) for k, v in given.items()})
    if isinstance(given, Sequence) and not isinstance(given, str) and all(isinstance(r, Mapping) for r in given):
        return [_present({str(k): plain(v) for k, v in record.items()}) for record in given]
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


def _present(cells: dict[str, Any]) -> dict[str, Any]:
    """Without what is None or NaN, as a DataFrame has it: the prompt lacks that column."""
    return {name: cell for name, cell in cells.items() if cell is not None and cell == cell}


def plain(value: Any) -> Any:
    """Tensors and arrays as lists, their numbers as Python's own; anything else as it is."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value
