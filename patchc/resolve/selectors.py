"""Selectors of the language's own node names: `head[l, h].q`, `mlp[l]`, `resid_pre[l]`, `any`, `writers`.

Names that the spec gives (lets, loop variables) are for `sets`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from patchc.diagnostics import RULES, Span, closest
from patchc.ir.bits import bits, bitset
from patchc.ir.graph import PORTS, QKV, BlockKind, Kind, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Site
from patchc.parse import tree
from patchc.parse.elsewhere import site_meant
from patchc.resolve.bindings import Env
from patchc.resolve.indices import UNKNOWN_NODE, Axis, Indexer
from patchc.resolve.places import Places
from patchc.resolve.scope import WRONG_KIND, written
from patchc.resolve.terms import Member, NodeSet, of_input, of_nodes, of_reader

UNKNOWN_SITE = RULES.add("unknown-site", "a site that the node does not have")

STREAMS = ("resid_pre", "resid_mid", "resid_post")


class Selectors:
    """The node names of one model."""

    def __init__(self, graph: ResidualGraph, indexer: Indexer, places: Places):
        self._graph = graph
        self._indexer = indexer
        self._places = places

    def select(self, node: tree.Ref, env: Env) -> NodeSet:
        """What a built-in name with its indices stands for, its sites left aside."""
        name = node.name.text
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

    @property
    def described_kv(self) -> str:
        """`the model has layers 0..3, key-value heads 0..1`."""
        return f"the model has layers 0..{self._graph.n_layers - 1}, key-value heads 0..{self._graph.n_kv_heads - 1}"

    def layers(self) -> Axis:
        return Axis("layer", self._graph.n_layers, self.described)

    def _axes(self, name: str) -> tuple[Axis, ...]:
        if name == "head":
            return (self.layers(), Axis("head", self._graph.n_heads, self.described))
        if name == "kv":
            return (self.layers(), Axis("key-value head", self._graph.n_kv_heads, self.described_kv))
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
            case "kv":
                places = product(range(graph.n_layers), range(graph.n_kv_heads))
                return tuple(self._member(name, place, span) for place in places if self._has(name, place))
            case _:
                layers = range(graph.n_layers)
                return tuple(self._member(name, (layer,), span) for layer in layers if self._has(name, (layer,)))

    # ---- one member

    def _member(self, name: str, place: Sequence[int], span: Span | None) -> Member:
        if name in STREAMS:
            return self._stream(name, place[0], span)
        if name == "attn_out":
            return self._attn_out(place[0], span)
        if name == "kv":
            return self._kv(place[0], place[1], span)
        found = self._graph.node(Kind(name), *place)
        if found is None:
            raise self._no(f"{name}[{', '.join(map(str, place))}]", name, span)
        return Member(found.name, 1 << found.id)

    def _kv(self, layer: int, group: int, span: Span | None) -> Member:
        """A key-value head: the query heads that it serves, to be entered and replaced together."""
        size = self._graph.n_heads // self._graph.n_kv_heads
        found = [self._graph.node(Kind.HEAD, layer, h) for h in range(group * size, (group + 1) * size)]
        if None in found:
            raise self._no(f"kv[{layer}, {group}]", "head", span)
        return Member(f"kv[{layer}, {group}]", bitset(n.id for n in found if n), ports=0, kv=group)

    def _attn_out(self, layer: int, span: Span | None) -> Member:
        block = self._graph.layer_block(BlockKind.ATTENTION, layer)
        if block is None:
            raise self._no(f"attn_out[{layer}]", "head", span)
        return Member(f"attn_out[{layer}]", block.nodes, Site.ATTN_OUT)

    def _has(self, name: str, place: Sequence[int]) -> bool:
        """Whether the model has this member."""
        if name in ("attn_out", "kv"):
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

    def at_sites(self, nodes: NodeSet, sites: Sequence[tree.Site], env: Env, span: Span | None) -> NodeSet:
        """The members at their sites; with several sites, each member at each; of neurons, a member for each."""
        if not sites:
            return nodes
        if len(sites) > 1:
            raise UNKNOWN_SITE.error("a site has no further site", span=sites[1].span)
        site = sites[0]
        names = [self._name(name, site) for name in site.names]
        for m in nodes.members:
            for n in names:
                self._check_has(m, n, site.span)
        make = self._entries(site, env) if site.indices else _whole
        return NodeSet(tuple(part for m in nodes.members for n in names for part in make(m, n)), span)

    def _name(self, name: tree.Name, site: tree.Site) -> Site:
        """A site that some node has, with as many indices as it can have."""
        if name.text not in TAKES:
            message = f"no site .{name.text}: a head has {HEAD_SITES.told}, an MLP {MLP_SITES.told}"
            raise UNKNOWN_SITE.error(message, fix=_site_fix(name.text), span=name.span)
        takes = TAKES[name.text]
        if len(site.indices) > len(takes):
            what = f"takes {len(takes)} ({' and '.join(takes)})" if takes else "takes no index"
            raise UNKNOWN_SITE.error(f".{name.text} {what}", span=site.span)
        return Site(name.text)

    def _check_has(self, member: Member, site: Site, span: Span | None) -> None:
        sites = self._sites_of(member)
        if sites is None:
            message = f"{member.name} has no site .{site}; a head has {HEAD_SITES.told}, an MLP {MLP_SITES.told}"
            raise UNKNOWN_SITE.error(message, span=span)
        if site.value not in sites.names:
            raise UNKNOWN_SITE.error(f"{member.name} has no site .{site}; {sites}", span=span)

    def _sites_of(self, member: Member) -> Sites | None:
        if member.kv >= 0:
            return KV_SITES
        if member.site is not Site.OUT or member.nodes.bit_count() != 1:
            return None
        kind = self._graph.nodes[next(bits(member.nodes))].kind
        return {Kind.HEAD: HEAD_SITES, Kind.MLP: MLP_SITES}.get(kind)

    def _entries(self, site: tree.Site, env: Env) -> Callable[[Member, Site], Sequence[Member]]:
        """What gives a member's part that the indices of a site name."""
        if Site(site.names[0].text) is Site.POST:
            axis = Axis("neuron", self._graph.d_mlp, f"an MLP has neurons 0..{self._graph.d_mlp - 1}")
            neurons = self._indexer.all_of(site.indices[0], axis, env, f"neuron {written(site.indices[0])}")
            return lambda m, n: [replace(_at(m, n, f"[{i}]"), neurons=1 << i) for i in neurons]
        places = [self._places.tokens(i, env) for i in site.indices]
        sources = places[1] if len(places) > 1 else EVERYWHERE
        label = f"[{', '.join(map(written, site.indices))}]"
        return lambda m, n: [replace(_at(m, n, label), tokens=m.tokens & places[0], sources=sources)]


