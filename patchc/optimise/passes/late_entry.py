"""Orders cells by the rank at which they enter, so that a pass of late cells never runs an early block, and cells that
share variants stand together.

Before    cells 0, 1, 2, 3 that enter in layers 0, 1, 0, 1        After    0, 2, 1, 3
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.dag import NEVER
from patchc.ir.program import Program
from patchc.optimise.facts import Facts


def apply(program: Program) -> Program:
    low, roots = program.dag.low, program.roots
    passes = tuple(
        replace(work, cells=tuple(sorted(work.cells, key=lambda c: (min(low[root] for root in roots[c]), c))))
        for work in program.passes
    )
    return program if passes == program.passes else replace(program, passes=passes)


def remark(facts: Facts) -> tuple[bool, str]:
    graph, low = facts.dag.graph, facts.dag.low
    lows = [min(low[root] for root in roots) for roots in facts.live]
    blocks = len(graph.blocks) - 1
    skipped = [sum(b.rank < rank for b in graph.blocks[1:]) if rank < NEVER else blocks for rank in lows]
    if not any(skipped):
        return False, "every cell changes the stream before the first block"
    mean = sum(skipped) / len(skipped)
    return True, f"a cell runs nothing below its patch: on average {mean:.1f} of {blocks} blocks"
