"""The optimiser's passes in their order, each in the file of its name. The order is a list on one page: read it here.

How a compiled graph writes its masks, dense or sparse, is no pass of programs: `codegen` decides it by cost.
"""

from __future__ import annotations

from collections.abc import Set

from patchc.ir.laws import ALL_LAWS, Law
from patchc.ir.program import Program
from patchc.optimise.contract import Exactness, OptimiserPass, Remark
from patchc.optimise.facts import Facts
from patchc.optimise.passes import (
    answer_columns,
    backward_positions,
    cells_without_effect,
    chunks,
    equal_to_base,
    equal_variants,
    forward_positions,
    head_deltas,
    heads,
    late_entry,
    packed_rows,
    shared_streams,
)

BITWISE, CLOSE = Exactness.BITWISE, Exactness.CLOSE

PASSES: tuple[OptimiserPass, ...] = (
    OptimiserPass("equal variants", equal_variants.apply, equal_variants.remark, CLOSE, Law.EQUAL),
    OptimiserPass("equal to base", equal_to_base.apply, equal_to_base.remark, CLOSE, Law.BASE),
    # After equal variants: a sum is shared where its parts have the same numbers.
    OptimiserPass("shared streams", shared_streams.apply, shared_streams.remark, CLOSE, Law.STREAMS),
    OptimiserPass("forward positions", forward_positions.apply, forward_positions.remark, CLOSE, Law.FORWARD),
    OptimiserPass("backward positions", backward_positions.apply, backward_positions.remark, CLOSE),
    OptimiserPass("answer columns", answer_columns.apply, answer_columns.remark, CLOSE),
    OptimiserPass("head deltas", head_deltas.apply, head_deltas.remark, CLOSE),
    # After forward positions, which show what a cell can change; before anything is done with cells.
    OptimiserPass("cells without effect", cells_without_effect.apply, cells_without_effect.remark, CLOSE),
    OptimiserPass("heads", heads.apply, heads.remark, BITWISE),
    OptimiserPass("packed rows", packed_rows.apply, packed_rows.remark, BITWISE),
    OptimiserPass("late entry", late_entry.apply, late_entry.remark, CLOSE),
    OptimiserPass("chunks", chunks.apply, chunks.remark, CLOSE),
)


def remarks(program: Program) -> tuple[Remark, ...]:
    """What each of the optimiser's passes did for a program, in their order."""
    facts = Facts(program)
    return tuple(
        Remark(p.name, False, "left out") if p.name in program.without else Remark(p.name, *p.remark(facts))
        for p in PASSES
    )


def laws_without(names: Set[str]) -> Law:
    """The laws under which a DAG is lowered for an optimiser without these passes."""
    out = ALL_LAWS
    for p in PASSES:
        if p.name in names:
            out &= ~p.law
    return out
