"""Drops the cells that provably equal the base run wherever they are measured: they get its numbers.

Before    cells 0, 1, 2, 3: a direct path from each position        After    cell 3
                                                                             cells 0, 1, 2 are without effect
Position 0 is the same in both worlds, and only position 3 is measured. Entries of a pattern above the diagonal are
others.
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.program import Program
from patchc.optimise.facts import Facts, counted


def apply(program: Program) -> Program:
    live = [c for c in program.live if _changes_what_is_measured(program, c)]
    if len(live) == len(program.live):
        return program
    kept = set(live)
    passes = tuple(replace(work, cells=tuple(c for c in work.cells if c in kept)) for work in program.passes)
    dead = tuple(sorted({*program.no_effect, *program.live} - kept))
    return replace(program, passes=tuple(work for work in passes if work.cells), no_effect=dead)


def _changes_what_is_measured(program: Program, cell: int) -> bool:
    changed = program.dag.changed
    return any(changed[root] & end.tokens for root, end in zip(program.roots[cell], program.ends, strict=True))


def remark(facts: Facts) -> tuple[bool, str]:
    dead, cells = len(facts.program.no_effect), counted(len(facts.program.roots), "cell")
    if not dead:
        return False, "every cell can change what is measured"
    return True, f"{dead:,} of {cells} provably equal the unpatched run and are not run"
