"""Small random residual networks without a trace: the `Pieces` that the compiler runs, made by hand in float64.

Any order of attention and MLP blocks, parallel ones too, causal or not: what the property tests draw from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.ir.graph import Block, BlockKind, Kind, Node, ResidualGraph
from patchc.ir.tokens import Layout

D_MODEL, D_HEAD, VOCAB = 6, 2, 7


def graph_of(
    shape: Sequence[tuple[str, int]], n_heads: int, pos_embed: bool, bias: bool, causal: bool, post_norm: bool = False
) -> ResidualGraph:
    """`shape`: ("attention" or "mlp", rank) for each block, ranks ascending from 1. `post_norm`: of attention."""
    nodes: list[Node] = []
    blocks: list[Block] = []

    def add(kind: BlockKind, rank: int, layer: int | None, members: list[tuple[Kind, int | None]]) -> None:
        first = len(nodes)
        nodes.extend(Node(first + i, k, rank, len(blocks), layer, h) for i, (k, h) in enumerate(members))
        blocks.append(Block(kind, rank, first, len(members), layer, post_norm and kind is BlockKind.ATTENTION))

    add(BlockKind.EMBED, 0, None, [(Kind.EMBED, None)] + ([(Kind.POS_EMBED, None)] if pos_embed else []))
    for layer, (kind, rank) in enumerate(shape):
        if kind == "attention":
            heads: list[tuple[Kind, int | None]] = [(Kind.HEAD, h) for h in range(n_heads)]
            add(BlockKind.ATTENTION, rank, layer, heads + ([(Kind.ATTN_BIAS, None)] if bias else []))
        else:
            add(BlockKind.MLP, rank, layer, [(Kind.MLP, None)])
    top = max((r for _, r in shape), default=0) + 1
    nodes.append(Node(len(nodes), Kind.LOGITS, top, len(blocks)))
    return ResidualGraph(
        "toy", len(shape), n_heads, D_MODEL, D_HEAD, VOCAB, tuple(blocks), tuple(nodes), n_heads, 8, 16, causal
    )


@dataclass
class Toy:
    """A random network over a graph, as `patchc.model.pieces.Pieces`."""

    graph: ResidualGraph
    seed: int = 0
    device = torch.device("cpu")
    dtype = torch.float64

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=self.dtype)

        h, d, m = self.graph.n_heads, D_HEAD, D_MODEL
        self.tok, self.pos = make(VOCAB, m), make(16, m)
        layers = range(self.graph.n_layers)
        self.w = {(layer, p): make(h, d, m) for layer in layers for p in range(3)}
        self.b = {(layer, p): make(h, d) for layer in layers for p in range(3)}
        self.o = [make(h, d, m) * 0.5 for _ in layers]
        self.ob = [make(m) for _ in layers]
        self.up = [make(8, m) for _ in layers]
        self.down = [make(m, 8) * 0.5 for _ in layers]
        self.out = make(VOCAB, m)
        self.has_bias = bool(self.graph.of(Kind.ATTN_BIAS))

    def tables(self, layout: Layout) -> Layout:
        return layout

    def embed(self, ids: Tensor) -> Tensor:
        tokens = self.tok[ids]
        if self.graph.blocks[0].size == 1:
            return tokens[None]
        return torch.stack([tokens, self.pos[: ids.shape[1]].expand_as(tokens)])

    def norm(self, layer: int, port: int, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()

    def shares_norm(self, layer: int) -> bool:
        return True

    def project(self, layer: int, port: int, y: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        some = list(range(self.graph.n_heads)) if heads is None else list(heads)
        return torch.einsum("nm,hdm->nhd", y, self.w[layer, port][some]) + self.b[layer, port][some]

    def prepare(self, layer: int, port: int, r: Tensor, tokens: Tensor, tables: Layout) -> Tensor:
        if port == 2:
            return r
        at = torch.tensor([tables.place(int(t))[1] for t in tokens], dtype=self.dtype)
        c, s = torch.cos(at)[:, None], torch.sin(at)[:, None]
        return torch.stack([r[..., 0] * c - r[..., 1] * s, r[..., 0] * s + r[..., 1] * c], -1)

    def kv_head(self, head: int) -> int:
        return head

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        length: int,
        tables: Layout,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        pattern = self.scores(layer, q, k, positions, length, tables, heads).softmax(-1)
        return torch.einsum("chqk,ckhd->cqhd", pattern, v)

    def scores(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        length: int,
        tables: Layout,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        scores = torch.einsum("cqhd,ckhd->chqk", q, k)
        if self.graph.causal:
            later = torch.arange(k.shape[1]) > positions[..., None]
            scores = scores.masked_fill(later[:, None], float("-inf"))
        return scores

    def masks_by_head(self, layer: int) -> bool:
        return False

    def write(self, layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        some = list(range(self.graph.n_heads)) if heads is None else list(heads)
        return torch.einsum("nhd,hdm->nm", z, self.o[layer][some])

    def attn_bias(self, layer: int) -> Tensor | None:
        return self.ob[layer] if self.has_bias else None

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        if not any(b.layer == layer and b.post_norm for b in self.graph.blocks):
            return x
        return x / (x.pow(2).mean(-1, keepdim=True) + 0.1).sqrt()

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        return self.mlp_down(layer, self.mlp_post(layer, x))

    def mlp_post(self, layer: int, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(layer, 0, x) @ self.up[layer].T)

    def neurons_add_up(self, layer: int) -> bool:
        return True

    def mlp_down(self, layer: int, post: Tensor) -> Tensor:
        return post @ self.down[layer].T

    def neurons(self, layer: int, post: Tensor, neurons: Sequence[int]) -> Tensor:
        return post @ self.down[layer][:, list(neurons)].T

    def unembed(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        w = self.out if columns is None else self.out[columns]
        return self.norm(0, 0, x) @ w.T
