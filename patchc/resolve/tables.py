"""Rows of csv and parquet files. A cell that is empty (csv) or null (parquet) is a column that the prompt lacks.

In csv every cell is text; sets of answers and token ids need a format with lists.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from patchc.diagnostics import RULES, Source, Span
from patchc.resolve.files import FILE_TOO_LARGE, open_checked

BAD_TABLE = RULES.add("bad-table", "a csv or parquet file that cannot be read as a table of prompts")

MAX_UNPACKED = 2**30
"""The most bytes that a parquet file may hold once it is unpacked."""

_PARQUET = b"PAR1"


def csv_rows(source: Source, span: Span | None) -> list[tuple[dict[str, str], Span]]:
    """Each prompt's cells and where it stands; the first line names the columns."""
    lines = _Lines(source)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise BAD_TABLE.error(f"{source.name} is empty; its first line names the columns", span=span)
        _check_names(header, source.name, lines.taken())
        rows = [(cells, lines.taken()) for cells in reader]
    except csv.Error as error:
        raise BAD_TABLE.error(f"this line is not csv: {error}", span=lines.taken()) from None
    return [_csv_row(header, cells, where) for cells, where in rows if cells]


class _Lines:
    """The lines of a text one by one, with the place of those that were taken since it was last asked for."""

    def __init__(self, source: Source):
        self._source = source
        self._from = self._to = 0

    def __iter__(self) -> Iterator[str]:
        for line in io.StringIO(self._source.text, newline=""):
            self._to += len(line)
            yield line

    def taken(self) -> Span:
        end = len(self._source.text[self._from : self._to].rstrip("\r\n"))
        span = Span(self._source, self._from, self._from + end)
        self._from = self._to
        return span


def _csv_row(header: Sequence[str], cells: Sequence[str], where: Span) -> tuple[dict[str, str], Span]:
    if len(cells) != len(header):
        message = f"this line has {len(cells)} cells, and the first line names {len(header)} columns"
        raise BAD_TABLE.error(message, fix='a cell with a comma stands in quotes: `"a, b"`', span=where)
    return {name: cell for name, cell in zip(header, cells, strict=True) if cell}, where


def _check_names(names: Sequence[str], file: str, span: Span | None) -> None:
    if "" in names:
        raise BAD_TABLE.error(f"column {list(names).index('')} of {file} has no name", span=span)
    twice = next((name for name, n in Counter(names).items() if n > 1), None)
    if twice is not None:
        raise BAD_TABLE.error(f"{file} has two columns called {twice!r}", span=span)


def parquet_rows(path: Path, name: str, span: Span | None) -> list[dict[str, Any]]:
    """Each prompt's cells, as Python's own numbers, texts and lists."""
    if open_checked(path, name, span)[: len(_PARQUET)] != _PARQUET:
        raise BAD_TABLE.error(f"{name} is not in the parquet format", span=span)
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            _check_size(file.metadata, name, span)
            table: Any = file.read()
            _check_names(table.column_names, name, span)
            return table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        told = str(error).partition("\n")[0]
        raise BAD_TABLE.error(f"{name} is not in the parquet format: {told}", span=span) from None


def _check_size(metadata: Any, name: str, span: Span | None) -> None:
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if size > MAX_UNPACKED:
        told = f"{size / 2**20:,.0f} MiB; at most {MAX_UNPACKED / 2**20:,.0f} MiB are read"
        raise FILE_TOO_LARGE.error(f"{name} unpacks to {told}", span=span)
