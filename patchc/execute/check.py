"""Holds compiled results against the hooks backend: which cells, what counts as equal.

How far rounding may move a metric is `oracle_rounding`'s matter; where that does not settle a cell, or the model is in
half precision, hooks run once more in a wider type, and a compiled number must be about as near to that as hooks are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.execute.hooks import Measured, Oracle
from patchc.execute.sweep import Outcome
from patchc.free_memory import free_memory
from patchc.ir.check import Check
from patchc.ir.experiment import Experiment, Metric, Prompts
from patchc.ir.graph import ResidualGraph

CHECK_FAILED = RULES.add("check-failed", "a compiled number differs from the hooks backend's", exit=3)

SAMPLE = 16
"""Cells that `--check` recomputes of each experiment."""
TOLERANCE = 1e-4
"""Largest difference that counts as equal without asking a wider type, in the metric's own unit before it is
normalised (logits, nats, ...)."""
OF_EFFECT = 1e-3
"""The same as a part of what the cell changes: a small effect has to be right too."""
ROUNDINGS = 8
"""And the least: so many roundings of the largest number that a metric reads."""
UNASKED_ROUNDINGS = 32
"""As many where no wider type can be asked, TOLERANCE being the most in single precision."""
RATIO = 4
"""How many times the hooks' own error a compiled number may be off, beyond one rounding."""
ASKED = 4
"""Of so many cells at least a wider type is asked, where it has to be: one alone does not say what error is usual."""
TINY = torch.finfo(torch.float64).tiny

WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class Numbers:
    """One metric of the checked cells, `[cell]`, float64: as compiled, and by hooks in the model's own type (None where
    they cannot be run) or a wider one, with the metric's `unit`: what a normalised metric was divided by."""

    metric: Metric
    compiled: Tensor
    hooked: Measured
    own: Measured | None
    unit: float

    @property
    def off(self) -> Tensor:
        """By how much the compiled numbers are off."""
        return (self.compiled - self.hooked.values.mean(1)).abs() * self.unit

    @property
    def own_off(self) -> Tensor | None:
        """The same of hooks in the model's own type: the mean over prompts, so that no two errors make none."""
        return None if self.own is None else (self.own.values - self.hooked.values).abs().mean(1) * self.unit

    @property
    def rounding(self) -> Tensor:
        """What one rounding of what is read does."""
        return self.hooked.rounding.mean(1)

    def effects(self, base: float) -> Tensor:
        """What the cells change."""
        return (self.hooked.values.mean(1) - base).abs() * self.unit


@dataclass
class Checker:
    """Checks experiments on the same model and data. Copies of the model are made when first needed, and go with this;
    `eager` itself is not run."""

    eager: nn.Module
    graph: ResidualGraph
    prompts: Prompts
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    metrics: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict[str, Callable[[Tensor], Tensor]])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.eager.parameters()).dtype

    @cached_property
    def own(self) -> Oracle:
        """Hooks in the model's own type."""
        return Oracle(self.eager, self.graph, self.prompts, tensors=self.tensors, metrics=self.metrics)

    @cached_property
    def wider(self) -> Oracle | None:
        """Hooks in a wider type; None where there is none, or no room for such a copy."""
        dtype = WIDER.get(self.dtype)
        if dtype is None or not _has_room(self.eager, dtype):
            return None
        return Oracle(self.eager, self.graph, self.prompts, tensors=self.tensors, metrics=self.metrics, dtype=dtype)

    def check(
        self,
        experiment: Experiment,
        outcome: Outcome,
        count: int | None = SAMPLE,
        progress: Callable[[int], None] | None = None,
    ) -> Check:
        """Recompute `count` cells with hooks, all where it is None. Raises `check-failed` where a number differs by
        more than what is allowed it."""
        cells = sample(outcome, len(experiment.cells), count)
        check = _Check(self, experiment, outcome, cells, progress or (lambda _: None))
        return check.half() if self.dtype in (torch.bfloat16, torch.float16) else check.single()


