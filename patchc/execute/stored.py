"""Values that patches put in place, as differences from the base run: mixtures of worlds, means, other tokens' values,
given tensors and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchc.execute.averages import Average, average
from patchc.execute.base import PlainRun
from patchc.execute.indices import rows
from patchc.execute.noise import token_noise
from patchc.execute.places import Place, node_place, port_place, stream_place, written_places
from patchc.ir.bits import bits
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Prompts, Source, Value
from patchc.ir.graph import BlockKind
from patchc.ir.paths import Site
from patchc.ir.tokens import Layout
from patchc.model.pieces import Pieces

Field = Callable[[PlainRun], Tensor]
"""Reads one site of a run at every token: `[token, ...]`."""

RowMean = tuple[int, int, int, Mean]
"""A mean of rows of attention scores or patterns: block, head, port and mean."""

KEPT = 64
"""Tables of noise that are kept for the next variant."""


@dataclass
class Stored:
    """The runs of an experiment. `base` names the base world."""

    pieces: Pieces
    prompts: Prompts
    base: str
    runs: Mapping[str, PlainRun]
    tensors: Mapping[str, Tensor]
    row_means: dict[RowMean, Tensor] = field(default_factory=dict[RowMean, Tensor])
    """Means of attention scores and patterns, `[class, longest prompt]`."""
    _averages: dict[Mean, Average] = field(default_factory=dict[Mean, Average])
    _noise: dict[tuple[Noise, str], Tensor] = field(default_factory=dict[tuple[Noise, str], Tensor])

    @property
    def layout(self) -> Layout:
        return self.prompts.layout

    @property
    def base_run(self) -> PlainRun:
        return self.runs[self.base]

    # ---- by what they replace
    def node(self, block: int, members: int, value: Value, at: Tensor, site: Site = Site.OUT) -> Tensor:
        """What members of a block write under `value`, less what they write in the base run: `[n, d_model]`. `site`
        tells apart where a tensor or noise enters: at each member's output, at each head's z, or at their sum."""
        kind, layer = self.pieces.graph.blocks[block].kind, self.pieces.graph.blocks[block].layer
        normed = site is Site.ATTN_OUT and self.pieces.graph.blocks[block].post_norm
        if kind is not BlockKind.ATTENTION or normed:
            linear, beside = _parted(value)
            places = written_places(self.pieces, block, members, site)
            out = self._difference(linear, at, lambda run: torch.stack([p.read(run) for p in places]).sum(0))
            return self._with(out, beside, places, at)
        assert layer is not None
        return self._heads(block, layer, members, value, at, site)

    def stream(self, rank: int, value: Value, at: Tensor, block: int = -1) -> Tensor:
        """The stream below `rank` under `value`, less the base run's: `[n, d_model]`. Noise is that of the MLP of
        `block`, if one is given: it alone reads this."""
        place = stream_place(self.pieces, rank) if block < 0 else self._first(block, Site.IN)
        return self.replaced(place, value, at, None) - place.read(self.base_run)[at]

    def projection(self, block: int, port: int, head: int, value: Value, at: Tensor, computed: Tensor) -> Tensor:
        """A head's q, k or v (before rotary) under `value`; `computed` is what the run itself has there: `[n,
        d_head]`."""
        node = self.pieces.graph.nodes[self.pieces.graph.blocks[block].first + head]
        return self.replaced(port_place(self.pieces, node, port), value, at, computed)

    def z(self, block: int, head: int, value: Value, at: Tensor) -> Tensor:
        """A head's output before W_O under `value`, less the base run's: `[n, d_head]`."""
        place = node_place(self.pieces, self.pieces.graph.nodes[self.pieces.graph.blocks[block].first + head], Site.Z)
        return self.replaced(place, value, at, None) - place.read(self.base_run)[at]

    def _first(self, block: int, site: Site) -> Place:
        """A site of a block's first node."""
        return node_place(self.pieces, self.pieces.graph.nodes[self.pieces.graph.blocks[block].first], site)

    def replaced(self, place: Place, value: Value, at: Tensor, computed: Tensor | None) -> Tensor:
        """What stands at a place under `value`, `[n, width]`; `computed` is what the run itself has there."""
        out = torch.zeros(len(at), place.width, device=self.pieces.device, dtype=self.pieces.dtype)
        linear, beside = _parted(value)
        for factor, source in linear.terms:
            if isinstance(source, Itself):
                assert computed is not None
                out = out + factor * computed
            else:
                out = out + factor * self._source(source, at, place.read)
        return self._with(out, beside, [place], at)

    def neurons(self, block: int, value: Value, at: Tensor, computed: Tensor) -> Tensor:
        """All neurons of an MLP under `value`; `computed` is what the run itself has there: `[n, d_mlp]`."""
        place = self._first(block, Site.POST)
        return self.replaced(replace(place, read=lambda run: self.post(run, block)), value, at, computed)

    def post(self, run: PlainRun, block: int) -> Tensor:
        """The neurons of an MLP in a run, `[token, d_mlp]`: computed when first asked for, kept till `forget`."""
        if block not in run.post:
            layer, rank = self.pieces.graph.blocks[block].layer, self.pieces.graph.blocks[block].rank
            assert layer is not None
            run.post[block] = self.pieces.mlp_post(layer, run.stream[rank])
        return run.post[block]

    def forget(self, block: int) -> None:
        """Drop what was computed of a block's inside."""
        for run in self.runs.values():
            run.post.pop(block, None)

    def _heads(self, block: int, layer: int, members: int, value: Value, at: Tensor, site: Site) -> Tensor:
        n_heads = self.pieces.graph.n_heads
        heads = list(bits(members & ((1 << n_heads) - 1)))
        linear, beside = _parted(value)
        places = written_places(self.pieces, block, members, site) if beside.terms else []
        out = torch.zeros(len(at), self.pieces.graph.d_model, device=self.pieces.device, dtype=self.pieces.dtype)
        if heads:
            z = self._difference(linear, at, lambda run: run.attention[block].z[:, heads])
            if site is Site.Z and places:
                z = torch.stack([self._with(z[:, i], beside, [place], at) for i, place in enumerate(places)], 1)
            out = self.pieces.write(layer, z, heads)
        bias = self.pieces.attn_bias(layer)
        if members >> n_heads and bias is not None:
            out = out + (sum(factor for factor, _ in linear.terms) - 1.0) * bias
        return out if site is Site.Z else self._with(out, beside, places, at)

    # ---- by where they come from
    def _difference(self, value: Value, at: Tensor, read: Field) -> Tensor:
        out = -read(self.base_run)[at]
        for factor, source in value.terms:
            out = out + factor * self._source(source, at, read)
        return out

    def _with(self, x: Tensor, beside: Value, places: Sequence[Place], at: Tensor) -> Tensor:
        """`x` and, for each place, its tensors and noise."""
        for factor, source in beside.terms:
            for place in places:
                here = self._noise_at(source, place, at) if isinstance(source, Noise) else self.given(source, at)
                x = x + factor * here
        return x

    def _source(self, source: Source, at: Tensor, read: Field) -> Tensor:
        match source:
            case FromWorld(world):
                return read(self.runs[world])[at]
            case Mean():
                return self._mean(source, read)[at]
            case Moved(inner, tokens):
                return self._source(inner, torch.tensor(tokens, device=at.device)[at], read)
            case Itself() | Given() | Noise() | Blocked():
                raise AssertionError(f"{source} is no number of a run")

    def given(self, source: Source, at: Tensor) -> Tensor:
        """A tensor at some tokens, `[n, width]`, or `[width]` where it is the same at all."""
        assert isinstance(source, Given)
        tensor = self.tensors[source.key]
        return tensor if tensor.dim() == 1 else tensor[at]

    def average(self, mean: Mean) -> Average:
        """How a mean is taken on this study's prompts."""
        if mean not in self._averages:
            self._averages[mean] = average(mean, self.prompts)
        return self._averages[mean]

    def _mean(self, mean: Mean, read: Field) -> Tensor:
        return self.average(mean)(read(self.runs[mean.world]))

    def _noise_at(self, noise: Noise, place: Place, at: Tensor) -> Tensor:
        key = (noise, place.name)
        if key not in self._noise:
            if len(self._noise) >= KEPT:
                self._noise.clear()
            numbers = torch.from_numpy(token_noise(noise, place.name, self.prompts, place.width)) * noise.std
            if noise.relative:
                numbers *= self._spread(place)
            self._noise[key] = numbers.to(self.pieces.device, self.pieces.dtype)
        return self._noise[key][at]

    def _spread(self, place: Place) -> float:
        """The standard deviation of a site's numbers in the base run."""
        own = place.read(self.base_run)[rows(self.prompts.alone, self.pieces.device)]
        return float(own.double().std(correction=0))


def _parted(value: Value) -> tuple[Value, Value]:
    """A value as what is read from runs, of which a sum's part is the part of the sum, and tensors and noise, which a
    place has as a whole."""
    beside = tuple(t for t in value.terms if isinstance(t[1], Given | Noise))
    return Value(tuple(t for t in value.terms if t not in beside)), Value(beside)
