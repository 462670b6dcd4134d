"""Attention in a compiled graph: each block's variants packed into lanes, a lane computing every head once.

A head's z depends on its own q, k and v alone, so that variants which are read at different heads share one call;
where heads read many different streams, these are projected head by head in one product.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from patchc.codegen.inside import Insides
from patchc.codegen.masks import Masks
from patchc.codegen.stored import StoredNodes
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.graph import PORTS
from patchc.ir.ops import PATTERN, SCORES, Core, HeadZ, Out, Replaced, VariantId

WHOLE = 2
"""So many different inputs of one port are each projected for every head; more are projected head by head."""


@dataclass
class Lane:
    """Attention of one block: `cores[h]` is the variant that head h computes."""

    block: int
    cores: dict[int, VariantId] = field(default_factory=dict[int, VariantId])
    alone: bool = False


class Cores:
    """Writes the attention cores among the variants `read` of a DAG. `stream_of` gives a variant's stream below a rank,
    `streams_of` several in one, `[n, b, s, d_model]`. b = batch, s = pos."""

    def __init__(
        self,
        dag: Dag,
        read: Iterable[VariantId],
        worlds: Worlds,
        stored: StoredNodes,
        masks: Masks,
        insides: Insides,
        stream_of: Callable[[VariantId, int], fx.Node],
        streams_of: Callable[[list[VariantId], int], fx.Node],
    ):
        self.dag, self.worlds, self.call = dag, worlds, worlds.call
        self.stored, self.masks, self.insides = stored, masks, insides
        self.stream_of, self.streams_of = stream_of, streams_of
        self._lanes = self._packed(read)
        self._z: dict[int, fx.Node] = {}
        self._ports: dict[tuple[int, int, VariantId], fx.Node] = {}

    def z(self, core: VariantId) -> fx.Node:
        """z of a core, `[b, s, head, d_head]`; of the heads at which it is read."""
        lane = self._lanes[core]
        if id(lane) not in self._z:
            self._z[id(lane)] = self._of_lane(lane)
        return self._z[id(lane)]

    def port(self, block: int, port: int, x: VariantId, sets: Iterable[Replaced] = ()) -> fx.Node:
        """q, k or v of every head on one stream, with values set, `[b, s, head, d_head]`."""
        now = self._projected(block, port, x)
        for replaced in sets:
            if replaced.port == port:
                now = self._replaced(block, replaced, replaced.heads, now)
        return now

    # ---- lanes
    def _packed(self, read: Iterable[VariantId]) -> dict[VariantId, Lane]:
        """Each core's lane: the first of its block with room for all the heads at which it is read."""
        heads: dict[VariantId, int] = {}
        for i in read:
            match self.dag.ops[i]:
                case Out(core, members):
                    heads[core] = heads.get(core, 0) | members
                case HeadZ(core, head):
                    heads[core] = heads.get(core, 0) | 1 << head
                case _:
                    pass
        lanes: dict[int, list[Lane]] = {}
        out: dict[VariantId, Lane] = {}
        for i, members in sorted(heads.items()):
            core = self._core(i)
            alone = bool(core.replaced_at(SCORES, PATTERN))
            of_block = lanes.setdefault(core.block, [])
            fits = (lane for lane in of_block if not (lane.alone or alone or lane.cores.keys() & set(bits(members))))
            lane = next(fits, None)
            if lane is None:
                lane = Lane(core.block, alone=alone)
                of_block.append(lane)
            lane.cores |= dict.fromkeys(bits(members), i)
            out[i] = lane
        return out

    def _core(self, i: VariantId) -> Core:
        core = self.dag.ops[i]
        assert isinstance(core, Core)
        return core

    def _of_lane(self, lane: Lane) -> fx.Node:
        first = self._core(next(iter(lane.cores.values())))
        if lane.alone:
            ports = [self.port(lane.block, p, first.input(p), first.replaced) for p in range(3)]
            return self.insides.z(first, ports)
        layer = self.dag.graph.blocks[lane.block].layer
        return self.worlds.module(f"layer{layer}_attend", *self._ports_of(lane), name=f"z_{layer}")

    def _ports_of(self, lane: Lane) -> list[fx.Node]:
        """q, k and v of a lane; the ports whose heads read many streams are computed together."""
        cores = {h: self._core(i) for h, i in lane.cores.items()}
        spare = next(iter(cores.values()))
        inputs = [[cores.get(h, spare).input(p) for h in range(self.dag.graph.n_heads)] for p in range(3)]
        many = [p for p in range(3) if len(set(inputs[p])) > WHOLE]
        found = self._by_head(lane.block, {p: inputs[p] for p in many})
        out: list[fx.Node] = []
        for p in range(3):
            now = found[p] if p in found else self._merged(lane.block, p, inputs[p])
            for i in dict.fromkeys(lane.cores.values()):
                mine = sum(1 << h for h, core in lane.cores.items() if core == i)
                for replaced in self._core(i).replaced:
                    if replaced.port == p:
                        now = self._replaced(lane.block, replaced, replaced.heads & mine, now)
            out.append(now)
        return out

    # ---- projections
    def _projected(self, block: int, port: int, x: VariantId) -> fx.Node:
        if x == 0:
            return self.worlds.projection(self.worlds.base, block, port)
        key = (block, port, x)
        if key not in self._ports:
            stream = self.stream_of(x, self.dag.graph.blocks[block].rank)
            self._ports[key] = self.worlds.project(block, port, stream, PORTS[port])
        return self._ports[key]

    def _merged(self, block: int, port: int, inputs: list[VariantId]) -> fx.Node:
        """A port whose heads read a few streams."""
        out: fx.Node | None = None
        for x in dict.fromkeys(inputs):
            now = self._projected(block, port, x)
            heads = sum(1 << h for h, y in enumerate(inputs) if y == x)
            out = now if out is None else self.at_heads(out, now, heads)
        assert out is not None
        return out

    def _by_head(self, block: int, inputs: dict[int, list[VariantId]]) -> dict[int, fx.Node]:
        """Ports whose heads each read a stream of their own."""
        if not inputs:
            return {}
        rank, layer = self.dag.graph.blocks[block].rank, self.dag.graph.blocks[block].layer
        assert layer is not None
        every = self.streams_of([x for some in inputs.values() for x in some], rank)
        shared = len({self.worlds.pieces.norm_module(layer, p) for p in inputs}) == 1
        every = self.worlds.norm(block, next(iter(inputs)), every) if shared else every
        n, out = self.dag.graph.n_heads, dict[int, fx.Node]()
        for i, port in enumerate(inputs):
            y = every if len(inputs) == 1 else self.call(aten.narrow.default, every, 0, i * n, n)
            y = y if shared else self.worlds.norm(block, port, y)
            out[port] = self.worlds.module(f"layer{layer}_{PORTS[port]}_by_head", y, name=f"{PORTS[port]}_{layer}")
        return out

    def at_heads(self, x: fx.Node, new: fx.Node, heads: int) -> fx.Node:
        """`x` `[b, s, head, d_head]` with `new` in its place at some heads."""
        return self.call(operator.add, x, self._only(heads, self.call(operator.sub, new, x)))

    def _only(self, heads: int, gap: fx.Node) -> fx.Node:
        one_hot = torch.zeros(1, 1, self.dag.graph.n_heads, 1)
        one_hot[:, :, list(bits(heads))] = 1
        one_hot = one_hot.to(self.worlds.pieces.device, self.worlds.pieces.dtype)
        return self.call(operator.mul, gap, self.worlds.buffer("heads", one_hot))

    def _replaced(self, block: int, replaced: Replaced, heads: int, now: fx.Node) -> fx.Node:
        """A port with a value set at some heads."""
        value = self.stored.projection(block, replaced.port, heads, self.dag.values[replaced.value], now)
        gap = self.call(operator.neg, now) if value is None else self.call(operator.sub, value, now)
        gap = self.call(operator.mul, gap, self.masks.of(replaced.mask)) if replaced.mask >= 0 else gap
        return self.call(operator.add, now, self.masks.at(replaced.tokens, self._only(heads, gap), extra_axes=2))
