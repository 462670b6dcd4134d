"""Starts inside nodes, in a compiled graph: attention scores, patterns and MLPs' neurons between mask inputs.

Each is `own + sum over starts of mask * (value - own)` at the start's entries. A blocked score has no number to go to:
its entry's weight in the softmax is multiplied by `1 - mask`, which is no change at 0 and no attention at 1.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor, fx

from patchc.codegen.stored import StoredNodes
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.bits import bits
from patchc.ir.experiment import Blocked, Value
from patchc.ir.ops import PATTERN, SCORES, Core, Replaced, ReplacedNeurons, Tokenwise, ValueId
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens

LARGEST = 80.0
"""The exponential of more would be infinite; only weights of blocked entries, which come to nothing, are cut so."""


R = TypeVar("R", Replaced, ReplacedNeurons)


def _joined(replaced: Sequence[R]) -> dict[tuple[int, ValueId], list[R]]:
    """Starts by mask and value: where some of them overlap, their value is set once."""
    out: dict[tuple[int, ValueId], list[R]] = {}
    for r in replaced:
        out.setdefault((r.mask, r.value), []).append(r)
    return out


def _union(places: Iterable[Tensor]) -> Tensor:
    """One where any of these places, ones among zeros and broadcast together, has a one."""
    return reduce(torch.maximum, places)


class Insides:
    """Writes nodes of a graph over b prompts of s tokens."""

    def __init__(
        self,
        worlds: Worlds,
        values: Sequence[Value],
        stored: StoredNodes,
        mask_of: Callable[[int], fx.Node],
        rows_of: Callable[[Tokens], Tensor | None],
    ):
        self.worlds, self.call, self.values = worlds, worlds.call, values
        self.stored, self.mask_of, self.rows_of = stored, mask_of, rows_of

    # ---- attention
    def z(self, core: Core, ports: Sequence[fx.Node]) -> fx.Node:
        """z `[b, s, head, d_head]` of a core with scores or patterns set, from its q, k and v before rotary."""
        layer = self.worlds.residual.blocks[core.block].layer
        scores = self.worlds.module(f"layer{layer}_scores", *ports[:2], name=f"scores_{layer}")
        hidden = self.call(aten.eq.Scalar, scores, float("-inf"))
        of_scores = core.replaced_at(SCORES)
        blocked = [r for r in of_scores if self._blocks(r.value)]
        scores = self._set(core.block, Site.SCORES, scores, hidden, [r for r in of_scores if r not in blocked])
        pattern = self._blocked(scores, blocked) if blocked else self.call(aten.softmax.int, scores, -1)
        of_pattern = core.replaced_at(PATTERN)
        if of_pattern:
            pattern = self._set(core.block, Site.PATTERN, pattern, hidden, of_pattern)
        return self.worlds.module(f"layer{layer}_mix", pattern, ports[2], name=f"z_{layer}")

    def _blocks(self, value: ValueId) -> bool:
        return any(isinstance(source, Blocked) for _, source in self.values[value].terms)

    def _set(self, block: int, site: Site, own: fx.Node, hidden: fx.Node, replaced: Sequence[Replaced]) -> fx.Node:
        """Scores or patterns with values at some entries; hidden ones stay as they are."""
        out = own
        for (mask, number), some in _joined(replaced).items():
            heads = reduce(operator.or_, (r.heads for r in some))
            value = self.stored.entries(block, site, heads, self.values[number], own)
            gap = self.call(operator.neg, own) if value is None else self.call(operator.sub, value, own)
            gap = self.call(aten.masked_fill.Scalar, gap, hidden, 0.0)
            out = self.call(operator.add, out, self._weighted(gap, mask, _union(map(self._entries, some))))
        return out

    def _blocked(self, scores: fx.Node, blocked: Sequence[Replaced]) -> fx.Node:
        """The softmax with entries' weights multiplied by one minus their masks; zero where nothing is left."""
        weight: fx.Node | None = None
        for (mask, _), some in _joined(blocked).items():
            entries = self.worlds.buffer("entries", _union(map(self._entries, some)))
            taken = self.call(operator.mul, entries, self.mask_of(mask)) if mask >= 0 else entries
            left = self.call(aten.rsub.Scalar, taken, 1)
            weight = left if weight is None else self.call(operator.mul, weight, left)
        gone = self.call(aten.le.Scalar, weight, 0)
        counted = self.call(aten.masked_fill.Scalar, scores, gone, float("-inf"))
        most = self.call(aten.detach.default, self.call(aten.amax.default, counted, [-1], True))
        most = self.call(aten.masked_fill.Scalar, most, self.call(aten.eq.Scalar, most, float("-inf")), 0.0)
        shifted = self.call(aten.clamp.default, self.call(operator.sub, scores, most), None, LARGEST)
        exponential = self.call(operator.mul, self.call(aten.exp.default, shifted), weight)
        total = self.call(aten.sum.dim_IntList, exponential, [-1], True)
        total = self.call(aten.masked_fill.Scalar, total, self.call(aten.eq.Scalar, total, 0), 1.0)
        return self.call(operator.truediv, exponential, total)

    def _entries(self, r: Replaced) -> Tensor:
        """One at a start's heads and entries, `[b or 1, head, s or 1, s or 1]`."""
        out = self._zeros(1, self.worlds.residual.n_heads, 1, 1)
        out[:, list(bits(r.heads))] = 1
        for tokens, axis in ((r.tokens, -1), (r.sources, -2)):
            if (rows := self.rows_of(tokens)) is not None:
                out = out * rows[:, None].unsqueeze(axis)
        return out[:1] if bool((out == out[:1]).all()) else out

    # ---- MLPs
    def mlp(self, op: Tokenwise, stream: fx.Node, name: str) -> fx.Node:
        """What an MLP with neurons set writes, `[b, s, d_model]`."""
        layer = self.worlds.residual.blocks[op.block].layer
        own = out = self.worlds.module(f"layer{layer}_mlp_post", stream, name=f"post_{layer}")
        for (mask, number), some in _joined(op.replaced).items():
            value = self.stored.neurons(op.block, self.values[number], own)
            gap = self.call(operator.neg, own) if value is None else self.call(operator.sub, value, own)
            out = self.call(operator.add, out, self._weighted(gap, mask, _union(map(self._neurons, some))))
        return self.worlds.module(f"layer{layer}_mlp_down", out, name=name)

    def _neurons(self, r: ReplacedNeurons) -> Tensor:
        """One at a start's tokens and neurons, `[b or 1, s or 1, d_mlp]`."""
        out = self._zeros(1, 1, self.worlds.residual.d_mlp)
        out[:, :, list(bits(r.neurons))] = 1
        rows = self.rows_of(r.tokens)
        return out if rows is None else out * rows[:, :, None]

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.worlds.pieces.device, dtype=self.worlds.pieces.dtype)

    def _weighted(self, gap: fx.Node, mask: int, where: Tensor) -> fx.Node:
        gap = gap if mask < 0 else self.call(operator.mul, gap, self.mask_of(mask))
        return self.call(operator.mul, gap, self.worlds.buffer("entries", where))
