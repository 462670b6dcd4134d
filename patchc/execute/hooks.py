"""The hooks backend: recomputes a cell from its definition, by hooked forward passes of the plain model.

Slow on purpose, and sharing nothing with the compiler but `ir`: a number that both give was found twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchc.execute.hook_points import At, Point
from patchc.execute.hook_proof import driver_for
from patchc.execute.oracle_cells import CellRun
from patchc.execute.oracle_metrics import Metrics, Run
from patchc.execute.oracle_passes import Passes
from patchc.execute.oracle_rounding import Rounding
from patchc.execute.oracle_worlds import Worlds
from patchc.ir.experiment import Cell, Experiment, Probe, Prompts
from patchc.ir.graph import ResidualGraph


@dataclass(frozen=True, slots=True)
class Measured:
    """A metric of some cells, `[cell, prompt]`, float64. `values` are normalised where the metric is; `rounding`, in
    the metric's own unit, is what they may change by where what is read of a run is off by one rounding."""

    values: Tensor
    rounding: Tensor


class Oracle:
    """Recomputes cells of experiments on `prompts`.

    `eager` is copied, and neither run nor hooked; the copy computes in `dtype`, where one is given. `tensors` and
    `metrics` are those that `Given` and `Called` name. `driver`: `transformer_lens`, `forward_hooks`, or `auto`, which
    takes the first that can hook the model.
    """

    def __init__(
        self,
        eager: nn.Module,
        graph: ResidualGraph,
        prompts: Prompts,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        driver: str = "auto",
        dtype: torch.dtype | None = None,
    ):
        self.graph, self.prompts = graph, prompts
        device = next(eager.parameters()).device
        self._passes = Passes(driver_for(eager, graph, driver, dtype), prompts, device)
        self._worlds = Worlds(self._passes, graph, tensors or {})
        self._metrics = Metrics(prompts, self._world, tensors or {}, metrics or {})

    @property
    def passes(self) -> int:
        """Hooked forward passes made so far."""
        return self._passes.count

    def logits(self, experiment: Experiment, cell: Cell) -> list[Tensor]:
        """The patched run's logits, `[pos, d_vocab]` a row of the layout."""
        logits = CellRun(self._worlds, experiment.run, cell).logits
        return list(logits.split(self.prompts.layout.lengths))

    def read(self, experiment: Experiment, cell: Cell, probe: Probe) -> Tensor:
        """What stands at a probe in the patched run, `[token, width]`; of attention: one entry a position."""
        return CellRun(self._worlds, experiment.run, cell).read(probe).clone()

    def measure(
        self,
        experiment: Experiment,
        cells: Sequence[Cell],
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, Tensor]:
        """Every metric of the experiment, `[cell, prompt]`, float64, normalised where the metric is: the mean over
        prompts is the metric's number.

        A number that is not finite is given as it is. `progress` hears how many cells are done.
        """
        return {name: m.values for name, m in self.measured(experiment, cells, 0.0, progress).items()}

    @torch.no_grad()
    def measured(
        self,
        experiment: Experiment,
        cells: Sequence[Cell],
        eps: float,
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, Measured]:
        """The same, and what roundings of relative size `eps` may do to it."""
        rounding = Rounding(self._metrics, eps)
        values: dict[str, list[Tensor]] = {metric.name: [] for metric in experiment.metrics}
        errors: dict[str, list[Tensor]] = {metric.name: [] for metric in experiment.metrics}
        for done, cell in enumerate(cells, start=1):
            run = CellRun(self._worlds, experiment.run, cell)
            for metric in experiment.metrics:
                values[metric.name].append(self._metrics.numbers(metric, run))
                if eps:
                    errors[metric.name].append(rounding.of(metric, run))
            if progress is not None:
                progress(done)
        return {name: Measured(self._table(values[name]), self._table(errors[name])) for name in values}

    def _table(self, rows: list[Tensor]) -> Tensor:
        return torch.stack(rows) if rows else torch.zeros(0, self.prompts.n, dtype=torch.float64)

    def _world(self, world: str) -> Run:
        return WorldRun(self._worlds, world)


class WorldRun:
    """A world's own run, as metrics read it."""

    def __init__(self, worlds: Worlds, world: str):
        self._worlds, self._record = worlds, worlds.record(world)

    @property
    def logits(self) -> Tensor:
        """`[token, d_vocab]`."""
        return self._record[Point(At.LOGITS)]

    def read(self, probe: Probe) -> Tensor:
        """What stands at a probe, `[token, width]`."""
        return self._worlds.probed(self._record, probe)


__all__ = ["Measured", "Oracle"]
