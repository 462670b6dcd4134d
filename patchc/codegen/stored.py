"""Stored values inside a compiled graph, as differences from the base run: what `execute.stored` computes, written as
graph nodes over whole sequences."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from functools import partial

from torch import Tensor, fx

from patchc.codegen.sources import Seen, Sources
from patchc.codegen.worlds import Worlds, aten
from patchc.execute.places import Place, attn_out_place, node_place, probe_place, stream_place
from patchc.ir.bits import bits
from patchc.ir.experiment import Given, Noise, Probe, Prompts, Value
from patchc.ir.graph import BlockKind, Kind
from patchc.ir.paths import Site

HIDDEN = float("-inf")
"""The score of what the mask hides."""
PORT_SITES = (Site.Q, Site.K, Site.V)


class StoredNodes:
    """Writes stored values into the graph of `worlds`. b = batch, s = pos."""

    def __init__(self, worlds: Worlds, prompts: Prompts, tensors: Mapping[str, Tensor]):
        self.worlds, self.graph, self.base = worlds, worlds.residual, worlds.base
        self.sources = Sources(worlds, prompts, tensors)

    def stream(self, rank: int, value: Value, block: int = -1) -> fx.Node:
        """The stream below `rank` under `value`, less the base run's, `[b, s, d_model]`; its noise is that of the MLP
        of `block`, if one is given."""
        place = stream_place(self.worlds.pieces, rank) if block < 0 else self._place(block, 0, Site.IN)
        seen = Seen((place.width,), lambda w: self.worlds.stream(w, rank), place.read)
        return self._sum(self._difference(value, seen), self.sources.noise(value, place, partial(seen.of, self.base)))

    def projection(self, block: int, port: int, heads: int, value: Value, now: fx.Node) -> fx.Node | None:
        """q, k or v of every head under `value`, `[b, s, head, d_head]`, its noise on `heads` alone; `now` is what the
        run itself has there. None where the value is zero."""
        kv = [self.worlds.pieces.kv_head(h) if port else h for h in range(self.graph.n_heads)]
        seen = Seen(
            (self.graph.n_heads, self.graph.d_head),
            lambda w: self.worlds.projection(w, block, port),
            lambda run: run.attention[block].raw[port][:, kv],
        )
        noise = self._noise_by_head(block, heads, value, PORT_SITES[port], seen)
        return self.worlds.plus(self.sources.combination(value, seen, now), noise)

    def neurons(self, block: int, value: Value, now: fx.Node) -> fx.Node | None:
        """All neurons of an MLP under `value`, `[b, s, d_mlp]`; `now` is what the run itself has there."""
        place = self._place(block, 0, Site.POST)
        seen = Seen((place.width,), lambda w: self.worlds.post(w, block), place.read)
        noise = self.sources.noise(value, place, partial(seen.of, self.base))
        return self.worlds.plus(self.sources.combination(value, seen, now), noise)

    def entries(self, block: int, site: Site, heads: int, value: Value, now: fx.Node) -> fx.Node | None:
        """Scores or patterns of every head under `value`, `[b, head, s, s]`, with noise on `heads` alone; `now` is what
        the run itself has there."""
        read = self.worlds.scores if site is Site.SCORES else self.worlds.pattern

        def turned(x: fx.Node) -> fx.Node:
            return self.worlds.call(aten.transpose.int, x, 1, 2)

        hidden = HIDDEN if site is Site.SCORES else None
        seen = Seen((self.graph.n_heads, -1), lambda w: turned(read(w, block)), None, hidden)
        noise = self._noise_by_head(block, heads, value, site, seen)
        out = self.worlds.plus(self.sources.combination(value, seen, turned(now)), noise)
        return None if out is None else turned(out)

    def z(self, block: int, heads: int, value: Value) -> fx.Node:
        """The z of every head under `value`, less the base run's, `[b, s, head, d_head]`; noise on `heads` alone."""
        seen = self._z(block)
        return self._sum(self._difference(value, seen), self._noise_by_head(block, heads, value, Site.Z, seen))

    def z_of_runs(self, block: int, value: Value) -> fx.Node | None:
        """The z of every head under a value that is a sum of runs, `[b, s, head, d_head]`; None for zero."""
        return self.sources.combination(value, self._z(block), None)

    def mlp(self, block: int, value: Value) -> fx.Node | None:
        """What an MLP writes under a value that is a sum of runs, `[b, s, d_model]`; None for zero."""
        return self.sources.combination(value, self._writer(self.graph.blocks[block].first)[1], None)

    def stream_of_runs(self, rank: int, value: Value) -> fx.Node | None:
        """The stream below `rank` under a value that is a sum of runs, `[b, s, d_model]`; None for zero."""
        place = stream_place(self.worlds.pieces, rank)
        seen = Seen((place.width,), lambda w: self.worlds.stream(w, rank), place.read)
        return self.sources.combination(value, seen, None)

    def node(self, block: int, members: int, value: Value, site: Site) -> fx.Node:
        """What members of a block write under `value`, less what they write in the base run, `[b, s, d_model]`."""
        if site is Site.ATTN_OUT and self.graph.blocks[block].post_norm:
            return self._normed(block, value)
        if self.graph.blocks[block].kind is BlockKind.ATTENTION:
            return self._attention(block, members, value, site)
        out: fx.Node | None = None
        for i in bits(members):
            place, seen = self._writer(self.graph.blocks[block].first + i)
            out = self._sum(
                out, self._difference(value, seen), self.sources.noise(value, place, partial(seen.of, self.base))
            )
        assert out is not None
        return out

    def probe(self, probe: Probe) -> tuple[str, fx.Node]:
        """The name of a place that a metric reads, and what the base run has there, `[b, s, width]`."""
        name = probe_place(self.worlds.pieces, probe).name
        if probe.site is Site.STREAM:
            return name, self.worlds.stream(self.base, probe.rank)
        node = self.graph.members(probe.nodes)[0]
        if probe.site is Site.IN:
            return name, self.worlds.stream(self.base, node.rank)
        if probe.site is Site.ATTN_OUT or node.kind is Kind.MLP:
            return name, self.worlds.written(self.base, node.block)
        if node.head is None:
            return name, self._writer(node.id)[1].of(self.base)
        if probe.site is Site.OUT:
            return name, self._written(node.block, 1 << node.head).of(self.base)
        port = None if probe.site is Site.Z else PORT_SITES.index(probe.site)
        whole = (
            self.worlds.z(self.base, node.block)
            if port is None
            else self.worlds.projection(self.base, node.block, port)
        )
        return name, self.worlds.call(aten.select.int, whole, 2, node.head)

    # ---- attention
    def _normed(self, block: int, value: Value) -> fx.Node:
        """What a block with a norm of its own adds to the stream."""
        place = attn_out_place(self.worlds.pieces, block)
        seen = Seen((place.width,), lambda w: self.worlds.written(w, block), place.read)
        return self._sum(self._difference(value, seen), self.sources.noise(value, place, partial(seen.of, self.base)))

    def _attention(self, block: int, members: int, value: Value, site: Site) -> fx.Node:
        heads = members & ((1 << self.graph.n_heads) - 1)
        parts: list[fx.Node | None] = []
        if heads:
            parts.append(self._difference(value, self._written(block, heads)))
        bias = self.worlds.bias(block) if members >> self.graph.n_heads else None
        if bias is not None:  # the same in every world; a given tensor already stands for the whole
            share = sum(factor for factor, source in value.terms if not isinstance(source, Given | Noise)) - 1.0
            parts.append(self.worlds.call(operator.mul, bias, share))
        return self._sum(*parts, *self._noise(block, heads, value, site))

    def _noise(self, block: int, heads: int, value: Value, site: Site) -> list[fx.Node | None]:
        """The noise in what heads write: on their sum, on each one's output, or on each one's z."""
        if site is Site.ATTN_OUT:
            place = attn_out_place(self.worlds.pieces, block)
            return [self.sources.noise(value, place, partial(self.worlds.written, self.base, block))]
        if site is Site.Z:
            z = self._noise_by_head(block, heads, value, site, self._z(block))
            layer = self.graph.blocks[block].layer
            return [] if z is None else [self.worlds.chosen(self.worlds.module(f"layer{layer}_write", z), heads)]
        return [
            self.sources.noise(value, self._place(block, h, site), partial(self._written(block, 1 << h).of, self.base))
            for h in bits(heads)
        ]

    def _noise_by_head(self, block: int, heads: int, value: Value, site: Site, seen: Seen) -> fx.Node | None:
        """The noise in heads' z, q, k or v, `[b, s, head, d_head]`, 0 for other heads; None where there is none."""
        if not any(isinstance(source, Noise) for _, source in value.terms):
            return None
        parts: list[fx.Node | None] = [None] * self.graph.n_heads
        width = 0
        for h in bits(heads):
            place = self._place(block, h, site)
            width = place.width or self.sources.length()
            own = partial(self._of_head, seen, h)
            parts[h] = self.sources.noise(value, place, own)
        return self.sources.stacked(parts, (width,))

    def _of_head(self, seen: Seen, head: int) -> fx.Node:
        return self.worlds.call(aten.select.int, seen.of(self.base), 2, head)

    def _place(self, block: int, head: int, site: Site) -> Place:
        return node_place(self.worlds.pieces, self.graph.nodes[self.graph.blocks[block].first + head], site)

    def _z(self, block: int) -> Seen:
        shape = (self.graph.n_heads, self.graph.d_head)
        return Seen(shape, lambda w: self.worlds.z(w, block), lambda run: run.attention[block].z)

    def _written(self, block: int, heads: int) -> Seen:
        """What heads together write."""
        layer, chosen, pieces = self.graph.blocks[block].layer, list(bits(heads)), self.worlds.pieces
        assert layer is not None
        return Seen(
            (self.graph.d_model,),
            lambda w: self.worlds.chosen(self.worlds.heads(w, block), heads),
            lambda run: pieces.write(layer, run.attention[block].z[:, chosen], chosen),
        )

    # ---- small things
    def _writer(self, number: int) -> tuple[Place, Seen]:
        """An MLP or an embedding."""
        node = self.graph.nodes[number]
        place = node_place(self.worlds.pieces, node, Site.OUT)
        if node.kind is Kind.MLP:
            return place, Seen((place.width,), lambda w: self.worlds.written(w, node.block), place.read)
        return place, Seen((place.width,), lambda w: self.worlds.embed(w, number), place.read)

    def _difference(self, value: Value, seen: Seen) -> fx.Node:
        """A value without its noise, less the base run's."""
        base, new = seen.of(self.base), self.sources.combination(value, seen, None)
        return self.worlds.call(operator.neg, base) if new is None else self.worlds.call(operator.sub, new, base)

    def _sum(self, *parts: fx.Node | None) -> fx.Node:
        out: fx.Node | None = None
        for part in parts:
            out = self.worlds.plus(out, part)
        assert out is not None
        return out