@dataclass(frozen=True, slots=True)
class Sites:
    """The sites of a kind of node."""

    what: str
    names: tuple[str, ...]

    @property
    def told(self) -> str:
        return " ".join(f".{name}" for name in self.names)

    def __str__(self) -> str:
        return f"{self.what} has {self.told}"


HEAD_SITES = Sites("a head", ("q", "k", "v", "z", "pattern", "scores"))
MLP_SITES = Sites("an MLP", ("in", "post"))
KV_SITES = Sites("a key-value head", ("k", "v"))
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys((*HEAD_SITES.names, *MLP_SITES.names), ()),
    **dict.fromkeys(("pattern", "scores"), ("the position that asks", "the one looked at")),
    "post": ("a neuron",),
}
"""What the indices of each site count."""


def _site_fix(name: str) -> str | None:
    known = site_meant(name)
    if known == "":
        return f"leave `.{name}` out: a node by itself is what it writes"
    meant = known if known in TAKES else closest(name, TAKES)
    return f"did you mean `.{meant}`?" if meant else None


def _whole(member: Member, site: Site) -> Sequence[Member]:
    return (_at(member, site, ""),)


def _at(member: Member, site: Site, indices: str) -> Member:
    """A member at one of its sites; an MLP's `.in` can be entered, as the MLP itself can."""
    ports = 1 << PORTS.index(site.value) if site.value in PORTS else QKV if site is Site.IN else 0
    return replace(member, name=f"{member.name}.{site}{indices}", site=site, ports=ports)
