"""From cells to TransformerLens' tensors: metrics called as it calls them, one number a cell, or one a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchc import pipeline
from patchc.diagnostics import PatchcError
from patchc.execute.read_logits import NotHeld
from patchc.execute.readout import METRIC_READS, METRIC_SHAPE
from patchc.execute.sweep import Outcome
from patchc.free_memory import default_budget
from patchc.given import known_reads
from patchc.ir.experiment import Called, Cell, Dim, Experiment, Metric, Patch
from patchc.lower.unfelt import NO_EFFECT
from patchc.transformer_lens.errors import SweepError, failure
from patchc.transformer_lens.runs import CORRUPTED, Runs

MetricFn = Callable[[Tensor], Any]
EVEN_WITHOUT_EFFECT = frozenset({"equal variants"})
"""The pass without which no cell has to change anything: there is nothing to share then."""


@dataclass
class Metrics:
    """The metrics of a sweep; what one of them raises is raised as it is."""

    functions: Mapping[str, MetricFn]
    n_batch: int
    per_example: bool
    any_shape: bool = False
    """Whether one number may come in any shape."""
    raised: list[Exception] = field(default_factory=list[Exception])
    _leaves: dict[str, Called] = field(default_factory=dict[str, Called])

    def leaf(self, name: str, runs: Runs) -> Called:
        """A metric with the logits that it reads, where that can be told."""
        if name not in self._leaves:
            self._leaves[name] = known_reads(name, self.functions[name], runs.prompts, runs.model.loaded)
        return self._leaves[name]

    def read_all(self) -> None:
        """Give every metric all logits from here on."""
        self._leaves = {name: Called(name) for name in self.functions}

    def given(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """As a program calls them, by name."""
        return {name: self._called(name, function) for name, function in self.functions.items()}

    def _called(self, name: str, function: MetricFn) -> Callable[[Tensor], Tensor]:
        def call(logits: Tensor) -> Tensor:
            try:
                return self._checked(name, torch.as_tensor(function(logits)).detach())
            except NotHeld:
                raise
            except Exception as error:
                self.raised.append(error)
                raise

        return call

    def _checked(self, name: str, out: Tensor) -> Tensor:
        wanted = (self.n_batch,) if self.per_example else ()
        if out.shape == wanted or (self.any_shape and out.numel() == 1):
            return out
        message = f"patching_metric {name!r} gave shape {list(out.shape)}"
        if self.per_example:
            raise failure(SweepError, METRIC_SHAPE, f"{message}; it must return one number a prompt, {list(wanted)}")
        fix = "pass `reduce='mean'` or `reduce='none'` where it returns one number a prompt"
        raise failure(SweepError, METRIC_SHAPE, f"{message}; it must return a scalar", fix)


@dataclass
class Found:
    """The metrics' numbers `[metric, cell]`, or `[metric, cell, batch]`; `baseline` those of the corrupted run."""

    values: Tensor
    baseline: Tensor


def measured(
    runs: Runs,
    cells: Sequence[tuple[Patch, ...]],
    tensors: Mapping[str, Tensor],
    metrics: Metrics,
    progress: Callable[[int], None] | None = None,
) -> Found:
    """Every cell's numbers, in torch's default dtype on the model's device."""
    try:
        outcome = _outcome(runs, _experiment(runs, cells, metrics), tensors, metrics, progress)
    except PatchcError as error:
        if any(d.code != METRIC_READS.code for d in error.diagnostics):
            raise
        metrics.read_all()
        outcome = _outcome(runs, _experiment(runs, cells, metrics), tensors, metrics, progress)
    keep: Any = slice(None) if metrics.per_example else 0
    names = list(metrics.functions)
    values = torch.stack([outcome.numbers[name].per_prompt[:, keep] for name in names])
    baseline = torch.stack([outcome.unpatched[name][CORRUPTED].per_prompt[0][keep] for name in names])
    device, dtype = runs.pieces.device, torch.get_default_dtype()
    return Found(values.to(device, dtype), baseline.to(device, dtype))


def _experiment(runs: Runs, cells: Sequence[tuple[Patch, ...]], metrics: Metrics) -> Experiment:
    return Experiment(
        "sweep",
        None,
        CORRUPTED,
        (Dim("cell", tuple(range(len(cells)))),),
        tuple(Cell((i,), patches) for i, patches in enumerate(cells)),
        tuple(Metric(name, metrics.leaf(name, runs)) for name in metrics.functions),
    )


def _outcome(
    runs: Runs,
    experiment: Experiment,
    tensors: Mapping[str, Tensor],
    metrics: Metrics,
    progress: Callable[[int], None] | None,
) -> Outcome:
    loaded, budget = runs.model.loaded, default_budget(runs.pieces.device)
    with pipeline.without_collection():
        try:
            program = pipeline.to_program(experiment, runs.prompts, loaded, budget)
        except PatchcError as error:
            if any(d.code != NO_EFFECT.code for d in error.diagnostics):
                raise
            program = pipeline.to_program(experiment, runs.prompts, loaded, budget, EVEN_WITHOUT_EFFECT)
    given = pipeline.Given(tensors=tensors, metrics=metrics.given())
    try:
        return pipeline.execute(program, loaded, given, runs.runs, progress)
    except PatchcError:
        if metrics.raised:
            raise metrics.raised[0] from None
        raise


def joined(parts: Iterable[Found]) -> Found:
    """The numbers of several groups of cells, one after another."""
    some = list(parts)
    return some[0] if len(some) == 1 else Found(torch.cat([f.values for f in some], 1), some[0].baseline)
