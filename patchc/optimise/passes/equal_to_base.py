"""Puts the base run in the place of what provably equals it: values that are the base run's own where they enter, and
nodes that read nothing else. Nothing is computed for them.

Before    v1 = stored embed of corrupt  @ 0      After    v1 = stored head[1, 0] of corrupt
          v2 = attention 1(q: v1, k: v1, v: v1)           root = v1
          v3 = head[1, 0] of v2
          v4 = stored head[1, 0] of corrupt
          root = v3 @ 0 | v4 @ 1,2,3
Position 0 is the same in both worlds.
"""

from __future__ import annotations

from patchc.ir.laws import Law
from patchc.ir.program import Program
from patchc.optimise.facts import Facts
from patchc.optimise.rebuild import rebuilt


def apply(program: Program) -> Program:
    return rebuilt(program, Law.BASE)


def remark(facts: Facts) -> tuple[bool, str]:
    every = (len(facts.dag.graph.blocks) - 1) * len(facts.live)
    if facts.blocks == every:
        return False, "every cell changes something at every block"
    mean = facts.blocks / max(1, len(facts.live))
    blocks = len(facts.dag.graph.blocks) - 1
    return True, f"a cell computes something in {mean:.1f} of {blocks} blocks; the others are the unpatched run's"
