"""A result as HTML, for notebooks: the strongest cells and its picture. Words from outside are escaped."""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

from patchc.report.cells import cell_name, passes_sentence, strongest, with_error

if TYPE_CHECKING:
    from patchc.report.results import Result

ROWS = 8
MOST_CELLS = 40_000
"""Cells above which a notebook gets no picture unasked."""


def result_html(result: Result) -> str:
    """A title, a table a metric, and a heatmap where the result is not too large for one."""
    title = result.experiment.title
    heading = f"<b>{html.escape(result.name)}</b>" + (f" {html.escape(title)}" if title else "")
    tables = "".join(_table(result, metric) for metric in result.metrics)
    note = html.escape(f"{result.n} prompt{'s' * (result.n != 1)}, {passes_sentence(result)}")
    return f"<div>{heading}{tables}{_picture(result)}<div><small>{note}</small></div></div>"


def _table(result: Result, metric: str) -> str:
    cells: list[tuple[int, ...]] = strongest(result, metric, ROWS) if result.dims else [()]
    rows = "".join(
        f"<tr><td>{html.escape(cell_name(result.dims, index))}</td>"
        f"<td>{html.escape(with_error(result, metric, index))}</td></tr>"
        for index in cells
    )
    return f"<table><tr><th></th><th>{html.escape(metric)}</th></tr>{rows}</table>"


def _picture(result: Result) -> str:
    if not result.dims or len(result.experiment.cells) > MOST_CELLS:
        return ""
    from patchc.report.pictures import png

    data = base64.b64encode(png(result)).decode()
    return f'<img alt="{html.escape(result.name)}" src="data:image/png;base64,{data}">'
