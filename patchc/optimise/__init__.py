"""From variant DAGs to programs: what is demanded, which columns are read, which cells run together."""

from __future__ import annotations

from patchc.ir.experiment import Experiment, Prompts
from patchc.ir.program import End, Program
from patchc.lower import Lowered
from patchc.optimise import reads
from patchc.optimise.cut import cut


def optimise(
    experiment: Experiment,
    prompts: Prompts,
    lowered: Lowered,
    ends: tuple[End, ...],
    budget: int,
    element: int = 4,
) -> Program:
    """The program of an experiment: cells that need a pass, cut by `budget` bytes; `element` is the bytes of a
    number."""
    dead = set(lowered.no_effect)
    live = [c for c in range(len(lowered.roots)) if c not in dead]
    return Program(
        experiment,
        prompts,
        lowered.dag,
        lowered.roots,
        ends,
        reads.columns(experiment.metrics),
        reads.worlds(experiment, prompts),
        cut(lowered.dag, lowered.roots, [end.tokens for end in ends], live, budget, element),
        lowered.no_effect,
    )
