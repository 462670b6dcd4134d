"""All cells of an experiment as one variant DAG whose starts are multiplied by masks, one a cell.

With one mask 1 and the others 0 it is that cell; with all 0, the base run. The derivative at 0 is the cell's
first-order effect (attribution patching; for edges, edge attribution patching, Syed et al. 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

from patchc.diagnostics import RULES
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import Experiment, Probe, Prompts
from patchc.ir.graph import Reader, ResidualGraph
from patchc.ir.ops import VariantId
from patchc.lower.changes import Changes
from patchc.lower.edge_cells import EdgeMasks, edge_masks, reads_as
from patchc.lower.edge_run import EdgeRun, Starts, Writer
from patchc.lower.fold import Fold

TOO_LARGE = RULES.add("graph-too-large", "an experiment has too many cells for one compiled graph")

MAX_CELLS = 2000
"""Cells of one graph that are folded: each has a mask of its own, and its starts stand in the code."""
FOLDED = 100
"""Cells that are folded whatever they patch: the code of a few is shorter so."""


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
    """The union of all cells, up to the logits and up to each probe: built edge by edge where they are many and patch
    edges alone, else folded."""
    numbers = [_flat(cell.index, experiment.shape) for cell in experiment.cells]
    dag = Dag(graph, prompts.layout)
    if len(numbers) > FOLDED and not probes and (masks := edge_masks(experiment, numbers, graph)) is not None:
        return MaskedCells(dag, _on_edges(dag, experiment, prompts, masks), experiment.shape, prompts)
    if len(numbers) > MAX_CELLS:
        raise TOO_LARGE.error(
            f"`{experiment.name}` has {len(numbers):,} cells; a compiled graph holds at most {MAX_CELLS:,} "
            "that are not edges",
            fix="narrow the sweep; `run` has no such limit",
            span=experiment.span,
        )
    patches = tuple(patch for cell in experiment.cells for patch in cell.patches)
    masks = [number for number, cell in zip(numbers, experiment.cells, strict=True) for _ in cell.patches]
    fold = Fold(dag, prompts, experiment.run, masked=lambda start: masks[start.patch])
    root, *read = fold.cell(patches, (None, *probes)).roots
    return MaskedCells(dag, root, experiment.shape, prompts, tuple(zip(probes, read, strict=True)))


def _on_edges(dag: Dag, experiment: Experiment, prompts: Prompts, masks: EdgeMasks) -> VariantId:
    """The final stream."""

    def starts(writer: Writer, reader: Reader | None) -> Starts:
        assert reader is not None
        return masks.get((next(bits(writer.nodes)), *reads_as(reader)), ())

    changes = Changes(dag, prompts, experiment.run, any_data=True)
    return EdgeRun(dag, changes, experiment.run, starts).edges()


def _flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    out = 0
    for i, n in zip(index, shape, strict=True):
        out = out * n + i
    return out
