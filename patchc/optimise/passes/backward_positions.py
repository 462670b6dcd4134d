"""Computes a variant only at the tokens that something measured reads: demand goes from the roots down.

Before    v2 = mlp[0](v1)                             on 1,2,3        After    on 1,2,3
          v3 = attention 1(q: base, k: v2, v: base)   on 1,2,3                 on 3
          v4 = head[1, 0] of v3, logits read at 3     on 1,2,3                 on 3
Attention reads the keys and values of all positions that its queries see, so below it nothing narrows.
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.program import Program
from patchc.optimise.facts import Facts


def apply(program: Program) -> Program:
    schedule = program.schedule
    return program if schedule.backward else replace(program, schedule=replace(schedule, backward=True))


def remark(facts: Facts) -> tuple[bool, str]:
    read = 0
    for end in facts.program.ends:
        read |= end.tokens
    measured, total = read.bit_count(), facts.dag.layout.n_tokens
    if measured == total:
        return False, "every token is measured"
    return True, f"{measured} of {total} tokens are measured; what no measured token reads is not computed"