@dataclass(frozen=True, slots=True)
class Judged:
    """By how much each cell of a metric is off, and what is allowed it, `[cell]`."""

    numbers: Numbers
    off: Tensor
    allowed: Tensor

    @property
    def share(self) -> Tensor:
        """Which part of what is allowed is used up; infinite where there is no number."""
        return (self.off / self.allowed.clamp_min(TINY)).nan_to_num(nan=torch.inf)

    @property
    def unsettled(self) -> Tensor:
        return ~(self.off <= self.allowed)  # also where there is no number


@dataclass
class _Check:
    """One experiment's check."""

    checker: Checker
    experiment: Experiment
    outcome: Outcome
    cells: list[int]
    progress: Callable[[int], None]

    # ---- by the type of the model's numbers
    def single(self) -> Check:
        """Single precision and better: hooks in the same type, and where that settles nothing in double."""
        oracle, eps = self.checker.own, torch.finfo(torch.float32).eps  # wider models have parts in single precision
        hooked = self._hooked(oracle, self.cells, eps, self.progress)
        judged = [self._at_once(self._numbers(m, self.cells, hooked, None)) for m in self.experiment.metrics]
        passes = oracle.passes
        if any(bool(j.unsettled.any()) for j in judged):
            wider = self.checker.wider
            judged = [_unasked(j) for j in judged] if wider is None else self._asked(wider, hooked, judged)
            passes += 0 if wider is None else wider.passes
        return self._settled(judged, passes)

    def _at_once(self, numbers: Numbers) -> Judged:
        """By what rounding may do, and by what each cell changes."""
        effects = numbers.effects(self._base(numbers.metric))
        allowed = torch.maximum(OF_EFFECT * effects, ROUNDINGS * numbers.rounding).clamp_max(TOLERANCE)
        return Judged(numbers, numbers.off, allowed)

    def _asked(self, wider: Oracle, hooked: Mapping[str, Measured], judged: list[Judged]) -> list[Judged]:
        """The unsettled cells judged by their error against hooks in a wider type; a few others tell what is usual."""
        worst = torch.stack([j.share for j in judged]).amax(0).argsort(descending=True)
        unsettled = int(torch.stack([j.unsettled for j in judged]).any(0).sum())
        asked = worst[: max(ASKED, unsettled)].tolist()
        cells = [self.cells[i] for i in asked]
        exact = self._hooked(wider, cells, torch.finfo(torch.float32).eps, lambda _: None)
        own = {name: Measured(m.values[asked], m.rounding[asked]) for name, m in hooked.items()}
        out: list[Judged] = []
        for before in judged:
            numbers = self._numbers(before.numbers.metric, cells, exact, own)
            off, allowed, open_ = before.off.clone(), before.allowed.clone(), before.unsettled[asked]
            at = torch.tensor(asked)[open_]
            off[at], allowed[at] = numbers.off[open_], _by_hooks(numbers)[open_]
            out.append(Judged(before.numbers, off, allowed))
        return out

    def half(self) -> Check:
        """Half precision: hooks in single precision, with which both sides are compared."""
        checker, eps = self.checker, torch.finfo(self.checker.dtype).eps
        own, wider = self._own_half(eps), checker.wider
        if wider is None:
            hooked = own or self._hooked(checker.own, self.cells, eps, self.progress)
            own = None
        else:
            hooked = self._hooked(wider, self.cells, eps, self.progress)
        judged: list[Judged] = []
        for metric in self.experiment.metrics:
            numbers = self._numbers(metric, self.cells, hooked, own)
            allowed = UNASKED_ROUNDINGS * numbers.rounding if own is None else _by_hooks(numbers)
            judged.append(Judged(numbers, numbers.off, allowed))
        return self._settled(judged, (wider or checker.own).passes, None if wider is None else WIDER[checker.dtype])

    def _own_half(self, eps: float) -> dict[str, Measured] | None:
        """By hooks in half precision, where torch and the hooks can."""
        try:
            return self._hooked(self.checker.own, self.cells, eps, lambda _: None)
        except (PatchcError, RuntimeError):
            return None

    # ---- parts
    def _hooked(
        self, oracle: Oracle, cells: list[int], eps: float, progress: Callable[[int], None]
    ) -> dict[str, Measured]:
        return oracle.measured(self.experiment, [self.experiment.cells[i] for i in cells], eps, progress)

    def _numbers(
        self, metric: Metric, cells: list[int], hooked: Mapping[str, Measured], own: Mapping[str, Measured] | None
    ) -> Numbers:
        compiled = self.outcome.numbers[metric.name].mean[cells]
        unit = self.outcome.ends.get(metric.name, 1.0)
        return Numbers(metric, compiled, hooked[metric.name], None if own is None else own[metric.name], unit)

    def _base(self, metric: Metric) -> float:
        return float(self.outcome.unpatched[metric.name][self.experiment.run].mean)

    def _settled(self, judged: list[Judged], passes: int, reference: torch.dtype | None = None) -> Check:
        """The result; raises where a cell is off by more than what is allowed it."""
        for j in judged:
            if bool(j.unsettled.any()):
                raise self._failed(j, int(j.share.argmax()))
        owns = [float(x.max()) for j in judged if (x := j.numbers.own_off) is not None]
        return Check(
            len(self.cells),
            max(float(j.off.max()) for j in judged),
            max(float(j.allowed.max()) for j in judged),
            max(float(j.numbers.effects(self._base(j.numbers.metric)).max()) for j in judged),
            max(float(j.share.max()) for j in judged),
            None if reference is None else str(reference).removeprefix("torch."),
            max(owns) if owns else None,
            passes,
        )

    def _failed(self, judged: Judged, cell: int) -> PatchcError:
        numbers = judged.numbers
        hooked, allowed = float(numbers.hooked.values.mean(1)[cell]), float(judged.allowed[cell]) / numbers.unit
        return CHECK_FAILED.error(
            f"`{numbers.metric.name}` of `{self.experiment.name}` is {float(numbers.compiled[cell]):.6g} compiled and "
            f"{hooked:.6g} with hooks in cell {self._named(self.cells[cell])}; {allowed:.2g} is allowed",
            span=numbers.metric.span or self.experiment.span,
        )

    def _named(self, number: int) -> str:
        index, dims = self.experiment.cells[number].index, self.experiment.dims
        return ", ".join(f"{d.name}={d.coords[i]}" for d, i in zip(dims, index, strict=True)) or "0"


