"""Takes a head's output from the base run and adds what a patch changes of it, where that needs no attention.

Before    v1 = attention 1(q: base, k: base, v: base)          After    z of the base run, and (new - own rows of the
          with pattern of heads 0 = corrupt, computed                   pattern that are set) times the values
z is linear in the pattern. On changed q, k or v attention is computed anew.
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.graph import BlockKind
from patchc.ir.ops import Const, Core
from patchc.ir.program import Program
from patchc.optimise.facts import Facts, counted


def apply(program: Program) -> Program:
    schedule = program.schedule
    return program if schedule.deltas else replace(program, schedule=replace(schedule, deltas=True))


def remark(facts: Facts) -> tuple[bool, str]:
    blocks = facts.dag.graph.blocks
    stored = cores = plain = 0
    for _, op in facts.asked():
        stored += isinstance(op, Const) and blocks[op.block].kind is BlockKind.ATTENTION
        cores += isinstance(op, Core)
        plain += isinstance(op, Core) and op.is_base(0, 1, 2)
    found = [f"{counted(stored, 'stored output')} of heads" if stored else ""]
    found.append(f"{counted(plain, 'variant')} with scores or patterns set on unpatched q, k and v" if plain else "")
    if stored or plain:
        return True, f"no attention for {' and '.join(filter(None, found))}"
    if cores:
        return False, f"attention is computed on changed q, k or v for {counted(cores, 'variant')}"
    return False, "no head is patched"
