"""Holds compiled results against the hooks backend: which cells, what counts as equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from patchc.diagnostics import RULES
from patchc.execute.hooks import Oracle
from patchc.execute.sweep import Outcome
from patchc.ir.experiment import Experiment, Prompts
from patchc.ir.graph import ResidualGraph

CHECK_FAILED = RULES.add("check-failed", "a compiled number differs from the hooks backend's", exit=3)

SAMPLE = 16
"""Cells that `--check` recomputes of each experiment."""
TOLERANCE = 1e-4
"""Largest difference that counts as equal, in the metric's own unit before it is normalised (logits, nats, ...), for
models in float32 or better."""
HALF_ROUNDINGS = 32
"""In half precision two orders of one sum differ by a few roundings of numbers as large as the metric's largest: as
many roundings count as equal."""


@dataclass(frozen=True, slots=True)
class Compared:
    """How a check came out. `largest_effect` is the largest difference of a checked cell from the base run, in the same
    unit: beside it the largest difference says something."""

    cells: int
    max_abs_diff: float
    tolerance: float
    largest_effect: float
    passes: int


def sample(outcome: Outcome, n_cells: int, count: int | None) -> list[int]:
    """The cells to recompute: all where `count` is None, else the strongest and others, evenly spread."""
    if count is None or count >= n_cells:
        return list(range(n_cells))
    first = next(iter(outcome.numbers.values())).mean
    strongest = int((first - first.median()).abs().argmax())
    others = [i for i in range(n_cells) if i != strongest]
    spread = [others[i * (len(others) - 1) // max(1, count - 2)] for i in range(count - 1)]
    return sorted([strongest, *spread])


def check(
    experiment: Experiment,
    outcome: Outcome,
    eager: nn.Module,
    graph: ResidualGraph,
    prompts: Prompts,
    tensors: Mapping[str, Tensor],
    metrics: Mapping[str, Callable[[Tensor], Tensor]],
    count: int | None = SAMPLE,
    progress: Callable[[int], None] | None = None,
) -> Compared:
    """Recompute cells with hooks. Raises `check-failed` where a number differs by more than the tolerance."""
    numbers = sample(outcome, len(experiment.cells), count)
    oracle = Oracle(eager, graph, prompts, tensors=tensors, metrics=metrics)
    by_prompt = oracle.measure(experiment, [experiment.cells[i] for i in numbers], progress)
    hooked = {name: x.mean(1) for name, x in by_prompt.items()}
    worst, effect, tolerance = 0.0, 0.0, TOLERANCE
    for metric in experiment.metrics:
        unit = outcome.ends.get(metric.name, 1.0)  # differences are compared before they are divided
        compiled = outcome.numbers[metric.name].mean[numbers]
        gap = (compiled - hooked[metric.name]).abs() * unit
        base = float(outcome.unpatched[metric.name][experiment.run].mean)
        effect = max(effect, float((hooked[metric.name] - base).abs().max()) * unit)
        allowed = _tolerance(eager, float(hooked[metric.name].abs().max()) * unit)
        if not bool((gap <= allowed).all()):
            cell = int(gap.nan_to_num(nan=float("inf")).argmax())
            raise CHECK_FAILED.error(
                f"`{metric.name}` of `{experiment.name}` is {float(compiled[cell]):.6g} compiled and "
                f"{float(hooked[metric.name][cell]):.6g} with hooks in cell {_named(experiment, numbers[cell])}; "
                f"{allowed:.2g} is allowed",
                span=metric.span or experiment.span,
            )
        worst, tolerance = max(worst, float(gap.max())), max(tolerance, allowed)
    return Compared(len(numbers), worst, tolerance, effect, oracle.passes)


def _tolerance(eager: nn.Module, largest: float) -> float:
    dtype = next(eager.parameters()).dtype
    half = dtype in (torch.bfloat16, torch.float16)
    return max(TOLERANCE, HALF_ROUNDINGS * torch.finfo(dtype).eps * largest) if half else TOLERANCE


def _named(experiment: Experiment, number: int) -> str:
    index = experiment.cells[number].index
    return ", ".join(f"{d.name}={d.coords[i]}" for d, i in zip(experiment.dims, index, strict=True)) or "0"
