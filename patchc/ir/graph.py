"""The residual graph: who writes into the stream, who reads it, in which order. Names and numbers only, no tensors.

Blocks stand in residual order. A block of rank r reads the sum of every writer of a lower rank; blocks that run in
parallel (GPT-NeoX) share a rank. `logits` is the last node: it reads everything and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import networkx as nx

from patchc.ir.bits import bits, bitset

Nodes = int
"""A set of node numbers as bits."""


class Kind(StrEnum):
    """What a node is."""

    EMBED = "embed"
    POS_EMBED = "pos_embed"
    HEAD = "head"
    ATTN_BIAS = "attn_bias"
    MLP = "mlp"
    LOGITS = "logits"


PORTS = ("q", "k", "v")
Q, K, V = 0, 1, 2
QKV = 7
"""All ports of a head, as bits: q = 1, k = 2, v = 4."""


@dataclass(frozen=True, slots=True)
class Node:
    """A writer (or the logits). `rank` places it in the residual order; `block` is the index of its block."""

    id: int
    kind: Kind
    rank: int
    block: int
    layer: int | None = None
    head: int | None = None

    @property
    def name(self) -> str:
        """The node as a spec writes it: `head[0, 1]`, `mlp[2]`, `embed`."""
        if self.kind is Kind.HEAD:
            return f"head[{self.layer}, {self.head}]"
        return self.kind.value if self.layer is None else f"{self.kind}[{self.layer}]"


@dataclass(frozen=True, slots=True)
class Reader:
    """A place that reads the stream: a head's q, k or v (`port` 0, 1, 2), an MLP's input or the logits (`port`
    None)."""

    node: Node
    port: int | None = None

    @property
    def name(self) -> str:
        return self.node.name if self.port is None else f"{self.node.name}.{PORTS[self.port]}"


class BlockKind(StrEnum):
    """What a block computes from the stream that it reads."""

    EMBED = "embed"
    ATTENTION = "attention"
    MLP = "mlp"


@dataclass(frozen=True, slots=True)
class Block:
    """A part of the model that writes at one rank. Its nodes are numbered `first` .. `first + size - 1`; in an
    attention block the heads come first, then the bias where there is one. With `post_norm` what they write together
    is normalised before it is added to the stream (Gemma 2, OLMo 2). An MLP's own norm is a part of its node:
    `neurons_add_up` says whether what it writes is the sum of what its neurons write, so that there is none."""

    kind: BlockKind
    rank: int
    first: int
    size: int
    layer: int | None = None
    post_norm: bool = False
    neurons_add_up: bool = True

    @property
    def nodes(self) -> Nodes:
        return ((1 << self.size) - 1) << self.first


@dataclass(frozen=True)
class ResidualGraph:
    """A model's residual graph.

    `causal` is proved when the model is traced: attention reads no later position. Where it is False the compiler
    assumes that every position can change every other.
    """

    model: str
    n_layers: int
    n_heads: int
    d_model: int
    d_head: int
    d_vocab: int
    blocks: tuple[Block, ...]
    nodes: tuple[Node, ...]
    n_kv_heads: int = 0
    d_mlp: int = 0
    n_ctx: int = 0
    causal: bool = True

    # ---- numbers
    @property
    def top(self) -> int:
        """The rank of the logits."""
        return self.nodes[-1].rank

    @property
    def logits(self) -> Node:
        return self.nodes[-1]

    @cached_property
    def all(self) -> Nodes:
        """`any`: every node that writes."""
        return (1 << (len(self.nodes) - 1)) - 1

    @cached_property
    def logits_set(self) -> Nodes:
        return 1 << self.logits.id

    def of(self, *kinds: Kind) -> Nodes:
        """Every node of these kinds."""
        return bitset(n.id for n in self.nodes if n.kind in kinds)

    @cached_property
    def heads(self) -> Nodes:
        return self.of(Kind.HEAD)

    @cached_property
    def last_attention(self) -> int:
        """The highest rank at which attention stands; -1 where there is none."""
        return max((b.rank for b in self.blocks if b.kind is BlockKind.ATTENTION), default=-1)

    @cached_property
    def mlps(self) -> Nodes:
        return self.of(Kind.MLP)

    @cached_property
    def input(self) -> Nodes:
        """The writers at the bottom: token and position embeddings together."""
        return self.of(Kind.EMBED, Kind.POS_EMBED)

    def below(self, rank: int) -> Nodes:
        """Every node of a lower rank."""
        return bitset(n.id for n in self.nodes if n.rank < rank)

    def members(self, nodes: Nodes) -> list[Node]:
        return [self.nodes[i] for i in bits(nodes)]

    # ---- look-up
    @cached_property
    def _by_place(self) -> dict[tuple[Kind, int | None, int | None], Node]:
        return {(n.kind, n.layer, n.head): n for n in self.nodes}

    def node(self, kind: Kind, layer: int | None = None, head: int | None = None) -> Node | None:
        return self._by_place.get((kind, layer, head))

    def layer_block(self, kind: BlockKind, layer: int) -> Block | None:
        """The attention or MLP block of a layer."""
        return next((b for b in self.blocks if b.kind is kind and b.layer == layer), None)

    def stream_name(self, rank: int) -> str:
        """The stream below a rank as a spec writes it: `resid_pre[2]`, after the last layer `resid_post[3]`."""
        layer = next((b.layer for b in self.blocks if b.rank >= rank and b.layer is not None), None)
        if layer is None:
            return f"resid_post[{self.n_layers - 1}]"
        is_first = all(b.rank >= rank for b in self.blocks if b.layer == layer)
        return f"resid_pre[{layer}]" if is_first else f"resid_mid[{layer}]"

    # ---- as AutoCircuit and ACDC count
    @cached_property
    def writers(self) -> tuple[tuple[str, Nodes], ...]:
        """(name, nodes): `input` (embeddings together), every head, every MLP; constants are none."""
        own = (n for n in self.nodes if n.kind in (Kind.HEAD, Kind.MLP))
        return (("input", self.input), *((n.name, 1 << n.id) for n in own))

    @cached_property
    def readers(self) -> tuple[Reader, ...]:
        """Every head's q, k and v, every MLP and the logits, in residual order."""
        out: list[Reader] = []
        for n in self.nodes:
            if n.kind is Kind.HEAD:
                out += [Reader(n, p) for p in (Q, K, V)]
            elif n.kind in (Kind.MLP, Kind.LOGITS):
                out.append(Reader(n))
        return tuple(out)

    @cached_property
    def n_edges(self) -> int:
        """Pairs of a writer and a reader above it."""
        ranks = [self.nodes[next(bits(nodes))].rank for _, nodes in self.writers]
        return sum(rank < reader.node.rank for reader in self.readers for rank in ranks)

    def is_edge(self, writer: Node, reader: Node) -> bool:
        return writer.rank < reader.rank and writer.kind is not Kind.LOGITS

    def to_networkx(self) -> nx.DiGraph[str]:
        """Writers and readers as a graph; a node's attributes are `kind`, `rank`, `layer`, `head`, an edge's
        `ports`."""
        g: nx.DiGraph[str] = nx.DiGraph(model=self.model, causal=self.causal)
        for n in self.nodes:
            g.add_node(n.name, kind=n.kind.value, rank=n.rank, layer=n.layer, head=n.head)
        for reader in self.nodes:
            ports = list(PORTS) if reader.kind is Kind.HEAD else ["in"]
            if reader.kind in (Kind.HEAD, Kind.MLP, Kind.LOGITS):
                g.add_edges_from((w.name, reader.name, {"ports": ports}) for w in self.nodes if self.is_edge(w, reader))
        return g


