"""Runs a program: the plain runs that it needs, then its passes; gives each metric's numbers, cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.execute.base import PlainRun, run_world
from patchc.execute.kept import Found, Kept, NotKept
from patchc.execute.readout import UNEMBED_ROWS, MetricFunction, Readout
from patchc.execute.statistics import Numbers
from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.experiment import Metric
from patchc.ir.program import Pass, Program
from patchc.ir.tokens import Tokens
from patchc.model.pieces import Pieces, Tables

SAME_ENDS = RULES.add("equal-ends", "a normalised metric has the same value at both of its ends", exit=3)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Numbers by metric, float64. `unpatched[metric][world]`: those of the plain runs, as one cell; `ends`: for a
    normalised metric the distance of its two ends; `silent`: cells whose values came out as the base run's own to the
    bit."""

    numbers: dict[str, Numbers]
    unpatched: dict[str, dict[str, Numbers]]
    ends: dict[str, float] = field(default_factory=dict[str, float])
    silent: tuple[int, ...] = ()


@dataclass
class Sweep:
    """One experiment's run. Plain runs are shared with other experiments through `runs`; passes that `kept` has are not
    run again."""

    program: Program
    pieces: Pieces
    tables: Tables
    functions: Mapping[str, MetricFunction] = field(default_factory=dict[str, MetricFunction])
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    runs: dict[str, PlainRun] = field(default_factory=dict[str, PlainRun])
    kept: Kept = field(default_factory=NotKept)

    def run(self, progress: Callable[[int], None] | None = None) -> Outcome:
        """Every cell; `progress` is told how many are done."""
        with torch.no_grad():
            return self._run(progress or (lambda _: None))

    def _run(self, progress: Callable[[int], None]) -> Outcome:
        program = self.program
        self._plain_runs()
        self.stored = Stored(self.pieces, program.prompts, program.base, self.runs, self.tensors)
        self.readout = Readout(
            self.pieces,
            program.prompts,
            program.ends,
            program.columns,
            self.functions,
            self.stored,
            self.tables,
        )
        metrics = program.experiment.metrics
        values = {m.name: self._of_base(m, len(program.roots)) for m in metrics}
        silent: list[int] = []
        done = len(program.no_effect)
        progress(done)
        ends = [(self.readout.at_end(end, program.base), end.tokens) for end in program.ends]
        for number, work in enumerate(program.passes):
            found = self.kept.get(number)
            if found is None:
                found = self._pass(work, ends)
                self.kept.put(number, found)
            silent += found.silent
            for metric in metrics:
                values[metric.name][list(work.cells)] = found.values[metric.name]
            done += len(work.cells)
            progress(done)
        return self._outcome(values, tuple(silent))

    def _pass(self, work: Pass, ends: Sequence[tuple[Tensor, Tokens]]) -> Found:
        walk = Walk(self.program.dag, self.pieces, self.tables, self.stored, schedule=self.program.schedule)
        at_ends = walk.read([self.program.roots[c] for c in work.cells], ends)
        silent = tuple(c for c, unfelt in zip(work.cells, walk.unfelt, strict=True) if unfelt)
        return Found(self._measured(at_ends), silent)

    def _plain_runs(self) -> None:
        for world in self.program.worlds:
            if world not in self.runs:
                data = self.program.prompts.world(world)
                layout = data.layout or self.program.prompts.layout
                tables = self.tables if data.layout is None else self.pieces.tables(layout)
                self.runs[world] = run_world(self.pieces, data, layout, tables)

    def _of_base(self, metric: Metric, n_cells: int) -> Tensor:
        """`[cell, prompt]`, the base run's number everywhere: what a cell without effect keeps."""
        return self._of_world(metric, self.program.base).repeat(n_cells, 1)

    def _measured(self, found: list[Tensor]) -> dict[str, Tensor]:
        """The metrics `[cell, prompt]` of a pass's cells, some at a time, from what they have at each end."""
        step = max(1, UNEMBED_ROWS // max(1, self.program.measured.bit_count()))
        parts: dict[str, list[Tensor]] = {m.name: [] for m in self.program.experiment.metrics}
        for first in range(0, len(found[0]), step):
            read = self.readout.readings([x[first : first + step] for x in found])
            for metric in self.program.experiment.metrics:
                parts[metric.name].append(self.readout.per_prompt(metric.expression, read))
        return {name: torch.cat(some) for name, some in parts.items()}

    def _outcome(self, values: dict[str, Tensor], silent: tuple[int, ...]) -> Outcome:
        metrics = self.program.experiment.metrics
        ends = {m.name: end for m in metrics if (end := self._apart(m)) is not None}
        numbers = {m.name: self.readout.numbers(m, values[m.name]) for m in metrics}
        unpatched = {
            m.name: {w: self.readout.numbers(m, self._of_world(m, w)) for w in self.program.aligned} for m in metrics
        }
        return Outcome(numbers, unpatched, ends, silent)

    def _apart(self, metric: Metric) -> float | None:
        """How far apart the ends of a normalised metric are; of ratios by prompt, the harmonic mean: an error of that
        size in every prompt is 1 in the mean of ratios."""
        ends = self.readout.ends(metric)
        if ends is None:
            return None
        _, apart = ends.scale(metric.per_prompt)
        if bool((apart == 0).any()):
            raise SAME_ENDS.error(
                f"`{metric.name}` cannot be normalised: it has the same value at `{metric.zero}` and at `{metric.one}`",
                span=metric.span,
            )
        return float(1 / (1 / apart.abs()).mean())

    def _of_world(self, metric: Metric, world: str) -> Tensor:
        """`[1, prompt]`, as read."""
        return self.readout.per_prompt(metric.expression, self.readout.of_world(world))
