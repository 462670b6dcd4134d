"""What a patch's value is, as a tensor: worlds, means, other tokens' values, noise, given tensors, and sums of these.

For the hooks backend. Where a site stands in a run is `oracle_worlds`' matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.execute.noise import token_noise
from patchc.execute.oracle_passes import Record
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Prompts, Source, Value
from patchc.ir.tokens import Layout

TENSOR_SHAPE = RULES.add("hooks-tensor", "a tensor that a patch names is not there, or has not the width of its site")


@dataclass(frozen=True, slots=True)
class Change:
    """Where `where` (bool, `[token]` or `[token, width]`): `constant + scale * what is there`; elsewhere what is
    there."""

    where: Tensor
    constant: Tensor
    scale: float = 0.0

    def __call__(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        where, constant = (self.where, self.constant) if rows is None else (self.where[rows], self.constant[rows])
        new = constant + self.scale * x if self.scale else constant
        return torch.where(where.view(*where.shape, *[1] * (x.dim() - where.dim())), new, x)

    @property
    def forgets(self) -> bool:
        """Nothing of what was there is left."""
        return not self.scale and bool(self.where.all())


@dataclass(frozen=True, slots=True)
class Place:
    """A site of the model: its name, where it stands in a run, `[token, width]`, and whether its rows are attention's,
    each as long as its prompt."""

    name: str
    read: Callable[[Record], Tensor]
    entries: bool = False


@dataclass(frozen=True)
class Values:
    """Values at a place. `record` gives a world's run; `run` is the world that noise takes its measure from."""

    prompts: Prompts
    record: Callable[[str], Record]
    tensors: Mapping[str, Tensor]

    def change(self, value: Value, where: Tensor, place: Place, run: str) -> Change:
        """A value where `where` says, at a place."""
        scale = sum(c for c, source in value.terms if isinstance(source, Itself))
        own = place.read(self.record(run))
        constant = torch.zeros_like(own)
        for c, source in value.terms:
            if not isinstance(source, Itself):
                constant = constant + c * self._source(source, place, own, where)
        return Change(where, constant, scale)

    def _source(self, source: Source, place: Place, own: Tensor, where: Tensor) -> Tensor:
        match source:
            case FromWorld(world):
                return place.read(self.record(world))
            case Mean():
                return self._mean(source, place)
            case Moved(inner, tokens):
                return self._source(inner, place, own, where)[list(tokens)]
            case Given(key):
                return self._given(key, own, where)
            case Noise():
                return self._noise(source, place, own)
            case Blocked():
                return torch.full_like(own, -torch.inf)
            case Itself():
                raise AssertionError("what is there is no constant")

    def _given(self, key: str, own: Tensor, where: Tensor) -> Tensor:
        if key not in self.tensors:
            raise TENSOR_SHAPE.error(f"no tensor {key!r} was given; there are: {', '.join(self.tensors) or 'none'}")
        x = self.tensors[key].to(own)
        one_neuron = where.dim() > 1 and int(where.any(0).sum()) == 1 and x.shape[-1:] == (1,)
        is_rows = x.dim() == own.dim() and len(x) == len(own)
        if x.shape[1 if is_rows else 0 :] != own.shape[1:] and not one_neuron:
            wanted = f"{list(own.shape[1:])}, or {list(own.shape)}"
            raise TENSOR_SHAPE.error(f"tensor {key!r} has shape {list(x.shape)}; here it must be {wanted}")
        return x.expand_as(own)

    # ---- means
    def _mean(self, mean: Mean, place: Place) -> Tensor:
        """For each token of the study's layout the mean over the tokens that it counts among, `[token, width]`."""
        world = self.prompts.world(mean.world)
        if world.layout is None:
            counted, asked = self._among(mean)
        else:  # Other data: whole prompts, which know neither answers nor groups.
            layouts = world.layout, self.prompts.layout
            counted, asked = ([(0 if mean.over_positions else p,) for _, p in _places(layout)] for layout in layouts)
        return _mean_by(place.read(self.record(mean.world)), counted, asked)

    def _among(self, mean: Mean) -> tuple[list[Key | None], list[Key]]:
        """Of each token: which mean it counts in (None: in none), and which mean is its."""
        counted: list[Key | None] = []
        asked: list[Key] = []
        for row, position in _places(self.prompts.layout):
            own = self.prompts.own_lengths[row]
            group = (row // self.prompts.n, mean.groups[row] if mean.groups else 0)
            answer = position >= own
            among = () if mean.over_positions else (answer, position - own if answer else position)
            asked.append((*group, *among))
            counted.append(None if mean.over_positions and answer else asked[-1])
        return counted, asked

    # ---- noise
    def _noise(self, noise: Noise, place: Place, own: Tensor) -> Tensor:
        numbers = token_noise(noise, place.name, self.prompts, 0 if place.entries else own.shape[1])
        numbers = np.pad(numbers, ((0, 0), (0, own.shape[1] - numbers.shape[1])))
        std = noise.std * (float(own[self._counted].double().std(correction=0)) if noise.relative else 1.0)
        return torch.from_numpy(std * numbers).to(own)

    @cached_property
    def _counted(self) -> Tensor:
        """The prompts' own tokens, each prompt once: what a site's own numbers are measured over, `[token]`, bool."""
        prompts = self.prompts
        return torch.tensor([row < prompts.n and p < prompts.own_lengths[row] for row, p in _places(prompts.layout)])


Key = tuple[int, ...]
"""Names a mean: what counts in it has the same numbers."""


def _places(layout: Layout) -> list[tuple[int, int]]:
    """Row and position of every token."""
    return [layout.place(token) for token in range(layout.n_tokens)]


def _mean_by(x: Tensor, counted: Sequence[Key | None], asked: Sequence[Key]) -> Tensor:
    """For each of `asked` the mean of the rows of `x` that are `counted` under that key. Scores that the mask hides
    count nowhere; where there is nothing to count the mean is hidden too."""
    number = {key: i for i, key in enumerate(dict.fromkeys(asked))}
    rows = [(i, number[key]) for i, key in enumerate(counted) if key is not None and key in number]
    source, target = torch.tensor(rows, device=x.device).unbind(1)
    shown = x[source] > -torch.inf
    zeros = x.new_zeros(len(number), *x.shape[1:])
    total = zeros.index_add(0, target, torch.where(shown, x[source], 0.0))
    count = zeros.index_add(0, target, shown.to(x.dtype))
    mean = torch.where(count > 0, total / count, -torch.inf)
    return mean[[number[key] for key in asked]]