def residual_graph(
    model: str,
    *,
    n_layers: int,
    n_heads: int,
    d_model: int,
    d_head: int,
    d_vocab: int,
    has_pos_embed: bool,
    has_mlp: bool | tuple[bool, ...] = True,
    has_attn_bias: bool | tuple[bool, ...] = True,
    parallel: bool = False,
    n_kv_heads: int = 0,
    d_mlp: int = 0,
    n_ctx: int = 0,
    causal: bool = True,
    post_norm: bool = False,
    neurons_add_up: bool = True,
) -> ResidualGraph:
    """The graph of a decoder: embeddings, then attention and an MLP a layer (one rank for both where `parallel`).

    `has_mlp` and `has_attn_bias` may differ from layer to layer. `post_norm`: attention's output passes a norm on its
    way into the stream. `neurons_add_up`: that of MLPs does not.
    """
    mlp = (has_mlp,) * n_layers if isinstance(has_mlp, bool) else has_mlp
    bias = (has_attn_bias,) * n_layers if isinstance(has_attn_bias, bool) else has_attn_bias
    blocks: list[Block] = []
    nodes: list[Node] = []

    def block(kind: BlockKind, rank: int, layer: int | None, members: list[tuple[Kind, int | None]]) -> None:
        first, index = len(nodes), len(blocks)
        nodes.extend(Node(first + i, k, rank, index, layer, h) for i, (k, h) in enumerate(members))
        normed, adds_up = post_norm and kind is BlockKind.ATTENTION, neurons_add_up or kind is not BlockKind.MLP
        blocks.append(Block(kind, rank, first, len(members), layer, normed, adds_up))

    embeddings: list[tuple[Kind, int | None]] = [(Kind.EMBED, None)]
    block(BlockKind.EMBED, 0, None, embeddings + ([(Kind.POS_EMBED, None)] if has_pos_embed else []))
    rank = 1
    for layer in range(n_layers):
        heads: list[tuple[Kind, int | None]] = [(Kind.HEAD, h) for h in range(n_heads)]
        block(BlockKind.ATTENTION, rank, layer, heads + ([(Kind.ATTN_BIAS, None)] if bias[layer] else []))
        rank += not (parallel and mlp[layer])
        if mlp[layer]:
            block(BlockKind.MLP, rank, layer, [(Kind.MLP, None)])
            rank += 1
    nodes.append(Node(len(nodes), Kind.LOGITS, rank, len(blocks)))
    return ResidualGraph(
        model,
        n_layers,
        n_heads,
        d_model,
        d_head,
        d_vocab,
        tuple(blocks),
        tuple(nodes),
        n_kv_heads or n_heads,
        d_mlp,
        n_ctx,
        causal,
    )
