"""Gives equal operations on equal variants one number, within a cell and across the cells of a sweep.

Before    v1 = stored head[0, 1] of corrupt                   After    v1 = stored head[0, 1] of corrupt
          v2 = mlp[0](v1)                                              v2 = mlp[0](v1)
          v3 = attention 1(q: v2, k: base, v: base)                    v3 = attention 1(q: v2, k: base, v: base)
          v4 = head[1, 0] of v3                                        v4 = head[1, 0] of v3
          v5 = stored head[0, 1] of corrupt                            v5 = head[1, 1] of v3
          v6 = mlp[0](v5)
          v7 = attention 1(q: v6, k: base, v: base)
          v8 = head[1, 1] of v7
One core serves both receivers: which of its heads are computed is demand's matter. Sums may be taken in another order.
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
