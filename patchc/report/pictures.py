"""Pictures of results: heatmaps whose colours diverge from the unpatched run (grey: no cell), bars from it, lines.

Uses matplotlib's objects directly: no pyplot, so no state that anyone else's figures share.
"""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from patchc.report.cells import label

if TYPE_CHECKING:
    from patchc.report.results import Array, Result

COLORS = colormaps["RdBu_r"].with_extremes(bad="0.8")
MOST_PANELS = 48
MOST_TICKS = 40
MOST_LINES = 20
KINDS = ("heatmap", "bar", "line")


@dataclass(frozen=True)
class Axis:
    """Dims that share one axis of a picture: one, or the two of a variable over heads."""

    name: str
    dims: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Panel:
    """One picture: `[rows, columns]`, `[bars]`, or `[x, line]`; `error`, the distances down and up to the ends of what
    is uncertain, `[2, *values]`. Colours go from `center - limit` to `center + limit`."""

    title: str
    values: Array
    error: Array
    axes: tuple[Axis, ...]
    center: float
    limit: float
    kind: str = "heatmap"


def draw(result: Result, metrics: Sequence[str], kind: str = "heatmap") -> Figure:
    """A figure: of heatmaps a panel for each metric, and for each coordinate of the dims that are not its axes; of bars
    and lines a panel for each metric. Lines run along the first loop variable, one for each choice of the others."""
    if kind not in KINDS:
        raise ValueError(f"no picture {kind!r}; there are {', '.join(KINDS)}")
    panels, left_out = _panels(result, metrics) if kind == "heatmap" else _charts(result, metrics, kind)
    columns = min(len(panels), max(len(metrics), math.ceil(math.sqrt(len(panels)))))
    rows = math.ceil(len(panels) / columns)
    width, height = _size(panels[0])
    figure = Figure(figsize=(min(40, width * columns), min(60, height * rows)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for panel, ax in itertools.zip_longest(panels, axes.flat):
        if panel is None:
            ax.set_axis_off()
        else:
            _draw_panel(panel, ax, figure)
    title = result.experiment.title or result.name
    figure.suptitle(_plain(title + (f" (the first {len(panels)} panels; {left_out} more)" if left_out else "")))
    return figure


def write_picture(result: Result, path: Path, kind: str = "heatmap") -> None:
    """Every metric's picture into a file of the format that the suffix names."""
    _write(result, path, path.suffix.lower().removeprefix("."), kind)


def png(result: Result) -> bytes:
    """Every metric's heatmap as a PNG."""
    buffer = io.BytesIO()
    _write(result, buffer, "png", "heatmap")
    return buffer.getvalue()


def _write(result: Result, target: Path | io.BytesIO, form: str, kind: str) -> None:
    with warnings.catch_warnings():
        # A token may have characters that the font lacks: boxes are drawn, which is no fault of the spec.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        draw(result, result.metrics, kind).savefig(target, format=form, dpi=120)


# ---- what is drawn where


def _panels(result: Result, metrics: Sequence[str]) -> tuple[list[Panel], int]:
    """The panels, and how many were left out because nobody would look at them."""
    axes = _axes(result)
    shown = axes[-2:] if len(axes) > 1 else axes
    others = axes[: -len(shown)] if shown else ()
    combinations = list(itertools.product(*(range(len(a.labels)) for a in others)))
    each = max(1, MOST_PANELS // len(metrics))
    panels = [
        _panel(result, metric, others, combination, shown) for metric in metrics for combination in combinations[:each]
    ]
    return panels, len(metrics) * len(combinations) - len(panels)


def _axes(result: Result) -> tuple[Axis, ...]:
    """The axes, those to be drawn last; `a.layer, a.head` share one where there are more dims."""
    dims = result.dims
    groups: list[tuple[int, ...]] = [(i,) for i in range(len(dims))]
    if len(dims) > 2:
        groups = _joined([d.name for d in dims])
    axes = [_axis(result, group) for group in groups]
    # Small dims (sites, seeds) make panels, long ones make axes; the order stays.
    largest = sorted(sorted(range(len(axes)), key=lambda i: -len(axes[i].labels))[:2])
    return tuple([a for i, a in enumerate(axes) if i not in largest] + [axes[i] for i in largest])


def _joined(names: list[str]) -> list[tuple[int, ...]]:
    """The dims of each axis: `a.layer, a.head` next to each other share one."""
    groups: list[tuple[int, ...]] = []
    i = 0
    while i < len(names):
        first, second = names[i], names[i + 1] if i + 1 < len(names) else ""
        pair = first.endswith(".layer") and second == first.removesuffix("layer") + "head"
        groups.append((i, i + 1) if pair else (i,))
        i += 2 if pair else 1
    return groups


def _axis(result: Result, group: tuple[int, ...]) -> Axis:
    dims = [result.dims[i] for i in group]
    labels = [[label(d, i) for i in range(len(d.coords))] for d in dims]
    own = dims[0].name.rpartition(".")[0]
    name = own if own and len(dims) == 2 and dims[1].name.startswith(f"{own}.") else ", ".join(d.name for d in dims)
    return Axis(name, group, tuple(".".join(parts) for parts in itertools.product(*labels)))


def _charts(result: Result, metrics: Sequence[str], kind: str) -> tuple[list[Panel], int]:
    """A panel a metric: every cell a bar, or a line for each choice of all variables but the first."""
    groups = _joined([d.name for d in result.dims])
    if kind == "bar" or len(groups) < 2:
        groups = [tuple(range(len(result.dims)))] if groups else []
    else:
        groups = [groups[0], tuple(i for group in groups[1:] for i in group)]
    axes = [_axis(result, group) for group in groups]
    return [replace(_panel(result, metric, (), (), axes), kind=kind) for metric in metrics], 0


def _panel(result: Result, metric: str, others: Sequence[Axis], at: tuple[int, ...], shown: Sequence[Axis]) -> Panel:
    values = _arranged(result.values[metric], others, at, shown)
    error = np.stack([_arranged(a, others, at, shown) for a in _uncertain(result, metric)])
    where = ", ".join(f"{axis.name}={axis.labels[i]}" for axis, i in zip(others, at, strict=True))
    limit = float(np.nanmax(np.abs(result.effects(metric)), initial=0.0)) or 1.0
    title = f"{metric}{where and f' at {where}'}"
    return Panel(title, values, error, tuple(shown), result.baseline(metric), limit)


def _uncertain(result: Result, metric: str) -> tuple[Array, Array]:
    """How far down and up a value is uncertain: to the ends of its interval, or its standard error."""
    if metric not in result.low:
        return result.stderr[metric], result.stderr[metric]
    value = result.values[metric]
    return value - result.low[metric], result.high[metric] - value


def _arranged(array: Array, others: Sequence[Axis], at: tuple[int, ...], shown: Sequence[Axis]) -> Array:
    """`[*shown]`: the array with the dims of each axis as one, at one coordinate of every other axis."""
    axes = [*others, *shown]
    array = array.transpose([d for axis in axes for d in axis.dims])
    return array.reshape([len(axis.labels) for axis in axes])[at]


# ---- drawing


def _size(panel: Panel) -> tuple[float, float]:
    """Inches for one panel."""
    if panel.kind == "line":
        return 6.0, 3.6
    if panel.values.ndim < 2:
        return max(4.0, min(16.0, 1.5 + 0.3 * panel.values.size)), 3.2
    rows, columns = panel.values.shape
    return max(3.6, min(16.0, 2.0 + 0.32 * columns)), max(3.0, min(14.0, 1.5 + 0.28 * rows))


def _draw_panel(panel: Panel, ax: Axes, figure: Figure) -> None:
    ax.set_title(_plain(panel.title))
    if panel.kind == "line":
        _lines(panel, ax)
    elif panel.values.ndim == 2:
        image = ax.imshow(
            np.ma.masked_invalid(panel.values),
            cmap=COLORS,
            vmin=panel.center - panel.limit,
            vmax=panel.center + panel.limit,
            aspect="auto",
            interpolation="nearest",
        )
        figure.colorbar(image, ax=ax)
        _ticks(ax, "y", panel.axes[0])
        _ticks(ax, "x", panel.axes[1])
    else:
        _bars(panel, ax)


def _bars(panel: Panel, ax: Axes) -> None:
    values, error = np.atleast_1d(panel.values), np.nan_to_num(panel.error.reshape(2, -1)).clip(0)
    colors = COLORS(0.5 + 0.4 * np.sign(np.nan_to_num(values - panel.center)))
    yerr = error if error.any() else None
    ax.bar(np.arange(len(values)), values - panel.center, bottom=panel.center, color=colors, yerr=yerr, capsize=2)
    ax.axhline(panel.center, color="black", linewidth=0.8)
    if panel.axes:
        _ticks(ax, "x", panel.axes[0])
    else:
        ax.set_xticks([])


def _lines(panel: Panel, ax: Axes) -> None:
    """A line for each column, with what is uncertain as a band; the unpatched run is a thin black line."""
    x = np.arange(max(1, len(panel.values) if panel.values.ndim else 1))
    values, error = panel.values.reshape(len(x), -1), np.nan_to_num(panel.error.reshape(2, len(x), -1)).clip(0)
    for i in range(min(MOST_LINES, values.shape[1])):
        (line,) = ax.plot(
            x,
            values[:, i],
            marker="o",
            markersize=3,
            label=_plain(panel.axes[1].labels[i]) if panel.values.ndim > 1 else None,
        )
        if error[:, :, i].any():
            low, high = values[:, i] - error[0, :, i], values[:, i] + error[1, :, i]
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.axhline(panel.center, color="black", linewidth=0.8)
    if panel.axes:
        _ticks(ax, "x", panel.axes[0])
    if panel.values.ndim > 1:
        more = values.shape[1] - MOST_LINES
        title = _plain(panel.axes[1].name) + (f" ({more} more not drawn)" if more > 0 else "")
        ax.legend(title=title, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))


def _ticks(ax: Axes, which: str, axis: Axis) -> None:
    """Every label, or evenly spread ones where there are too many; long ones stand upright."""
    step = math.ceil(len(axis.labels) / MOST_TICKS)
    places = range(0, len(axis.labels), step)
    labels = [_plain(axis.labels[i]) for i in places]
    if which == "x":
        ax.set_xticks(list(places), labels, rotation=90 if max(map(len, labels), default=0) > 3 else 0)
        ax.set_xlabel(_plain(axis.name))
    else:
        ax.set_yticks(list(places), labels)
        ax.set_ylabel(_plain(axis.name))


def _plain(text: str) -> str:
    """A text in which nothing is a formula, and that is one line of printable characters."""
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return shown.replace("$", r"\$")
