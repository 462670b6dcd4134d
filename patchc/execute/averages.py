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

    def __call__(self, values: Tensor) -> Tensor:
        """The mean at every token of the study, of `values` `[token of the world, ...]`; 0 where nothing counts."""
        sums, counts = (
            self.sums(values),
            torch.bincount(torch.tensor(self.into, device=values.device), minlength=self.n),
        )
        counts = counts.clamp_min(1).to(values.dtype).view(-1, *[1] * (values.dim() - 1))
        return (sums / counts)[torch.tensor(self.of, device=values.device)]

    def sums(self, values: Tensor) -> Tensor:
        """What counts in each class, added up, `[class, ...]`, of `values` `[token of the world, ...]`."""
        at, into = (torch.tensor(x, device=values.device, dtype=torch.long) for x in (self.counted, self.into))
        out = torch.zeros(self.n, *values.shape[1:], device=values.device, dtype=values.dtype)
        return out.index_add(0, into, values if len(at) == len(values) else values[at])


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
