"""Cuts the cells of an experiment into passes, in the order in which they are given: as many cells as keep the matrix
products full, within a memory budget.

What a pass holds is estimated from its rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from patchc.ir.dag import Dag
from patchc.ir.ops import VariantId
from patchc.ir.program import FULL, Pass, Schedule
from patchc.ir.tokens import Tokens
from patchc.optimise.demand import demand
from patchc.optimise.memory import bytes_of
from patchc.optimise.rows import Rows, reachable

ENOUGH = 3840
"""Token rows that the widest block of a pass has, however large the budget: products are full with a quarter of them,
cells save nothing by sharing more, and what a killed run loses is a pass."""


def cut(
    dag: Dag,
    roots: Sequence[Sequence[VariantId]],
    measured: Sequence[Tokens],
    cells: Sequence[int],
    budget: int,
    element: int,
    schedule: Schedule = FULL,
) -> tuple[Pass, ...]:
    """`roots[cell]` are read at the tokens of `measured`; `cells` are the numbers of the cells that need a pass;
    `budget` is the bytes that a pass may hold beyond the model, `element` those of one number."""
    needs = demand(dag, (read for c in cells for read in zip(roots[c], measured, strict=True)), schedule)
    count, n_blocks = Rows(dag), len(dag.graph.blocks)
    passes: list[Pass] = []
    chosen: list[int] = []
    rows = [0] * n_blocks
    seen: set[VariantId] = set()
    for c in cells:
        before = rows.copy()
        count.add(rows, needs, reachable(dag, needs, roots[c], seen))
        if chosen and (max(rows) > ENOUGH or bytes_of(dag.graph, max(rows), element) > budget):
            passes.append(_pass(dag, chosen, before, element))
            chosen, rows, seen = [], [0] * n_blocks, set()
            count.add(rows, needs, reachable(dag, needs, roots[c], seen))
        chosen.append(c)
    if chosen:
        passes.append(_pass(dag, chosen, rows, element))
    return tuple(passes)


def _pass(dag: Dag, cells: list[int], rows: list[int], element: int) -> Pass:
    return Pass(tuple(cells), tuple(rows), bytes_of(dag.graph, max(rows), element))
