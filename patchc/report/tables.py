"""Every cell of a result as a table for people: for the terminal, plain text, Markdown, HTML.

Numbers are rounded as everywhere for people; the exact ones are in what `save` writes.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from patchc.report.cells import label, with_error

if TYPE_CHECKING:
    from patchc.report.results import Result

Row = tuple[str, ...]


def rows(result: Result) -> tuple[Row, list[Row]]:
    """The head, and a row a cell: a column for each dim and each metric."""
    head = (*(d.name for d in result.dims), *result.metrics)
    return head, [_row(result, index) for index in result.indices]


def _row(result: Result, index: tuple[int, ...]) -> Row:
    places = (label(d, i) for d, i in zip(result.dims, index, strict=True))
    return (*places, *(with_error(result, metric, index) for metric in result.metrics))


def table_text(result: Result, form: str) -> str:
    """The table as `txt`, `md`, `html` or `csv`."""
    head, body = rows(result)
    match form:
        case "md":
            lines = [head, tuple("---" for _ in head), *body]
            return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
        case "html":
            shown = [_html_row(head, "th"), *(_html_row(line, "td") for line in body)]
            return "<table>\n" + "".join(shown) + "</table>\n"
        case "csv":
            return result.to_pandas().to_csv(index=False, lineterminator="\n")
        case _:
            return _aligned([head, *body])


def _html_row(cells: Row, tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _aligned(lines: list[Row]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "".join(f"{line}\n" for line in padded)
