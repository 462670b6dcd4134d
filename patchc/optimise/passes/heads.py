"""Computes only those heads of an attention block that some variant reads; the block is one value whichever they are.

Before    v2 = attention 1(q: v1, k: v1, v: v1), heads 0 and 1        After    head 0
          v3 = head[1, 0] of v2
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.ops import Core
from patchc.ir.program import Program
from patchc.optimise.facts import Facts


def apply(program: Program) -> Program:
    schedule = program.schedule
    return program if schedule.heads else replace(program, schedule=replace(schedule, heads=True))


def remark(facts: Facts) -> tuple[bool, str]:
    computed = every = 0
    for i, op in facts.asked():
        if isinstance(op, Core):
            tokens = facts.needs.tokens[i].bit_count()
            computed += tokens * facts.needs.heads.get(i, 0).bit_count()
            every += tokens * facts.dag.graph.n_heads
    if not every:
        return True, "no attention is computed again but in whole suffixes"
    if computed == every:
        return False, "every head of a layer that is computed again is needed"
    return True, f"head rows computed again: {computed:,}, of {every:,} of all heads of those layers"
