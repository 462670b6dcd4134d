"""Data of another file, from which a value takes a mean: `mean("abc.jsonl", corrupt)`.

Its prompts are no prompts of the study: a world of its own, with a layout of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchc.diagnostics import RULES, Span
from patchc.ir.experiment import World
from patchc.parse import tree
from patchc.resolve.data import Dataset, silent
from patchc.resolve.records import Record, read_records
from patchc.resolve.scope import WRONG_KIND

NO_TEXT_COLUMN = RULES.add("no-text-column", "a file of other data without a column of texts")


class OtherData:
    """The other files of a spec, read once each. `base`: what their paths are relative to."""

    def __init__(self, dataset: Dataset, base: Path):
        self._data = dataset
        self._base = base
        self._records: dict[str, list[Record]] = {}
        self.worlds: dict[str, World] = {}
        """By name: `abc.jsonl:corrupt`."""

    def world(self, file: tree.Text | tree.Parameter, column: Any, run: str) -> str:
        """The name of the world of a column: the one that is named, the run's world, or the first of texts."""
        name = self._data.scope.text(file)
        if name not in self._records:
            statement = tree.Data(file, None, (), span=file.span)
            self._records[name] = read_records([statement], self._data.scope, self._base, None)
        records = self._records[name]
        if not records:
            raise silent()
        chosen = self._column(records, name, column, run, file.span)
        world = f"{name}:{chosen}"
        if world not in self.worlds:
            self.worlds[world] = self._read(records, world, chosen, file.span)
        return world

    def _column(self, records: list[Record], file: str, column: Any, run: str, span: Span | None) -> str:
        has = tuple(dict.fromkeys(name for record in records for name in record.cells))
        if column is not None:
            if not isinstance(column, tree.Ref) or column.indices or column.sites:
                raise WRONG_KIND.error("mean takes a file and one of its columns", span=span)
            if column.name.text not in has:
                raise self._data.scope.not_a(f"a column of {file}", column.name, has)
            return column.name.text
        if run in has:
            return run
        found = next((name for name, cell in records[0].cells.items() if isinstance(cell, str)), None)
        if found is None:
            message = f"{file} has no column of texts; it has {', '.join(has) or 'none'}"
            fix = f'as in `mean("{file}", {has[0] if has else "clean"})`'
            raise NO_TEXT_COLUMN.error(message, fix=fix, span=span)
        return found

    def _read(self, records: list[Record], world: str, column: str, span: Span | None) -> World:
        own = Dataset(records, self._data.encoder, self._data.graph, self._data.scope, {column})
        return World(world, own.ids(column, span), own.layout)
