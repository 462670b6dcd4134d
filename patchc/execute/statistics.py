"""From a number a prompt to what is reported: normalised, the mean, its standard error, a bootstrap interval. Float64.

What a metric reads of a run is `readout`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchc.ir.experiment import Interval, Metric

CELLS = 4096
"""Cells whose draws are held at once."""


@dataclass(frozen=True, slots=True)
class Ends:
    """A metric in the two worlds between which it is normalised, `[prompt]` each."""

    zero: Tensor
    one: Tensor

    def scale(self, per_prompt: bool) -> tuple[Tensor, Tensor]:
        """What is 0, and how far from it 1 is: of each prompt, or of the means."""
        zero, one = (self.zero, self.one) if per_prompt else (self.zero.mean(), self.one.mean())
        return zero, one - zero


@dataclass(frozen=True, slots=True)
class Numbers:
    """A metric over cells. `per_prompt` `[cell, prompt]` is normalised where the metric is, so that its mean over
    prompts is `mean` `[cell]`. `stderr`: the standard error of that mean, NaN where there is none to tell; the ends of
    a ratio of means count as known numbers in it. `low`, `high`: the interval's ends, where one is asked for."""

    per_prompt: Tensor
    mean: Tensor
    stderr: Tensor
    low: Tensor | None = None
    high: Tensor | None = None


def numbers(metric: Metric, values: Tensor, ends: Ends | None, together: bool = False) -> Numbers:
    """Of `values` `[cell, prompt]`, as they were read. `together`: they are one number for all prompts, said `prompt`
    times, whose error is not known."""
    normal = normalised(metric, values, ends)
    # A ratio of means is taken of the means themselves: 0 and 1 at its ends, not nearly.
    mean = normal.mean(-1) if metric.per_prompt else normalised(metric, values.mean(-1), ends)
    n = values.shape[-1]
    unknown = n < 2 or together
    stderr = torch.full_like(normal[:, 0], float("nan")) if unknown else normal.std(-1) / n**0.5
    if metric.interval is None or unknown:
        return Numbers(normal, mean, stderr)
    low, high = bootstrap(metric.interval, values, ends, metric.per_prompt)
    return Numbers(normal, mean, stderr, low, high)


def normalised(metric: Metric, values: Tensor, ends: Ends | None) -> Tensor:
    """`[cell, prompt]`, or of means `[cell]`: 0 at one end, 1 at the other, where the metric has ends."""
    if ends is None:
        return values
    zero, apart = ends.scale(metric.per_prompt)
    return (values - zero) / apart


def bootstrap(interval: Interval, values: Tensor, ends: Ends | None, per_prompt: bool) -> tuple[Tensor, Tensor]:
    """The ends of the interval, `[cell]`: percentiles of the metric over prompts drawn with replacement (Efron 1979).

    A ratio of means is computed anew in each draw; a draw in which its ends are equal has no number and is left out.
    Every cell has the same draws, so that intervals of cells may be compared.
    """
    n = values.shape[-1]
    drawn = np.random.default_rng(interval.seed).integers(n, size=(interval.resamples, n))
    weights = torch.zeros(interval.resamples, n, dtype=torch.float64)
    weights.scatter_add_(1, torch.from_numpy(drawn), torch.ones_like(weights))
    weights = (weights / n).T
    if ends is not None and per_prompt:
        values, ends = (values - ends.zero) / (ends.one - ends.zero), None
    zero, apart = torch.zeros(()), torch.ones(())
    if ends is not None:
        zero, apart = ends.zero @ weights, (ends.one - ends.zero) @ weights
    tails = torch.tensor([(1 - interval.level) / 2, (1 + interval.level) / 2], dtype=torch.float64)
    parts = []
    for some in values.split(CELLS):
        draws = (some @ weights - zero) / apart
        parts.append(torch.nanquantile(torch.where(draws.isfinite(), draws, torch.nan), tails, dim=-1))
    low, high = torch.cat(parts, -1)
    return low, high
