"""All cells of an experiment as one variant DAG whose starts are multiplied by masks, one a cell.

With one mask 1 and the others 0 it is that cell; with all 0, the base run. The derivative at 0 is the cell's
first-order effect (attribution patching; for edges, edge attribution patching, Syed et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from patchc.diagnostics import RULES
from patchc.ir.dag import Dag
from patchc.ir.experiment import Experiment, Patch, Probe, Prompts
from patchc.ir.graph import ResidualGraph
from patchc.ir.ops import VariantId
from patchc.lower.fold import Fold

TOO_LARGE = RULES.add("graph-too-large", "an experiment has too many cells for one compiled graph")

MAX_CELLS = 2000
"""Cells of one graph: each has a mask of its own, and every start stands in the code."""


@dataclass(frozen=True, slots=True)
class MaskedCells:
    """`root`: the final stream; `probes`: what is read at each. Masks are numbered as the experiment's results
    are, row by row; `starts` names what each acts on where they are not an experiment's cells."""

    dag: Dag
    root: VariantId
    shape: tuple[int, ...]
    prompts: Prompts
    probes: tuple[tuple[Probe, VariantId], ...] = ()
    starts: tuple[str, ...] = ()


def lower_masked(
    experiment: Experiment, prompts: Prompts, graph: ResidualGraph, probes: tuple[Probe, ...] = ()
) -> MaskedCells:
    """Fold the union of all cells: up to the logits, and up to each probe."""
    if len(experiment.cells) > MAX_CELLS:
        raise TOO_LARGE.error(
            f"`{experiment.name}` has {len(experiment.cells):,} cells; a compiled graph holds at most {MAX_CELLS:,}",
            fix="narrow the sweep; `run` has no such limit",
            span=experiment.span,
        )
    patches: list[Patch] = []
    masks: list[int] = []
    for cell in experiment.cells:
        patches += cell.patches
        masks += [_flat(cell.index, experiment.shape)] * len(cell.patches)
    dag = Dag(graph, prompts.layout)
    fold = Fold(dag, prompts, experiment.run, masked=lambda start: masks[start.patch])
    root, *read = fold.cell(tuple(patches), (None, *probes)).roots
    return MaskedCells(dag, root, experiment.shape, prompts, tuple(zip(probes, read, strict=True)))


def _flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    out = 0
    for i, n in zip(index, shape, strict=True):
        out = out * n + i
    return out
