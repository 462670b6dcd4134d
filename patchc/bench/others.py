"""The rows that are no race: compiled graphs beside the eager forward, tracing, planning, cells and variants, memory.

Each is a function of `Bench` that gives a row with its own targets; `OTHERS` lists them. To add one: a function, and a
line there.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from patchc.bench.drop_in import FUNCTIONS, drop_in
from patchc.bench.measure import product_gflops, timed, with_use
from patchc.bench.row import Bound, Row
from patchc.bench.shape import ALL_DIFFERENT, GPT2_SMALL, IOI_LIKE, Shape, Worlds, random_worlds
from patchc.bench.startup import tracing
from patchc.bench.sweeps import METRIC, Bench, by_cell, counted_run, worst
from patchc.bench.works import EDGES, HEAD_BY_POSITION, SPEC, Work

if TYPE_CHECKING:
    from patchc.api import Compiled, Masks

TURNS = 5


@dataclass(frozen=True, slots=True)
class Other:
    """A row by its name; `setting` is empty where there is none. `quick`: whether a quick run has it."""

    name: str
    setting: str
    measure: Callable[[Bench], Row]
    quick: bool = False


def only_on(shape: Shape, *bounds: Bound) -> tuple[Bound, ...]:
    """Targets, which are those of GPT-2 small's shape."""
    return bounds if shape == GPT2_SMALL else ()


# ---- compiled graphs


@dataclass(frozen=True, slots=True)
class GraphWork:
    """A compiled graph of one patched edge: what it has masks for, how many of them are not zero, and its cost in eager
    forwards, at most: those beyond the base run where `beyond`."""

    name: str
    masks: Masks
    set_masks: float
    limit: float
    beyond: bool = False


EDGE = "edge head[{}, 0] -> head[{}, 0].q"
"""Half-way up: what is below is the base run's alone, what is above is run twice."""
GRAPHS = (
    GraphWork("compiled graph, nothing patched", "none", 0, 1.05),
    GraphWork("compiled graph, one edge patched", "cell", 1, 1.15, beyond=True),
    GraphWork("compiled graph, a mask for every edge", "edge", 1, 2.5),
)


def graph(bench: Bench, work: GraphWork) -> Row:
    """A graph's forward beside the eager model's, in turns, at one thread."""
    worlds = random_worlds(bench.shape, ALL_DIFFERENT)
    middle = bench.shape.n_layers // 2
    spec = SPEC.format(loops="", patch=EDGE.format(middle - 1, middle))
    compiled = bench.model.compile(spec, data=worlds.columns(), masks=work.masks)
    made, eager = compiled.graph, bench.model.loaded.eager
    masks = torch.full(made.mask_shape, float(work.set_masks))
    inputs = [getattr(worlds, world) for world in made.worlds]
    turns = [(timed(lambda: made(*inputs, masks))[1], timed(lambda: eager(worlds.corrupt))[1]) for _ in range(TURNS)]
    forward = statistics.median(theirs for _, theirs in turns)
    cost = statistics.median(ours / theirs for ours, theirs in turns)
    unit = "x eager forward, beyond the base run" if work.beyond else "x eager forward"
    return Row(
        work.name,
        "",
        masks.numel(),
        statistics.median(ours for ours, _ in turns),
        bounds=only_on(bench.shape, Bound(unit, cost - 1 if work.beyond else cost, work.limit)),
        notes=(f"{cost:.3g} times the eager forward, which takes {forward:.3g} s",),
    )


# ---- planning


def planning(bench: Bench) -> Row:
    """Everything before the first matrix product, for every edge."""
    worlds = random_worlds(bench.shape, IOI_LIKE)
    spec = EDGES.spec(bench.shape)
    (compiled, seconds), _, used = with_use(
        lambda: timed(lambda: bench.model.compile(spec, data=worlds.columns())), lambda _: None
    )
    (plan,) = compiled.plan()
    return Row(
        "planning all edges",
        IOI_LIKE,
        plan.n_cells,
        seconds,
        extra_bytes=used.bytes,
        planning_s=seconds,
        planned_flops=plan.cost.flops,
        bounds=only_on(bench.shape, Bound("CPU s", seconds, 4.0), Bound("MB", used.bytes / 1e6, 500.0)),
    )


# ---- a curve


