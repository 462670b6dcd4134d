"""From an experiment to its variant DAG: path sets become an automaton, the automaton is folded over the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchc.diagnostics import RULES, Diagnostic, PatchcError, Span
from patchc.ir.dag import Dag
from patchc.ir.experiment import Experiment, Patch, Prompts
from patchc.ir.graph import ResidualGraph
from patchc.ir.ops import VariantId
from patchc.ir.program import End
from patchc.lower.fold import Fold, Folded

NO_EFFECT = RULES.add("no-effect", "a patch provably changes nothing that is measured")


@dataclass(frozen=True, slots=True)
class Lowered:
    """What each cell's ends read, and the cells in which all that is measured provably equals the base run's."""

    dag: Dag
    roots: tuple[tuple[VariantId, ...], ...]
    no_effect: tuple[int, ...]


def lower(
    experiment: Experiment,
    prompts: Prompts,
    graph: ResidualGraph,
    ends: Sequence[End],
    progress: Callable[[int], None] | None = None,
) -> Lowered:
    """Fold every cell into one DAG. A patch that bites in no cell is an error, and so is an experiment of one cell that
    changes nothing that is measured; a sweep's cells that change nothing are counted."""
    dag = Dag(graph, prompts.layout)
    fold = Fold(dag, prompts, experiment.run)
    probes = [end.probe for end in ends]
    roots: list[tuple[VariantId, ...]] = []
    dead: list[int] = []
    written: dict[Span | int, bool] = {}
    faults: list[Diagnostic] = []
    for number, cell in enumerate(experiment.cells):
        folded = fold.cell(cell.patches, probes)
        roots.append(folded.roots)
        if not any(dag.changed[root] & end.tokens for root, end in zip(folded.roots, ends, strict=True)):
            dead.append(number)
        _note_bites(written, cell.patches, folded)
        faults += [f for f in folded.faults if f not in faults]
        if progress is not None and number % 256 == 0:
            progress(number)
    faults += _unfelt(experiment, written, len(dead) == len(roots))
    if faults:
        raise PatchcError(faults)
    return Lowered(dag, tuple(roots), tuple(dead))


def _note_bites(written: dict[Span | int, bool], patches: tuple[Patch, ...], folded: Folded) -> None:
    """Which `patch` lines have changed something so far; a line without a place is known by its number in the cell."""
    for i, patch in enumerate(patches):
        line = patch.span or i
        written[line] = written.get(line, False) or i in folded.biting


def _unfelt(experiment: Experiment, written: dict[Span | int, bool], all_dead: bool) -> list[Diagnostic]:
    """Lines that change nothing anywhere, or the first line where nothing that is measured changes."""
    where = " in any cell" if experiment.dims else ""
    out = [
        NO_EFFECT.at(
            line if isinstance(line, Span) else experiment.span,
            f"this patch changes nothing{where}: its value enters nowhere, or equals the run's own wherever it enters",
            fix=f"the run is `{experiment.run}`; patch with another world, and where the worlds differ",
        )
        for line, bites in written.items()
        if not bites
    ]
    if all_dead and not out:
        out.append(
            NO_EFFECT.at(
                next((line for line in written if isinstance(line, Span)), experiment.span),
                "what this patches cannot reach the position that is measured",
                fix="attention only looks back: measure at a later position, or patch an earlier one",
            )
        )
    return out
