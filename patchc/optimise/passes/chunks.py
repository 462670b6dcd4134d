"""Cuts the cells into passes (`ir.program.Pass`) that keep matrix products full within the budget, in their order.

Before    one pass of cells 0, 1, 2, 3        After    a pass of cells 0, 1, 2 and one of cell 3
What cells of different passes share is computed once in each.
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.program import Program
from patchc.optimise.cut import cut, plain_runs_bytes
from patchc.optimise.facts import Facts, counted


def apply(program: Program) -> Program:
    return replace(program, passes=cut(program))


def _size(n: int) -> str:
    if n < 2**20:
        return f"{n:,} bytes"
    return f"{n / 2**30:.3g} GiB" if n >= 2**28 else f"{n / 2**20:.3g} MiB"


def remark(facts: Facts) -> tuple[bool, str]:
    budget, passes = facts.program.budget, facts.program.passes
    size, plain = _size(budget), plain_runs_bytes(facts.program)
    if plain > budget:
        return len(passes) > 1, f"the worlds' own runs alone hold {_size(plain)}, more than {size}: use fewer prompts"
    if len(passes) <= 1:
        return False, "one pass holds all cells"
    over = sum(work.bytes + plain > budget for work in passes)
    alone = f"; {counted(over, 'cell')} alone may hold more" if over else ""
    return (
        True,
        f"the cells are cut into {len(passes):,} passes, of rows enough for full products, within {size}{alone}",
    )
