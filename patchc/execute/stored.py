"""Values that patches put in place, as differences from the base run: mixtures of worlds, means and given tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.execute.base import PlainRun
from patchc.ir.bits import bits
from patchc.ir.experiment import FromWorld, Given, Itself, Mean, Source, Value
from patchc.ir.graph import BlockKind
from patchc.ir.tokens import Layout
from patchc.model.pieces import Pieces

Field = Callable[[PlainRun], Tensor]
"""Reads one site of a run at every token: `[token, ...]`."""


@dataclass
class Stored:
    """The runs of an experiment. `base` names the base world."""

    pieces: Pieces
    layout: Layout
    base: str
    runs: Mapping[str, PlainRun]
    tensors: Mapping[str, Tensor]

    @property
    def base_run(self) -> PlainRun:
        return self.runs[self.base]

    def node(self, block: int, members: int, value: Value, at: Tensor) -> Tensor:
        """What members of a block write under `value`, less what they write in the base run: `[n, d_model]`."""
        kind, layer = self.pieces.graph.blocks[block].kind, self.pieces.graph.blocks[block].layer
        if kind is BlockKind.EMBED:
            chosen = list(bits(members))
            return self._difference(value, at, lambda run: run.embed[chosen].sum(0))
        assert layer is not None
        if kind is BlockKind.MLP:
            return self._difference(value, at, lambda run: run.mlp[block])
        return self._heads(block, layer, members, value, at)

    def stream(self, rank: int, value: Value, at: Tensor) -> Tensor:
        """The stream below `rank` under `value`, less the base run's: `[n, d_model]`."""
        return self._difference(value, at, lambda run: run.stream[rank])

    def projection(self, block: int, port: int, head: int, value: Value, at: Tensor, computed: Tensor) -> Tensor:
        """A head's q, k or v (before rotary) under `value`; `computed` is what the run itself has there: `[n,
        d_head]`."""
        column = head if port == 0 else self.pieces.kv_head(head)
        return self._inside(value, at, computed, lambda run: run.attention[block].raw[port][:, column])

    def neurons(self, block: int, value: Value, at: Tensor, computed: Tensor) -> Tensor:
        """All neurons of an MLP under `value`; `computed` is what the run itself has there: `[n, d_mlp]`."""
        return self._inside(value, at, computed, lambda run: self.post(run, block))

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

    def _inside(self, value: Value, at: Tensor, computed: Tensor, site: Field) -> Tensor:
        """A value inside a node, which may mix in what the run itself has there."""
        out = torch.zeros_like(computed)
        for factor, source in value.terms:
            out = out + factor * (computed if isinstance(source, Itself) else self._source(source, at, site))
        return out

    def _heads(self, block: int, layer: int, members: int, value: Value, at: Tensor) -> Tensor:
        n_heads = self.pieces.graph.n_heads
        heads = list(bits(members & ((1 << n_heads) - 1)))
        given = Value(tuple(t for t in value.terms if isinstance(t[1], Given)))
        linear = Value(tuple(t for t in value.terms if not isinstance(t[1], Given)))
        out = torch.zeros(len(at), self.pieces.graph.d_model, device=at.device, dtype=self.pieces.dtype)
        if heads:
            z = self._difference(linear, at, lambda run: run.attention[block].z[:, heads])
            out = self.pieces.write(layer, z, heads)
        bias = self.pieces.attn_bias(layer)
        if members >> n_heads and bias is not None:
            out = out + (sum(factor for factor, _ in linear.terms) - 1.0) * bias
        for factor, source in given.terms:
            out = out + factor * self._source(source, at, lambda run: run.embed[0])
        return out

    def _difference(self, value: Value, at: Tensor, site: Field) -> Tensor:
        out = -site(self.base_run)[at]
        for factor, source in value.terms:
            out = out + factor * self._source(source, at, site)
        return out

    def _source(self, source: Source, at: Tensor, site: Field) -> Tensor:
        match source:
            case FromWorld(world):
                return site(self.runs[world])[at]
            case Mean(world, over_positions):
                return self._mean(site(self.runs[world]), over_positions)[at]
            case Given(key):
                return self.tensors[key].expand(len(at), -1)
            case Itself():
                raise AssertionError("`self` is split off when a patch is lowered")

    def _mean(self, values: Tensor, over_positions: bool) -> Tensor:
        """The mean over prompts at the same position (or over all tokens), at every token."""
        if over_positions:
            return values.mean(0, keepdim=True).expand_as(values)
        positions = torch.tensor([self.layout.place(t)[1] for t in range(self.layout.n_tokens)], device=values.device)
        longest = int(positions.max()) + 1
        sums = torch.zeros(longest, *values.shape[1:], device=values.device, dtype=values.dtype)
        counts = torch.bincount(positions, minlength=longest).to(values.dtype)
        means = sums.index_add(0, positions, values) / counts.view(-1, *[1] * (values.dim() - 1))
        return means[positions]
