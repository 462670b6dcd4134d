"""Selectors of the language's own node names: `head[l, h].q`, `mlp[l]`, `resid_pre[l]`, `any`, `writers`.

Names that the spec gives (lets, loop variables) are for `sets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import product

from patchc.diagnostics import RULES, Span, closest
from patchc.ir.bits import bits
from patchc.ir.graph import PORTS, BlockKind, Kind, ResidualGraph
from patchc.ir.paths import Site
from patchc.parse import tree
from patchc.resolve.bindings import Env
from patchc.resolve.indices import UNKNOWN_NODE, Axis, Indexer
from patchc.resolve.scope import NOT_SUPPORTED_YET, WRONG_KIND, written
from patchc.resolve.terms import Member, NodeSet, is_head, of_input, of_nodes, of_reader

UNKNOWN_SITE = RULES.add("unknown-site", "a site that the node does not have")

STREAMS = ("resid_pre", "resid_mid", "resid_post")
HEAD_SITES = ("q", "k", "v", "z")
LATER_SITES = ("pattern", "scores", "in", "post")
"""Sites that the language has and this version does not patch."""


class Selectors:
    """The node names of one model."""

    def __init__(self, graph: ResidualGraph, indexer: Indexer):
        self._graph = graph
        self._indexer = indexer

    def select(self, node: tree.Ref, env: Env) -> NodeSet:
        """What a built-in name with its indices stands for, its sites left aside."""
        name = node.name.text
        if name == "kv":
            raise NOT_SUPPORTED_YET.error(
                "kv[l, g] is not supported yet; head[l, h].k is a query head's own", span=node.span
            )
        axes = self._axes(name)
        if len(node.indices) > len(axes):
            units = f"{len(axes)} ({' and '.join(a.unit for a in axes)})" if axes else "none"
            raise WRONG_KIND.error(f"{name} has {len(node.indices)} indices, and takes {units}", span=node.span)
        if not node.indices:
            return NodeSet(self._every(name, node.span), node.span)
        text = written(node)
        picks = [list(self._indexer.all_of(i, a, env, text)) for i, a in zip(node.indices, axes, strict=False)]
        picks += [list(range(a.size)) for a in axes[len(picks) :]]
        # A layer without an MLP is an error where it is asked for, and nothing where `*` or a range
        # passes over it.
        asked = all(isinstance(i, tree.Number | tree.Name | tree.Offset | tree.Parameter) for i in node.indices)
        places = [p for p in product(*picks) if asked or self._has(name, p)]
        return NodeSet(tuple(self._member(name, place, node.span) for place in places), node.span)

    # ---- what the model has

    @cached_property
    def described(self) -> str:
        """`the model has layers 0..3, heads 0..3`."""
        return f"the model has layers 0..{self._graph.n_layers - 1}, heads 0..{self._graph.n_heads - 1}"

    def layers(self) -> Axis:
        return Axis("layer", self._graph.n_layers, self.described)

    def _axes(self, name: str) -> tuple[Axis, ...]:
        if name == "head":
            return (self.layers(), Axis("head", self._graph.n_heads, self.described))
        return (self.layers(),) if name in ("mlp", "attn_out", "attn_bias", *STREAMS) else ()

    def _every(self, name: str, span: Span | None) -> tuple[Member, ...]:
        """Every member of a name without indices."""
        graph = self._graph
        match name:
            case "input":
                return (of_input(graph),)
            case "any":
                return of_nodes(graph, graph.all)
            case "writers":
                return (of_input(graph), *of_nodes(graph, graph.heads | graph.mlps))
            case "readers":
                return tuple(of_reader(r) for r in graph.readers)
            case "head" | "mlp" | "attn_bias" | "embed" | "pos_embed" | "logits":
                return of_nodes(graph, graph.of(Kind(name)))
            case _:
                layers = range(graph.n_layers)
                return tuple(self._member(name, (layer,), span) for layer in layers if self._has(name, (layer,)))

    # ---- one member

    def _member(self, name: str, place: Sequence[int], span: Span | None) -> Member:
        if name in STREAMS:
            return self._stream(name, place[0], span)
        if name == "attn_out":
            return self._attn_out(place[0], span)
        found = self._graph.node(Kind(name), *place)
        if found is None:
            raise self._no(f"{name}[{', '.join(map(str, place))}]", name, span)
        return Member(found.name, 1 << found.id)

    def _attn_out(self, layer: int, span: Span | None) -> Member:
        block = self._graph.layer_block(BlockKind.ATTENTION, layer)
        if block is None:
            raise self._no(f"attn_out[{layer}]", "head", span)
        return Member(f"attn_out[{layer}]", block.nodes, Site.ATTN_OUT)

    def _has(self, name: str, place: Sequence[int]) -> bool:
        """Whether the model has this member."""
        if name == "attn_out":
            return self._graph.layer_block(BlockKind.ATTENTION, place[0]) is not None
        if name in STREAMS:
            return self._stream_rank(name, place[0]) is not None
        return self._graph.node(Kind(name), *place) is not None

    def _stream(self, name: str, layer: int, span: Span | None) -> Member:
        rank = self._stream_rank(name, layer)
        if rank is None:
            message = f"no resid_mid[{layer}]: its attention and its MLP do not stand one after the other"
            raise UNKNOWN_NODE.error(message, fix=f"write `resid_pre[{layer}]` or `resid_post[{layer}]`", span=span)
        return Member(f"{name}[{layer}]", self._graph.below(rank), Site.STREAM, 0, rank=rank)

    def _stream_rank(self, name: str, layer: int) -> int | None:
        """The stream at a point is what the blocks from this rank on read."""
        blocks = [b.rank for b in self._graph.blocks if b.layer == layer]
        if name == "resid_pre":
            return min(blocks)
        return self._middle(layer) if name == "resid_mid" else max(blocks) + 1

    def _middle(self, layer: int) -> int | None:
        attention = self._graph.layer_block(BlockKind.ATTENTION, layer)
        mlp = self._graph.layer_block(BlockKind.MLP, layer)
        return mlp.rank if attention and mlp and attention.rank < mlp.rank else None

    def _no(self, node: str, kind: str, span: Span | None):
        having = sorted({n.layer for n in self._graph.nodes if n.kind.value == kind and n.layer is not None})
        where = f"in layers {', '.join(map(str, having))}" if having else "in no layer"
        return UNKNOWN_NODE.error(f"no {node}: the model has {kind} {where}", span=span)

    # ---- sites

    def at_sites(self, nodes: NodeSet, sites: Sequence[tree.Site], span: Span | None) -> NodeSet:
        """The members at their sites; with several sites, each member at each."""
        if not sites:
            return nodes
        if len(sites) > 1:
            raise UNKNOWN_SITE.error("a site has no further site", span=sites[1].span)
        names = [self._site(name, sites[0]) for name in sites[0].names]
        return NodeSet(tuple(self._at(m, n, sites[0].span) for m in nodes.members for n in names), span)

    def _site(self, name: tree.Name, site: tree.Site) -> str:
        if name.text in LATER_SITES:
            raise NOT_SUPPORTED_YET.error(f".{name.text} is not supported yet; a head has .q .k .v .z", span=site.span)
        if name.text not in HEAD_SITES:
            meant = closest(name.text, (*HEAD_SITES, *LATER_SITES))
            message = f"no site .{name.text}: a head has .q .k .v .z"
            raise UNKNOWN_SITE.error(message, fix=f"did you mean `.{meant}`?" if meant else None, span=name.span)
        if site.indices:
            raise UNKNOWN_SITE.error(f".{name.text} takes no index", span=site.span)
        return name.text

    def _at(self, member: Member, site: str, span: Span | None) -> Member:
        if not is_head(self._graph, member) or member.site is not Site.OUT:
            raise UNKNOWN_SITE.error(f"{member.name} has no site .{site}; a head has .q .k .v .z", span=span)
        node = self._graph.nodes[next(bits(member.nodes))]
        ports = 1 << PORTS.index(site) if site in PORTS else 0
        return Member(f"{node.name}.{site}", member.nodes, Site(site), ports, member.tokens)
