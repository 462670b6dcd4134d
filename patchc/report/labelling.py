"""From a run's numbers, a row a cell, to a result with the experiment's dims. The only part of the report that reads
tensors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from patchc.execute.statistics import Numbers
from patchc.execute.sweep import Outcome
from patchc.ir.experiment import Experiment, PromptDim
from patchc.ir.program import Program
from patchc.report.results import Array, Result


def labelled(program: Program, outcome: Outcome, per_prompt: bool = False) -> Result:
    """The result of a program's run; `per_prompt` adds a last dim over prompts where the spec has none."""
    experiment, n = program.experiment, program.prompts.n
    prompts = experiment.by_prompt
    if prompts is None and per_prompt:
        prompts = PromptDim(len(experiment.dims), "prompt", tuple(range(n)))
    table, numbers = _Table(experiment, prompts), outcome.numbers
    means = {} if prompts is not None else numbers
    return Result(
        experiment=experiment,
        values={m: table.values(x) for m, x in numbers.items()},
        stderr={m: table.errors(x) for m, x in numbers.items()},
        n=n if prompts is None else 1,
        baselines={m: {w: float(x.mean) for w, x in worlds.items()} for m, worlds in outcome.unpatched.items()},
        passes=program.n_passes,
        unfused_passes=len(program.roots),
        no_effect=len(program.no_effect) + len(outcome.silent),
        low={m: table.shaped(x.low) for m, x in means.items() if x.low is not None},
        high={m: table.shaped(x.high) for m, x in means.items() if x.high is not None},
        prompts=prompts,
        own_baselines={m: worlds[experiment.run].per_prompt[0].numpy() for m, worlds in outcome.unpatched.items()},
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """Rows of cells to arrays along the dims, NaN where there is no cell."""

    experiment: Experiment
    prompts: PromptDim | None

    def values(self, numbers: Numbers) -> Array:
        return self.shaped(numbers.mean) if self.prompts is None else self._each(numbers.per_prompt, self.prompts)

    def errors(self, numbers: Numbers) -> Array:
        """The standard errors; of single prompts there are none."""
        if self.prompts is None:
            return self.shaped(numbers.stderr)
        return np.full_like(self._each(numbers.per_prompt, self.prompts), np.nan)

    def shaped(self, values: Tensor) -> Array:
        """`[cell]` to `[*dims]`."""
        out = np.full(self.experiment.shape, np.nan)
        for cell, value in zip(self.experiment.cells, values.tolist(), strict=True):
            out[cell.index] = value
        return out

    def _each(self, values: Tensor, dim: PromptDim) -> Array:
        """`[cell, prompt]` to `[*dims]`, that over prompts at its place."""
        return np.stack([self.shaped(values[:, i]) for i in dim.prompts], dim.axis)
