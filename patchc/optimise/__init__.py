"""From variant DAGs to programs: a naive program, then the passes of `optimise.passes` one after another."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from patchc.ir.experiment import Experiment, Prompts
from patchc.ir.program import NAIVE, End, Pass, Program
from patchc.ir.verify import program_faults
from patchc.lower import Lowered
from patchc.optimise import reads
from patchc.optimise.passes import PASSES

verifying = False
"""Whether the rules of `ir.verify` are checked after each pass of the optimiser."""


def optimise(
    experiment: Experiment,
    prompts: Prompts,
    lowered: Lowered,
    ends: tuple[End, ...],
    budget: int,
    element: int = 4,
    without: Set[str] = frozenset(),
) -> Program:
    """The program of an experiment: cells that have to run, cut by `budget` bytes; `element` is the bytes of a number;
    `without` names passes of the optimiser to leave out."""
    if unknown := without - {p.name for p in PASSES}:
        raise ValueError(f"no passes {sorted(unknown)}: there are {', '.join(p.name for p in PASSES)}")
    program = replace(naive(experiment, prompts, lowered, ends, budget, element), without=frozenset(without))
    for p in PASSES:
        if p.name not in without:
            program = _checked(p.name, program, p.apply(program))
    return program


def naive(
    experiment: Experiment, prompts: Prompts, lowered: Lowered, ends: tuple[End, ...], budget: int, element: int
) -> Program:
    """The program as it stands before any pass of the optimiser: all cells run together, everything is computed, in the
    order of the results."""
    return Program(
        experiment,
        prompts,
        lowered.dag,
        lowered.roots,
        ends,
        None,
        reads.worlds(experiment, prompts),
        (Pass(tuple(range(len(lowered.roots))), (0,) * len(lowered.dag.graph.blocks), 0),),
        budget,
        element,
        schedule=NAIVE,
    )


def _checked(name: str, before: Program, after: Program) -> Program:
    """What a pass of the optimiser gave, proved sound where that is asked for."""
    if verifying and after is not before:
        found = [f"{fault.rule}: {fault.message}" for fault in program_faults(after)]
        assert not found, f"after {name}: {'; '.join(found)}"
    return after
