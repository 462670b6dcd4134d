"""Cuts the cells of an experiment into passes by a memory budget.

Cells stand in order of the rank at which they enter, so a pass of late cells never runs an early block, and cells that
share variants run together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from patchc.ir.dag import Dag
from patchc.ir.ops import VariantId
from patchc.ir.program import Pass
from patchc.ir.tokens import Tokens
from patchc.optimise.demand import demand
from patchc.optimise.rows import bytes_of, reachable, rows_of

MOST_ROWS = 8192
"""Token rows that the widest block of a pass has, however large the budget: products as large as are worth making have
fewer, cells save nothing by sharing more of them, and what a killed run loses is a pass."""


def cut(
    dag: Dag,
    roots: Sequence[Sequence[VariantId]],
    measured: Sequence[Tokens],
    cells: Sequence[int],
    budget: int,
    element: int,
) -> tuple[Pass, ...]:
    """`roots[cell]` are read at the tokens of `measured`; `cells` are the numbers of the cells that need a pass;
    `budget` is the bytes that a pass may hold beyond the model, `element` those of one number."""
    needs = demand(dag, (read for c in cells for read in zip(roots[c], measured, strict=True)))
    passes: list[Pass] = []
    chosen: list[int] = []
    rows: Counter[int] = Counter()
    seen: set[VariantId] = set()
    for c in sorted(cells, key=lambda c: (min(dag.low[r] for r in roots[c]), c)):
        more = rows_of(dag, needs, reachable(dag, needs, roots[c], seen))
        if chosen and _is_full(dag, rows + more, budget, element):
            passes.append(_pass(dag, chosen, rows, element))
            chosen, rows, seen = [], Counter(), set()
            more = rows_of(dag, needs, reachable(dag, needs, roots[c], seen))
        chosen.append(c)
        rows += more
    if chosen:
        passes.append(_pass(dag, chosen, rows, element))
    return tuple(passes)


def _is_full(dag: Dag, rows: Counter[int], budget: int, element: int) -> bool:
    return bytes_of(dag, rows, element) > budget or max(rows.values(), default=0) > MOST_ROWS


def _pass(dag: Dag, cells: list[int], rows: Counter[int], element: int) -> Pass:
    by_block = tuple(rows[i] for i in range(len(dag.graph.blocks)))
    return Pass(tuple(cells), by_block, bytes_of(dag, rows, element))
