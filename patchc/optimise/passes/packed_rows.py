"""Packs rows of many variants, cells and positions into one matrix product: a few rows alone run at a fraction of the
machine's speed.

Before    v2 = mlp[0](v1), v4 = mlp[0](v3): a product each        After    one product of the rows of both
More than some 960 rows only cost memory. A product of another shape may take another kernel, which rounds otherwise.
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.program import FULL, Program
from patchc.optimise.facts import Facts, counted


def apply(program: Program) -> Program:
    schedule = program.schedule
    return program if schedule.rows else replace(program, schedule=replace(schedule, rows=FULL.rows))


def remark(facts: Facts) -> tuple[bool, str]:
    most = facts.program.schedule.rows
    products = sum(-(-n // most) for work in facts.program.passes for n in work.rows)
    if products >= facts.blocks:
        return False, "no two cells have rows in one block"
    return True, (
        f"{counted(facts.rows, 'token row')} in batches of up to {most}, about {products:,};"
        f" a cell by itself has {facts.rows / max(1, facts.blocks):.1f} a block"
    )