def curve(bench: Bench, power: int) -> Row:
    """10 ** power entries of patterns: of one or ten heads, layers, asking positions and positions looked at."""
    sizes = [10 if power > i else 1 for i in range(4)]
    heads, layers, dests, sources = (min(size, most) for size, most in zip(sizes, _most(bench.shape), strict=True))
    first, last = (bench.shape.n_layers - layers) // 2, bench.shape.length - 1
    loops = (
        f"for h in head[{first}..{first + layers - 1}, 0..{heads - 1}], "
        f"d in {last - dests + 1}..{last}, s in 0..{sources - 1}"
    )
    worlds = random_worlds(bench.shape, IOI_LIKE)
    spec = SPEC.format(loops=loops, patch="node h.pattern[d, s]")
    compiled, result, used = with_use(lambda: bench.model.compile(spec, data=worlds.columns()), counted_run)
    before = product_gflops()
    _, seconds = timed(lambda: _plainly(bench, spec, worlds))
    gflops = (before + product_gflops()) / 2
    (plan,) = compiled.plan()
    values = by_cell(result)
    base = result.baselines[METRIC]["corrupt"]
    variants = sum(plan.variants.values())
    return Row(
        f"cells: {plan.n_cells:,}",
        IOI_LIKE,
        plan.n_cells,
        seconds,
        flops=used.flops,
        limit_ratio=seconds * gflops * 1e9 / used.flops,
        extra_bytes=used.bytes,
        largest_effect=max(abs(value - base) for value in values.values()),
        planned_flops=plan.cost.flops,
        gflops=gflops,
        notes=(f"{variants:,} distinct variants; {plan.no_effect:,} cells provably change nothing",),
    )


def _most(shape: Shape) -> tuple[int, int, int, int]:
    return shape.n_heads, shape.n_layers, shape.length, shape.length


def _plainly(bench: Bench, spec: str, worlds: Worlds) -> Compiled:
    """Compile and run, as a user does."""
    compiled = bench.model.compile(spec, data=worlds.columns())
    compiled.run(progress=False, write=False)
    return compiled


# ---- memory


def budget(bench: Bench, work: Work, memory: int, text: str) -> Row:
    """A sweep within a budget: under it, and with the numbers that it has without."""
    worlds = random_worlds(bench.shape, ALL_DIFFERENT)
    layers = None if bench.shape != GPT2_SMALL else work.some_layers(bench.shape, 2)
    spec = work.spec(bench.shape, layers)
    compiled, result, used = with_use(
        lambda: bench.model.compile(spec, data=worlds.columns(), memory=memory), counted_run
    )
    free = bench.model.compile(spec, data=worlds.columns()).run(progress=False, write=False)["sweep"]
    _, seconds = timed(lambda: compiled.run(progress=False, write=False))
    values, freely = by_cell(result), by_cell(free)
    apart = worst(values[cell] - freely[cell] for cell in freely)
    base = free.baselines[METRIC]["corrupt"]
    row = Row(
        f"memory {text}",
        ALL_DIFFERENT,
        len(result.experiment.cells),
        seconds,
        part=work.name,
        flops=used.flops,
        extra_bytes=used.bytes,
        max_abs_diff=apart,
        largest_effect=max(abs(value - base) for value in freely.values()),
        bounds=(Bound("MB", used.bytes / 1e6, memory / 1e6), Bound("difference", apart, 1e-5)),
        notes=(f"beside the default budget, in {result.passes} passes and {free.passes}",),
    )
    return row if layers is None else replace(row, notes=(*row.notes, f"the cells of layers {layers}"))


DROP_INS = tuple(
    Other(f"patchc.transformer_lens.{name}", IOI_LIKE, partial(drop_in, name=name), quick=False) for name in FUNCTIONS
)
BUDGETS = {"0.5 GiB": 1 << 29, "1 GiB": 1 << 30, "4 GiB": 1 << 32}

OTHERS: tuple[Other, ...] = (
    *DROP_INS,
    *(Other(work.name, "", partial(graph, work=work), quick=True) for work in GRAPHS),
    Other("planning all edges", IOI_LIKE, planning, quick=True),
    Other("tracing", "", tracing),
    *(
        Other(f"cells: {10**power:,}", IOI_LIKE, partial(curve, power=power), quick=power in (0, 2))
        for power in range(5)
    ),
    *(
        Other(f"memory {text}", ALL_DIFFERENT, partial(budget, work=HEAD_BY_POSITION, memory=memory, text=text))
        for text, memory in BUDGETS.items()
    ),
)
