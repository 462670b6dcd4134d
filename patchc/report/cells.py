"""Cells in words: which coordinates a cell has, which cells are strongest, how a number is written.

The one place that says so, for the terminal, the pages, the pictures and the diagnostics.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from patchc.ir.experiment import Dim

if TYPE_CHECKING:
    from patchc.report.results import Result


ROUNDING = 1e-6
"""Share of a metric's size that float32 rounding may make: no effect to show."""


def cell_name(dims: Sequence[Dim], index: Sequence[int]) -> str:
    """`layer=3, head=1`; "" where there are no dims."""
    return ", ".join(f"{d.name}={label(d, i)}" for d, i in zip(dims, index, strict=True))


def label(dim: Dim, i: int) -> str:
    """A coordinate for people: `5 " John"` where the dim has labels that say more than it does."""
    coord = str(dim.coords[i])
    if dim.labels is None or dim.labels[i] in ("", coord):
        return coord
    shown = dim.labels[i]
    return shown if shown.startswith(coord) else f"{coord} {json.dumps(shown, ensure_ascii=False)}"


def strongest(result: Result, metric: str, count: int) -> list[tuple[int, ...]]:
    """The cells whose value is farthest from the unpatched run's, farthest first; what rounding makes is no effect."""
    size = np.abs(result.effects(metric))
    least = ROUNDING * max(abs(result.baseline(metric)), float(np.nanmax(size, initial=0.0)))
    order = np.argsort(-size, axis=None, kind="stable")
    places = [tuple(int(x) for x in np.unravel_index(int(i), size.shape)) for i in order]
    return [index for index in places if np.isfinite(size[index]) and size[index] > least][:count]


def number(value: float, digits: int = 4) -> str:
    """A number for people: `0.1234`, `12.3`, `1.2e-05`, never `-0`."""
    if not math.isfinite(value):
        return "-"
    text = f"{value:.{digits}g}"
    return "0" if float(text) == 0 else text


def with_error(result: Result, metric: str, index: tuple[int, ...]) -> str:
    """`0.5321 [0.51, 0.55]` where the metric has an interval, else `0.5321 ± 0.012`, or the value alone where there is
    no standard error."""
    value, error = float(result.values[metric][index]), float(result.stderr[metric][index])
    if metric in result.low:
        ends = (number(float(a[metric][index]), 3) for a in (result.low, result.high))
        return f"{number(value)} [{', '.join(ends)}]"
    return number(value) + (f" ± {number(error, 2)}" if math.isfinite(error) and result.n > 1 else "")


def passes_sentence(result: Result) -> str:
    """`2 passes for 240 cells`, and what a forward pass a cell would have taken."""
    cells = len(result.experiment.cells)
    unfused = result.unfused_passes or cells
    passes = f"{result.passes} pass{'' if result.passes == 1 else 'es'}"
    text = f"{passes} for {cells} cell{'' if cells == 1 else 's'}"
    return text if unfused == cells else f"{text} ({unfused} with a pass a cell)"
