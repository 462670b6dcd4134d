"""Leaves alone what no change reaches: positions before the first token at which the worlds differ, or before the
patched position, are the base run's, and their keys and values come from there.

Before    v1 = stored embed of corrupt  @ all                 After    v1 = stored embed of corrupt  @ 1
          v2 = attention 0(q: v1, k: v1, v: v1)  @ all                 v2 = attention 0(q: v1, k: v1, v: v1)  @ 1,2,3
          v3 = head[0, 0] of v2  @ all                                 v3 = head[0, 0] of v2  @ 1,2,3
          v4 = mlp[1](v3)  @ all                                       v4 = mlp[1](v3)  @ 1,2,3
The worlds differ at position 1; where, differs by prompt. In a causal model a change spreads to later positions only.
"""

from __future__ import annotations

from patchc.ir.laws import Law
from patchc.ir.program import Program
from patchc.optimise.facts import Facts
from patchc.optimise.rebuild import rebuilt


def apply(program: Program) -> Program:
    return rebuilt(program, Law.FORWARD)


def remark(facts: Facts) -> tuple[bool, str]:
    if not facts.dag.graph.causal:
        return False, "this model attends to later positions, so a change spreads to every position"
    changed = (facts.dag.changed[root] for roots in facts.program.roots for root in roots)
    sizes = [tokens.bit_count() for tokens in changed if tokens]
    total = facts.dag.layout.n_tokens
    mean = sum(sizes) / max(1, len(sizes))
    if mean == total:
        return False, "the first token differs already, so every position can change"
    return True, f"a cell can change {mean:.1f} of {total} tokens; the others keep the unpatched values"
