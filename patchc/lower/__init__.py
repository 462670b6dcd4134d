"""From an experiment to its variant DAG: path sets become an automaton, the automaton is folded over the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchc.diagnostics import Diagnostic, PatchcError, Span
from patchc.ir.dag import Dag
from patchc.ir.experiment import Experiment, Patch, Prompts
from patchc.ir.graph import ResidualGraph
from patchc.ir.laws import ALL_LAWS, Law
from patchc.ir.ops import VariantId
from patchc.ir.program import End
from patchc.lower.fold import Fold, Folded
from patchc.lower.unfelt import Unfelt


@dataclass(frozen=True, slots=True)
class Lowered:
    """What each cell's ends read."""

    dag: Dag
    roots: tuple[tuple[VariantId, ...], ...]


def lower(
    experiment: Experiment,
    prompts: Prompts,
    graph: ResidualGraph,
    ends: Sequence[End],
    progress: Callable[[int], None] | None = None,
    laws: Law = ALL_LAWS,
) -> Lowered:
    """Fold every cell into one DAG, which keeps `laws`. A patch that bites in no cell is an error, and so is an
    experiment of which no cell changes anything that is measured: under fewer laws that does not show."""
    dag = Dag(graph, prompts.layout, laws)
    fold = Fold(dag, prompts, experiment.run)
    probes = [end.probe for end in ends]
    roots: list[tuple[VariantId, ...]] = []
    felt = False
    written: dict[Span | int, bool] = {}
    faults: list[Diagnostic] = []
    for number, cell in enumerate(experiment.cells):
        folded = fold.cell(cell.patches, probes)
        roots.append(folded.roots)
        felt = felt or any(dag.changed[root] & end.tokens for root, end in zip(folded.roots, ends, strict=True))
        _note_bites(written, cell.patches, folded)
        faults += [f for f in folded.faults if f not in faults]
        if progress is not None and number % 256 == 0:
            progress(number)
    unfelt = [line for line, bites in written.items() if not bites]
    if laws == ALL_LAWS and (unfelt or not felt):
        faults += Unfelt(experiment, prompts, graph, ends).faults(unfelt)
    if faults:
        raise PatchcError(faults)
    return Lowered(dag, tuple(roots))


def _note_bites(written: dict[Span | int, bool], patches: tuple[Patch, ...], folded: Folded) -> None:
    """Which `patch` lines have changed something so far; a line without a place is known by its number in the cell."""
    for i, patch in enumerate(patches):
        line = patch.span or i
        written[line] = written.get(line, False) or i in folded.biting
