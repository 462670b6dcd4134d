"""The sites of a model as a plain run has them: how each is read, how wide it is, and what its noise is called.

What values, noise and metrics have in common when they name a site; which values enter there is `stored`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from patchc.execute.base import PlainRun
from patchc.ir.bits import bits
from patchc.ir.experiment import Probe
from patchc.ir.graph import PORTS, BlockKind, Kind, Node
from patchc.ir.paths import Site
from patchc.model.pieces import Pieces

PORT_SITES = (Site.Q, Site.K, Site.V)


@dataclass(frozen=True, slots=True)
class Place:
    """One site of one node, or of the stream. `read` gives it at every token, `[token, width]`; `name` is the one that
    `execute.noise` goes by. Attention scores and patterns are as wide as their prompt: width 0."""

    name: str
    width: int
    read: Callable[[PlainRun], Tensor]


def node_place(pieces: Pieces, node: Node, site: Site) -> Place:
    """A site of a node that writes."""
    graph, block, layer = pieces.graph, node.block, node.layer
    if node.kind is Kind.MLP and layer is not None:
        if site is Site.IN:
            return Place(f"{node.name}.in", graph.d_model, lambda run: run.stream[node.rank])
        if site is Site.POST:
            return Place(f"{node.name}.post", graph.d_mlp, lambda run: pieces.mlp_post(layer, run.stream[node.rank]))
        return Place(node.name, graph.d_model, lambda run: run.mlp[block])
    if node.kind is Kind.ATTN_BIAS and layer is not None:
        bias = pieces.attn_bias(layer)
        assert bias is not None
        return Place(node.name, graph.d_model, lambda run: bias.expand_as(run.stream[0]))
    if node.head is None or layer is None:
        member = node.id - graph.blocks[block].first
        return Place(node.name, graph.d_model, lambda run: run.embed[member])
    head = node.head
    if site is Site.OUT:
        return Place(
            node.name, graph.d_model, lambda run: pieces.write(layer, run.attention[block].z[:, [head]], [head])
        )
    if site is Site.Z:
        return Place(f"{node.name}.z", graph.d_head, lambda run: run.attention[block].z[:, head])
    if site in (Site.SCORES, Site.PATTERN):
        return Place(f"{node.name}.{site}", 0, _not_kept)
    return port_place(pieces, node, PORT_SITES.index(site))


def _not_kept(run: PlainRun) -> Tensor:
    raise AssertionError("plain runs keep no attention scores: `patterns` computes the rows that are asked for")


def port_place(pieces: Pieces, node: Node, port: int) -> Place:
    """A head's view of its q, k or v, before rotary."""
    assert node.head is not None
    column = node.head if port == 0 else pieces.kv_head(node.head)
    name = f"{node.name}.{PORTS[port]}"
    return Place(name, pieces.graph.d_head, lambda run: run.attention[node.block].raw[port][:, column])


def attn_out_place(pieces: Pieces, block: int) -> Place:
    """What a layer's attention adds to the stream."""
    layer = pieces.graph.blocks[block].layer
    assert layer is not None
    bias = pieces.attn_bias(layer)

    def read(run: PlainRun) -> Tensor:
        if block in run.written:
            return pieces.post_norm(layer, run.written[block])
        out = pieces.write(layer, run.attention[block].z)
        return out if bias is None else out + bias

    return Place(f"attn_out[{layer}]", pieces.graph.d_model, read)


def stream_place(pieces: Pieces, rank: int) -> Place:
    """The stream below a rank."""
    return Place(f"stream[{rank}]", pieces.graph.d_model, lambda run: run.stream[rank])


def written_places(pieces: Pieces, block: int, members: int, site: Site) -> list[Place]:
    """Where the members of a block (bits) write, one by one; the whole of an attention block is one place."""
    if site is Site.ATTN_OUT:
        return [attn_out_place(pieces, block)]
    first, graph = pieces.graph.blocks[block].first, pieces.graph
    nodes = [graph.nodes[first + i] for i in bits(members)]
    return [node_place(pieces, node, site) for node in nodes if node.kind is not Kind.ATTN_BIAS]


def probe_place(pieces: Pieces, probe: Probe) -> Place:
    """Where a metric reads."""
    if probe.site is Site.STREAM:
        return stream_place(pieces, probe.rank)
    node = pieces.graph.nodes[next(bits(probe.nodes))]
    if probe.site is Site.ATTN_OUT:
        assert pieces.graph.blocks[node.block].kind is BlockKind.ATTENTION
        return attn_out_place(pieces, node.block)
    return node_place(pieces, node, probe.site)