def _unasked(judged: Judged) -> Judged:
    """Where no wider type can be asked: more roundings count as equal, up to the usual bound."""
    more = (UNASKED_ROUNDINGS * judged.numbers.rounding).clamp_max(TOLERANCE)
    return replace(judged, allowed=torch.maximum(judged.allowed, more))


def _by_hooks(numbers: Numbers) -> Tensor:
    """What is allowed each cell by the error of the hooks themselves, in that cell or in the middle one, whichever is
    larger: by chance one cell's may be next to none. Errors of different cells are compared in roundings."""
    error = numbers.own_off
    assert error is not None
    error, rounding = error.where(error.isfinite(), torch.zeros_like(error)), numbers.rounding
    typical = (error / rounding.clamp_min(TINY))[rounding > 0].nanmedian() if bool((rounding > 0).any()) else 0.0
    return rounding + RATIO * torch.maximum(error, rounding * typical)


def sample(outcome: Outcome, n_cells: int, count: int | None) -> list[int]:
    """The cells to recompute: all where `count` is None, else the strongest and others, evenly spread."""
    if count is None or count >= n_cells:
        return list(range(n_cells))
    first = next(iter(outcome.numbers.values())).mean
    strongest = int((first - first.median()).abs().argmax())
    others = [i for i in range(n_cells) if i != strongest]
    spread = [others[i * (len(others) - 1) // max(1, count - 2)] for i in range(count - 1)]
    return sorted([strongest, *spread])


def _has_room(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether a copy of the model in `dtype` fits beside what is there, made by way of a copy in its own."""
    parameter = next(model.parameters())
    size = sum(p.numel() for p in model.parameters()) * (dtype.itemsize + parameter.element_size())
    return size <= free_memory(parameter.device)
