"""What a mean is taken over: which tokens count, in which class each counts, and whose mean each token has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.ir.experiment import Mean, Prompts


@dataclass(frozen=True, slots=True)
class Average:
    """`counted`: tokens of the world's layout, `into`: the class in which each counts; `of`: for each token of the
    study the class whose mean it has. Classes are numbered from 0 to `n` - 1."""

    counted: tuple[int, ...]
    into: tuple[int, ...]
    of: tuple[int, ...]
    n: int

    def with_token(self, token: int) -> list[int]:
        """The tokens of the world over which the mean at a token of the study is taken."""
        return [t for t, c in zip(self.counted, self.into, strict=True) if c == self.of[token]]

    def __call__(self, values: Tensor) -> Tensor:
        """The mean at every token of the study, of `values` `[token of the world, ...]`."""
        at, into, of = (torch.tensor(x, device=values.device) for x in (self.counted, self.into, self.of))
        sums = torch.zeros(self.n, *values.shape[1:], device=values.device, dtype=values.dtype)
        sums = sums.index_add(0, into, values if len(at) == len(values) else values[at])
        counts = torch.bincount(into, minlength=self.n).to(values.dtype)
        return (sums / counts.view(-1, *[1] * (values.dim() - 1)))[of]


def average(mean: Mean, prompts: Prompts) -> Average:
    """How `mean` is taken on these prompts."""
    if prompts.world(mean.world).layout is not None:
        return _of_other_data(mean, prompts)
    classes = list(_classes(mean, prompts))
    counted = [t for t, (_, counts) in enumerate(classes) if counts]
    numbers = {key: i for i, key in enumerate(dict.fromkeys(classes[t][0] for t in counted))}
    of = tuple(numbers[key] for key, _ in classes)
    return Average(tuple(counted), tuple(of[t] for t in counted), of, len(numbers))


def _classes(mean: Mean, prompts: Prompts) -> Iterator[tuple[tuple[int, ...], bool]]:
    """For each token: what it has in common with those whose mean it takes, and whether it counts itself. Copies are
    averaged among themselves, so that what one answer's tokens are does not change another's numbers."""
    for row, (own, length) in enumerate(zip(prompts.own_lengths, prompts.layout.lengths, strict=True)):
        group = (row // prompts.n, mean.groups[row] if mean.groups is not None else 0)
        for position in range(length):
            follows = position >= own
            if mean.over_positions:
                yield group, not follows
            else:
                yield (*group, int(follows), position - own if follows else position), True


def _of_other_data(mean: Mean, prompts: Prompts) -> Average:
    """Over the rows of other data that have the position."""
    layout = prompts.world(mean.world).layout
    assert layout is not None
    theirs, ours = (
        [0 if mean.over_positions else x.place(t)[1] for t in range(x.n_tokens)] for x in (layout, prompts.layout)
    )
    return Average(tuple(range(layout.n_tokens)), tuple(theirs), tuple(ours), 1 + max([*theirs, *ours], default=0))
