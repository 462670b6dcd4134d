"""A result for a person at a terminal: a small heatmap, the strongest cells, what it took. Drawn with rich.

No text from a spec or a tokenizer is read as markup.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from patchc.ir.check import Check
from patchc.report.cells import label, number, passes_sentence, strongest, with_error
from patchc.report.results import Array, Result, Results
from patchc.report.tables import rows

STRONGEST = 8
MOST_ROWS = 32
NUMBER_WIDTH = 8
BLOCK_WIDTH = 2


def print_results(results: Results, console: Console) -> None:
    """Every experiment, one after another."""
    for result in results.values():
        console.print(shown(result, console))
        console.print()


def shown(result: Result, console: Console) -> RenderableType:
    """One experiment, to fit the console's width."""
    return Group(*_lines(result, console))


def _lines(result: Result, console: Console) -> Iterator[RenderableType]:
    yield _heading(result)
    whole = bool(result.dims) and any(show.kind == "table" and show.path is None for show in result.experiment.shows)
    for metric in result.metrics:
        if not result.dims:
            yield _one_line(result, metric)
            continue
        picture = _heatmap(result, metric, console)
        if picture is not None:
            yield Text(f"{metric}, {_axes(result)}", style="italic")
            yield picture
        if not whole:
            yield _strongest(result, metric)
    if whole:
        yield _table(result)
    yield from (Text(line, style="dim") for line in _summary(result))


def _heading(result: Result) -> Text:
    text = Text(result.name, style="bold")
    return text.append(f"  {result.experiment.title}", style="not bold") if result.experiment.title else text


def _one_line(result: Result, metric: str) -> Text:
    worlds = result.baselines.get(metric, {})
    unpatched = ", ".join(f"{world} {number(value)}" for world, value in worlds.items())
    return Text(f"  {metric} = {with_error(result, metric, ())}" + (f"  (unpatched: {unpatched})" if unpatched else ""))


def _axes(result: Result) -> str:
    return " by ".join(d.name for d in result.dims)


def _summary(result: Result) -> Iterator[str]:
    n, each = (
        result.n if result.prompts is None else len(result.prompts.prompts),
        "" if result.prompts is None else "each of ",
    )
    parts = [f"{each}{n} prompt{'' if n == 1 else 's'}", passes_sentence(result)]
    if result.no_effect:
        parts.append(f"{result.no_effect} cell{'s' * (result.no_effect > 1)} without any possible effect")
    yield "; ".join(parts)
    if result.check is not None:
        yield _checked(result.check)
    for path in result.files:
        yield f"written: {path}"


def _checked(check: Check) -> str:
    worst, allowed, effect = (number(x, 2) for x in (check.max_abs_diff, check.tolerance, check.largest_effect))
    cells = f"{check.cells} cell{'' if check.cells == 1 else 's'}"
    where = "" if check.reference is None else f" in {check.reference}"
    own = "" if check.own_diff is None else f", hooks in the model's own type by {number(check.own_diff, 2)}"
    told = "" if check.largest_effect > check.tolerance else ", which rounding may hide"
    allowing = f"allowed {allowed}, largest effect {effect}{told}"
    return f"checked with hooks{where}: {cells} off by at most {worst}{own} ({allowing})"


# ---- the strongest cells


def _strongest(result: Result, metric: str) -> RenderableType:
    found = strongest(result, metric, STRONGEST)
    if not found:
        return Text(f"  {metric}: no cell differs from the unpatched {number(result.baseline(metric))}")
    table = Table(box=None, pad_edge=True, show_edge=False, header_style="dim")
    for dim in result.dims:
        table.add_column(Text(dim.name))
    table.add_column(Text(metric), justify="left")
    unpatched = number(result.baseline(metric)) if result.prompts is None else "the prompt's unpatched"
    table.add_column(Text(f"change from {unpatched}"), justify="right")
    for index in found:
        places = [Text(label(d, i)) for d, i in zip(result.dims, index, strict=True)]
        change = float(result.effects(metric)[index])
        table.add_row(
            *places, Text(with_error(result, metric, index)), Text(f"{'+' * (change > 0)}{number(change, 3)}")
        )
    return table


def _table(result: Result) -> Table:
    """Every cell, where the spec says `show table`."""
    head, body = rows(result)
    table = Table(box=None, pad_edge=True, show_edge=False, header_style="dim")
    for name in head:
        table.add_column(Text(name))
    for row in body:
        table.add_row(*map(Text, row))
    return table


# ---- the heatmap


def _heatmap(result: Result, metric: str, console: Console) -> Table | None:
    """Numbers on coloured ground where they fit, else coloured blocks; None where neither does."""
    if len(result.dims) > 2:
        return None
    values = np.atleast_2d(result.values[metric])
    rows = [label(result.dims[0], i) for i in range(values.shape[0])] if len(result.dims) == 2 else [metric]
    space = console.width - max(map(len, rows)) - 2
    colored = console.color_system is not None
    if values.shape[0] > MOST_ROWS:
        return None
    if values.shape[1] * NUMBER_WIDTH <= space:
        return _grid(result, metric, rows, NUMBER_WIDTH, colored)
    if colored and values.shape[1] * BLOCK_WIDTH <= space:
        return _grid(result, metric, rows, BLOCK_WIDTH, colored)
    return None


def _grid(result: Result, metric: str, rows: list[str], width: int, colored: bool) -> Table:
    values = np.atleast_2d(result.values[metric])
    grid = Table.grid(padding=0)
    grid.add_column(justify="right")
    for _ in range(values.shape[1]):
        grid.add_column(width=width, justify="right", no_wrap=True)
    last = result.dims[-1]
    heads = [_fitting(str(c), width) for c in last.coords]
    grid.add_row("", *(Text(head, style="dim") for head in heads))
    shares = _shares(values - result.baseline(metric)) if colored else np.full_like(values, np.nan)
    for name, row, ground in zip(rows, values, shares, strict=True):
        cells = (_cell(float(v), float(s), width) for v, s in zip(row, ground, strict=True))
        grid.add_row(Text(f"{name} ", style="dim"), *cells)
    return grid


def _fitting(text: str, width: int) -> str:
    """The text where it leaves a space between columns, else what there is room for."""
    return text if len(text) < width else text[: width - 1]


def _shares(effects: Array) -> Array:
    """Effects as shares of the largest, -1 to 1."""
    return effects / (float(np.nanmax(np.abs(effects), initial=0.0)) or 1.0)


def _cell(value: float, share: float, width: int) -> Text:
    """A value on the ground of its share; NaN for either means none."""
    missing = not np.isfinite(value)
    text = "" if width < NUMBER_WIDTH else "·" if missing else _short(value)
    style = _ground(share) if np.isfinite(share) else Style(dim=missing)
    return Text(f"{text} ".rjust(width), style=style)


def _short(value: float) -> str:
    """The value in as many digits, up to three, as leave a space between columns."""
    texts = (number(value, digits) for digits in (3, 2, 1))
    return next((text for text in texts if len(text) < NUMBER_WIDTH), "…")


def _ground(share: float) -> Style:
    """Blue through white to red for -1 through 0 to 1, with writing that can be read on it."""
    strong = (178, 24, 43) if share > 0 else (33, 102, 172)
    red, green, blue = (round(247 + (c - 247) * min(1.0, abs(share))) for c in strong)
    ink = "white" if abs(share) > 0.6 else "black"
    return Style(color=ink, bgcolor=f"rgb({red},{green},{blue})")
