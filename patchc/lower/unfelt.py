"""Why a patch changes nothing that is measured: another patch hides it, the worlds are equal where its value enters,
or no path leads on from it.

Asked only where that is certain already: cells are folded again, each patch alone, and as if the worlds differed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from patchc.diagnostics import RULES, Diagnostic, Note, Span
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import Cell, Experiment, FromWorld, Patch, Prompts
from patchc.ir.graph import ResidualGraph
from patchc.ir.program import End
from patchc.lower.changes import differing, relative
from patchc.lower.fold import Fold

NO_EFFECT = RULES.add("no-effect", "a patch provably changes nothing that is measured")

CELLS = 64
"""How many of a sweep's cells are asked for the reason."""
TOO_LATE = "attention only looks back: measure at a later position, or patch an earlier one"


class Unfelt:
    """The reasons in one experiment."""

    def __init__(self, experiment: Experiment, prompts: Prompts, graph: ResidualGraph, ends: Sequence[End]):
        self._experiment, self._prompts, self._graph, self._ends = experiment, prompts, graph, ends
        self._probes = [end.probe for end in ends]

    def faults(self, lines: Sequence[Span | int]) -> list[Diagnostic]:
        """What is wrong with each line that bites nowhere; without such a line, with an experiment in which nothing
        that is measured changes."""
        return [self._line(line) for line in lines] or [self._nothing()]

    def _line(self, line: Span | int) -> Diagnostic:
        span = line if isinstance(line, Span) else self._experiment.span
        what = f"this patch changes nothing{' in any cell' if self._experiment.dims else ''}"
        found = list(self._cells(line))
        patches = [patch for patch, _ in found]
        if self._bites(patches):
            notes = [Note("this one takes the place of what it changes", p.span) for p in self._hiding(found)]
            message = f"{what}: another patch, nearer to what is measured, hides it"
            return NO_EFFECT.at(span, message, notes=notes, fix="remove one of them, or patch other positions")
        if self._bites(patches, any_data=True):
            told, position = self._worlds(patches)
            fix = f"patch at position {position}, or at a later one" if position >= 0 else "patch with another world"
            return NO_EFFECT.at(span, f"{what}: where its value enters, {told}", fix=fix)
        run = self._experiment.run
        if all(relative(patch.value, run)[0].world == run for patch in patches):
            fix = f"the run is `{run}`; patch with another world"
            return NO_EFFECT.at(span, f"{what}: its value is what the run itself has there", fix=fix)
        return NO_EFFECT.at(span, f"{what}: its value enters nowhere from where it can reach what is measured")

    def _nothing(self) -> Diagnostic:
        """Every patch bites, and nothing that is measured changes."""
        cells = self._experiment.cells[:CELLS]
        patches = [patch for cell in cells for patch in cell.patches]
        span = next((patch.span for patch in patches if patch.span), self._experiment.span)
        if any(map(self._would_change, cells)):
            told, position = self._worlds(patches)
            message = f"what this patches changes nothing that is measured: at every position that matters, {told}"
            fix = "patch, or measure, where the worlds differ" if position >= 0 else "patch with another world"
            return NO_EFFECT.at(span, message, fix=fix)
        return NO_EFFECT.at(span, "what this patches cannot reach the position that is measured", fix=TOO_LATE)

    # ---- folding again

    def _cells(self, line: Span | int) -> Iterator[tuple[Patch, Cell]]:
        """The patch that a line is in each cell, with the cell."""
        for cell in self._experiment.cells[:CELLS]:
            yield from ((patch, cell) for i, patch in enumerate(cell.patches) if (patch.span or i) == line)

    def _fold(self, any_data: bool = False) -> Fold:
        dag = Dag(self._graph, self._prompts.layout)
        return Fold(dag, self._prompts, self._experiment.run, any_data=any_data)

    def _bites(self, patches: Sequence[Patch], any_data: bool = False) -> bool:
        """Whether one of these changes something where it is the only one."""
        fold = self._fold(any_data)
        return any(fold.cell((patch,), self._probes).biting for patch in patches)

    def _hiding(self, found: Sequence[tuple[Patch, Cell]]) -> list[Patch]:
        """The patches beside which the line changes nothing: one of each line."""
        fold = self._fold()
        out: dict[Span | None, Patch] = {}
        for patch, cell in found:
            for other in cell.patches:
                if other is not patch and 0 not in fold.cell((patch, other), self._probes).biting:
                    out.setdefault(other.span, other)
        return list(out.values())

    def _would_change(self, cell: Cell) -> bool:
        """Whether what is measured could change if the worlds differed everywhere."""
        fold = self._fold(any_data=True)
        roots = fold.cell(cell.patches, self._probes).roots
        return any(fold.dag.changed[root] & end.tokens for root, end in zip(roots, self._ends, strict=True))

    # ---- worlds

    def _worlds(self, patches: Sequence[Patch]) -> tuple[str, int]:
        """Which worlds are equal, and the first position at which they differ (-1: none)."""
        run, layout = self._experiment.run, self._prompts.layout
        terms = [source for patch in patches for _, source in patch.value.terms]
        worlds = sorted({source.world for source in terms if isinstance(source, FromWorld)} - {run})
        named = f"`{'`, `'.join([run, *worlds[:-1]])}` and `{worlds[-1]}` are equal"
        differ = [layout.place(t) for world in worlds for t in bits(differing(self._prompts, run, world))]
        if not differ:
            return f"{named}, as they are everywhere", -1
        position, prompt = min((position, prompt % self._prompts.n) for prompt, position in differ)
        return f"{named}; they first differ at position {position}" + self._in_prompt(prompt), position

    def _in_prompt(self, prompt: int) -> str:
        return f" of prompt {prompt}" if self._prompts.n > 1 else ""
