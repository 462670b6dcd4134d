"""Plain runs inside a compiled graph: each stored value of each world as a graph node, emitted when first asked for."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from patchc.ir.bits import bits
from patchc.ir.graph import PORTS, BlockKind, Kind, ResidualGraph
from patchc.model.pieces import TracedPieces

aten = torch.ops.aten
INSIDES = ("_scores", "_mix", "_mlp_post", "_mlp_down")
"""Pieces that stand inside nodes, which not every model has."""


class Worlds:
    """Writes nodes into `graph` of a module `root`. b = batch, s = pos."""

    def __init__(self, residual: ResidualGraph, pieces: TracedPieces, worlds: tuple[str, ...]):
        self.residual, self.pieces = residual, pieces
        self.root, self.graph = nn.Module(), fx.Graph()
        self.ids = {w: self.argument(w) for w in worlds}
        self.base = worlds[0]
        self._made: dict[tuple[Any, ...], fx.Node] = {}
        self._n_buffers = 0

    # ---- writing
    def argument(self, name: str) -> fx.Node:
        """An argument of `forward`: of that name, or near it where Python has another use for the name."""
        node = self.graph.placeholder(f"{name}_ids" if name == "self" else name)
        node.target = node.name
        return node

    def call(self, function: Any, *args: Any, name: str | None = None) -> fx.Node:
        return self.graph.create_node("call_function", function, args, name=name)

    def plus(self, x: fx.Node | None, y: fx.Node | None) -> fx.Node | None:
        """A sum, None being zero."""
        return (x or y) if x is None or y is None else self.call(operator.add, x, y)

    def module(self, piece: str, *args: fx.Node, name: str | None = None) -> fx.Node:
        """A piece of the model; what it reads of the statics follows its own arguments."""
        if piece.endswith(INSIDES):
            layer = int(piece.removeprefix("layer").split("_")[0])
            self.pieces.need_apart("neurons" if "mlp" in piece else "scores", layer)
        if not hasattr(self.root, piece):
            self.root.add_module(piece, self.pieces.modules[piece])
        statics = [self._static(i) for i in self.pieces.static_args[piece]]
        return self.graph.create_node("call_module", piece, (*args, *statics), name=name)

    def buffer(self, name: str, value: Tensor) -> fx.Node:
        self._n_buffers += 1
        unique = f"{name}_{self._n_buffers}"
        self.root.register_buffer(unique, value)
        return self.graph.create_node("get_attr", unique)

    def _once(self, key: tuple[Any, ...], make: Any) -> fx.Node:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _static(self, index: int) -> fx.Node:
        if not hasattr(self.root, "statics"):
            self.root.add_module("statics", self.pieces.modules["statics"])
        every = self._once(
            ("statics",), lambda: self.graph.create_node("call_module", "statics", (self.ids[self.base],))
        )
        return self._once(("static", index), lambda: self.call(operator.getitem, every, index))

    # ---- reading: [b, s, ...]
    def embed(self, world: str, node: int) -> fx.Node:
        """One embedding node's output `[b, s, d_model]`."""
        piece = "pos_embed" if self.residual.nodes[node].kind is Kind.POS_EMBED else "embed"
        return self._once((piece, world), lambda: self.module(piece, self.ids[world], name=f"{world}_{piece}"))

    def stream(self, world: str, rank: int) -> fx.Node:
        """The stream below `rank`, `[b, s, d_model]`."""
        return self._once(("stream", world, rank), lambda: self._stream(world, rank))

    def _stream(self, world: str, rank: int) -> fx.Node:
        for below in range(1, rank):  # from the bottom, so that no call is deeper than one rank
            self.stream(world, below)
        if rank == 1:
            parts = [self.embed(world, n.id) for n in self.residual.members(self.residual.blocks[0].nodes)]
        else:
            below = [i for i, b in enumerate(self.residual.blocks) if b.rank == rank - 1]
            parts = [self.stream(world, rank - 1), *(self.written(world, i) for i in below)]
        out = parts[0]
        for i, part in enumerate(parts[1:], 2):
            out = self.call(operator.add, out, part, name=f"{world}_stream_{rank}" if i == len(parts) else None)
        return out

    def written(self, world: str, block: int) -> fx.Node:
        """All that a block adds to the stream, bias included."""
        kind, layer = self.residual.blocks[block].kind, self.residual.blocks[block].layer
        if kind is BlockKind.MLP:
            rank = self.residual.blocks[block].rank
            return self._once(
                ("mlp", world, block),
                lambda: self.module(f"layer{layer}_mlp", self.stream(world, rank), name=f"{world}_mlp_{layer}"),
            )
        return self._once(("normed", world, block), lambda: self.normed(block, self.raw(world, block)))

    def raw(self, world: str, block: int) -> fx.Node:
        """What a block's heads and bias write together, before a norm of its own."""
        layer = self.residual.blocks[block].layer
        return self._once(
            ("attn", world, block),
            lambda: self.module(f"layer{layer}_attn", self.z(world, block), name=f"{world}_attn_{layer}"),
        )

    def normed(self, block: int, x: fx.Node) -> fx.Node:
        """What a block adds to the stream of what its heads and bias write together, `[..., b, s, d_model]`."""
        if not self.residual.blocks[block].post_norm:
            return x
        return self.module(f"layer{self.residual.blocks[block].layer}_post_norm", x)

    def bias(self, block: int) -> fx.Node | None:
        piece = f"layer{self.residual.blocks[block].layer}_attn_bias"
        if piece not in self.pieces.modules:
            return None
        return self._once((piece,), lambda: self.module(piece))

    def heads(self, world: str, block: int) -> fx.Node:
        """What each head writes `[b, s, head, d_model]`."""
        layer = self.residual.blocks[block].layer
        return self._once(
            ("heads", world, block),
            lambda: self.module(f"layer{layer}_write", self.z(world, block), name=f"{world}_heads_{layer}"),
        )

    def write(self, block: int, z: fx.Node, heads: int) -> fx.Node:
        """What some heads, given their z `[b, s, some heads, d_head]`, each write, `[b, s, some heads, d_model]`."""
        layer, some = self.residual.blocks[block].layer, list(bits(heads))
        assert layer is not None
        if len(some) == self.residual.n_heads:
            return self.module(f"layer{layer}_write", z)
        piece = "_".join(map(str, [f"layer{layer}_write", *some]))
        if not hasattr(self.root, piece):
            self.root.add_module(piece, self.pieces.write_module(layer, some))
        return self.graph.create_node("call_module", piece, (z,))

    def some_heads(self, x: fx.Node, heads: int) -> fx.Node:
        """Some heads of `[b, s, head, ...]`."""
        first, some = next(bits(heads)), list(bits(heads))
        if len(some) == self.residual.n_heads:
            return x
        if some == list(range(first, first + len(some))):
            return self.call(aten.narrow.default, x, 2, first, len(some))
        index = self.buffer("heads", torch.tensor(some, device=self.pieces.device))
        return self.call(aten.index_select.default, x, 2, index)

    def chosen(self, heads: fx.Node, members: int) -> fx.Node:
        """The sum of some heads of `[b, s, head, d_model]`."""
        if members.bit_count() == 1:
            return self.call(aten.select.int, heads, 2, next(bits(members)))
        return self.call(aten.sum.dim_IntList, self.some_heads(heads, members), [2])

    def z(self, world: str, block: int) -> fx.Node:
        """`[b, s, head, d_head]`."""
        layer = self.residual.blocks[block].layer
        return self._once(
            ("z", world, block),
            lambda: self.module(
                f"layer{layer}_attend",
                *(self.projection(world, block, p) for p in range(3)),
                name=f"{world}_z_{layer}",
            ),
        )

    def scores(self, world: str, block: int) -> fx.Node:
        """Attention scores `[b, head, query, key]`, minus infinity where hidden."""
        layer = self.residual.blocks[block].layer
        return self._once(
            ("scores", world, block),
            lambda: self.module(f"layer{layer}_scores", *(self.projection(world, block, p) for p in range(2))),
        )

    def pattern(self, world: str, block: int) -> fx.Node:
        """Their softmax."""
        return self._once(("pattern", world, block), lambda: self.call(aten.softmax.int, self.scores(world, block), -1))

    def post(self, world: str, block: int) -> fx.Node:
        """An MLP's neurons `[b, s, d_mlp]`."""
        layer, rank = self.residual.blocks[block].layer, self.residual.blocks[block].rank
        return self._once(
            ("post", world, block), lambda: self.module(f"layer{layer}_mlp_post", self.stream(world, rank))
        )

    def projection(self, world: str, block: int, port: int) -> fx.Node:
        """q, k or v before rotary, one per query head, `[b, s, head, d_head]`."""
        rank = self.residual.blocks[block].rank
        return self._once(
            (PORTS[port], world, block),
            lambda: self.project(block, port, self.stream(world, rank), f"{world}_{PORTS[port]}"),
        )

    def project(self, block: int, port: int, x: fx.Node, name: str) -> fx.Node:
        """A stream's q, k or v, one per query head."""
        layer = self.residual.blocks[block].layer
        out = self.module(f"layer{layer}_{PORTS[port]}", self.norm(block, port, x), name=f"{name}_{layer}")
        n, kv = self.residual.n_heads, self.residual.n_kv_heads
        return out if port == 0 or n == kv else self.call(aten.repeat_interleave.self_int, out, n // kv, 2)

    def norm(self, block: int, port: int, x: fx.Node) -> fx.Node:
        """A stream `[..., s, d_model]` as a port of a block's heads reads it."""
        layer = self.residual.blocks[block].layer
        assert layer is not None
        piece = self.pieces.norm_module(layer, port)
        return x if piece is None else self._once((piece, x), lambda: self.module(piece, x))
