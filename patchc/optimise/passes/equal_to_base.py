"""Puts the base run in the place of what provably equals it: values that are the run's own where they enter, and nodes
that read nothing else. Nothing is computed for them.

Before    v1 = stored embed pos_embed of corrupt  @ 0                  After    base
          v2 = attention 0(q: base, k: v1, v: base)
          v3 = head[0, 0] of v2
Position 0 is the same in both worlds. Position embeddings are the same at every position, and never stored.
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
