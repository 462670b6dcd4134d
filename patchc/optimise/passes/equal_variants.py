"""Gives equal operations on equal variants one number, within a cell and across the cells of a sweep.

Before    v1 = stored head[0, 0] of corrupt             After    v1 = stored head[0, 0] of corrupt
          v2 = mlp[0](v1)                                        v2 = mlp[0](v1)
          v3 = stored head[0, 0] of corrupt                      v3 = v1 + v2
          v4 = mlp[0](v3)                                        two cells, both of v3
          v5 = v1 + v2, v6 = v3 + v4: a cell each
"""

from __future__ import annotations

from patchc.ir.laws import Law
from patchc.ir.program import Program
from patchc.optimise.facts import Facts
from patchc.optimise.rebuild import rebuilt


def apply(program: Program) -> Program:
    return rebuilt(program, Law.EQUAL)


def remark(facts: Facts) -> tuple[bool, str]:
    together, alone = facts.variants, facts.alone
    if together == alone:
        return False, f"no two cells have one of the {together:,} variants in common"
    return True, f"{together:,} variants, where every cell by itself would have {alone:,}"
