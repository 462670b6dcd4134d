"""Cuts the cells of an experiment into passes (`ir.program.Pass`), in the order in which they are given: as many cells
as keep the matrix products full, within a memory budget.

What a pass holds is estimated from its rows.
"""

from __future__ import annotations

from patchc.ir.graph import ResidualGraph
from patchc.ir.ops import VariantId
from patchc.ir.program import Pass, Program
from patchc.optimise.course import Courses
from patchc.optimise.demand import demand
from patchc.optimise.memory import bytes_of, plain_run_bytes
from patchc.optimise.rows import Rows, reachable

ENOUGH = 1920
"""Token rows that the widest block of a pass has, however large the budget: products are full with half of them,
cells save nothing by sharing more, and what a killed run loses is a pass."""


def cut(program: Program) -> tuple[Pass, ...]:
    """The passes of a program's live cells."""
    dag, roots = program.dag, program.roots
    needs = demand(dag, program.reads(program.live), program.schedule)
    count, n_blocks = Rows(Courses(dag)), len(dag.graph.blocks)
    most = _most_rows(dag.graph, program.budget - plain_runs_bytes(program), program.element)
    passes: list[Pass] = []
    chosen: list[int] = []
    rows = [0] * n_blocks
    seen: set[VariantId] = set()
    for c in program.live:
        before = rows.copy()
        count.add(rows, needs, reachable(dag, needs, roots[c], seen))
        if chosen and max(rows) > most:
            passes.append(_pass(program, chosen, before))
            chosen, rows, seen = [], [0] * n_blocks, set()
            count.add(rows, needs, reachable(dag, needs, roots[c], seen))
        chosen.append(c)
    if chosen:
        passes.append(_pass(program, chosen, rows))
    return tuple(passes)


def plain_runs_bytes(program: Program) -> int:
    """What the worlds' own runs hold, in every pass."""
    tokens = sum(program.layout_of(world).n_tokens for world in program.worlds)
    return plain_run_bytes(program.dag.graph, tokens, program.element)


def _most_rows(graph: ResidualGraph, budget: int, element: int) -> int:
    """Token rows of the widest block that keep to a budget."""
    rows = ENOUGH
    while rows > 1 and bytes_of(graph, rows, element) > budget:
        rows //= 2
    return rows


def _pass(program: Program, cells: list[int], rows: list[int]) -> Pass:
    return Pass(tuple(cells), tuple(rows), bytes_of(program.dag.graph, max(rows), program.element))
