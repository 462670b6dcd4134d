"""Sets of nodes and of paths while they are resolved: members that know their names, and terms made of them.

A member can be a start or a later step; which of the two, and so what its site means, is settled by `paths`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from patchc.diagnostics import RULES, Span
from patchc.ir.bits import bits
from patchc.ir.graph import PORTS, QKV, Nodes, Reader, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Edges, Site
from patchc.ir.tokens import Tokens

BAD_DIFFERENCE = RULES.add("bad-difference", "`-` takes a part out of something that has no such parts")


@dataclass(frozen=True, slots=True)
class Member:
    """One thing that a path can start at or step through, as a spec names it.

    `site` is what a start replaces; `ports` are those that a later step enters (0: it cannot be a later
    step); `tokens` is what `@` says; `rank` is the stream's, for `Site.STREAM`; `sources` are the positions
    looked at, of patterns and scores; `neurons` those of an MLP's (bits; -1: every); `kv` is the number of a
    key-value head, whose query heads the nodes are.
    """

    name: str
    nodes: Nodes
    site: Site = Site.OUT
    ports: int = QKV
    tokens: Tokens = EVERYWHERE
    rank: int = -1
    sources: Tokens = EVERYWHERE
    neurons: int = -1
    kv: int = -1

    @property
    def label(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True, eq=False)
class NodeSet:
    """Several members, in order."""

    members: tuple[Member, ...]
    span: Span | None = None

    @property
    def nodes(self) -> Nodes:
        out = 0
        for member in self.members:
            out |= member.nodes
        return out

    @property
    def label(self) -> str:
        return " | ".join(m.name for m in self.members)


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """One after another: `a -> b`."""

    parts: tuple[Term, ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Either:
    """Any one of several paths: `(a -> b) | (c -> d)`."""

    parts: tuple[Term, ...]
    span: Span | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Repeat:
    """Any number of times: `a*`."""

    part: Term
    span: Span | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Circuit:
    """The full paths, from the input to what is measured, that stay in a set of nodes (`inside`, the input's among
    them), or in one of edges: `edges` too, with the tokens at which a reader's port is entered where that is not
    everywhere, by (node number, port; port -1 where it has one input)."""

    inside: NodeSet
    edges: Edges | None = None
    tokens: tuple[tuple[tuple[int, int], Tokens], ...] = ()
    span: Span | None = None

    def starts(self, graph: ResidualGraph) -> tuple[Member, ...]:
        """The input's nodes."""
        return tuple(m for m in self.inside.members if not m.nodes & ~graph.input)


Term = NodeSet | Chain | Either | Repeat | Circuit


# ---- members of a graph


def of_reader(reader: Reader) -> Member:
    """A head's q, k or v, an MLP's input, the logits."""
    if reader.port is None:
        return Member(reader.name, 1 << reader.node.id)
    return Member(reader.name, 1 << reader.node.id, Site(PORTS[reader.port]), 1 << reader.port)


def of_nodes(graph: ResidualGraph, nodes: Nodes) -> tuple[Member, ...]:
    """A member for each node."""
    return tuple(Member(n.name, 1 << n.id) for n in graph.members(nodes))


def of_input(graph: ResidualGraph) -> Member:
    """`input`: the embeddings together."""
    return Member("input", graph.input)


# ---- operations on sets


def union(sets: Iterable[NodeSet], span: Span | None) -> NodeSet:
    """The members of all sets, each once, in the order in which they are written."""
    return NodeSet(tuple(dict.fromkeys(m for s in sets for m in s.members)), span)


def placed(nodes: NodeSet, tokens: Tokens, span: Span | None) -> NodeSet:
    """The same members at these tokens only."""
    return NodeSet(tuple(replace(m, tokens=m.tokens & tokens) for m in nodes.members), span)


def joined(members: Iterable[Member]) -> list[Member]:
    """The same with the neurons of one MLP as one member, which has the first one's name."""
    out: dict[Member, Member] = {}
    for m in members:
        key = replace(m, name="", neurons=0) if m.site is Site.POST else m
        before = out.setdefault(key, m)
        if before is not m:
            out[key] = replace(before, neurons=before.neurons | m.neurons)
    return list(out.values())


@dataclass(frozen=True)
class Difference:
    """`a - b`: what `b` enters (its nodes, at its ports and tokens) is taken out of `a`.

    `everything` gives every token of the prompts.
    """

    graph: ResidualGraph
    everything: Callable[[], Tokens]

    def of(self, whole: NodeSet, less: NodeSet, span: Span | None) -> NodeSet:
        members = whole.members
        for taken in joined(less.members):
            members = tuple(left for m in members for left in self._without(m, taken, span))
        return NodeSet(members, span)

    def _without(self, member: Member, taken: Member, span: Span | None) -> list[Member]:
        common = member.nodes & taken.nodes
        if not common or (Site.STREAM in (member.site, taken.site) and member.site is not taken.site):
            return [member]
        if Site.STREAM is member.site and member.rank != taken.rank:
            return [member]
        whole = {Site.ATTN_OUT, Site.STREAM}
        if (member.site in whole and common != member.nodes) or (
            taken.site in _ENTRIES and member.site is not taken.site
        ):
            raise BAD_DIFFERENCE.error(
                f"{member.name} is one thing, and {taken.name} cannot be taken out of it", span=span
            )
        if taken.site in _ENTRIES:
            return self._other_entries(member, taken, common)
        return self._rest(member, taken, common)

    def _other_entries(self, member: Member, taken: Member, common: Nodes) -> list[Member]:
        """Other nodes; of the common ones other neurons, other rows, and in the same rows other columns."""
        inner = replace(member, nodes=common)
        neurons = member.neurons & taken.neurons
        tokens, sources = member.tokens & taken.tokens, member.sources & taken.sources
        if not (neurons and tokens and sources):
            return [member]
        parts = [
            replace(member, nodes=member.nodes & ~common),
            replace(inner, neurons=self._neurons(member.neurons & ~neurons)),
            replace(inner, neurons=neurons, tokens=self._tokens(member.tokens & ~tokens)),
            replace(inner, neurons=neurons, tokens=tokens, sources=self._tokens(member.sources & ~sources)),
        ]
        return [p for p in parts if p.nodes and p.neurons and p.tokens and p.sources]

    def _neurons(self, neurons: int) -> int:
        return neurons & ((1 << self.graph.d_mlp) - 1) if neurons < 0 else neurons

    def _tokens(self, tokens: Tokens) -> Tokens:
        """A set that is everywhere but somewhere, as a finite one."""
        return tokens & self.everything() if tokens < 0 else tokens

    def _rest(self, member: Member, taken: Member, common: Nodes) -> list[Member]:
        """Other nodes; the common ones at other ports; and at the common ports at other tokens."""
        ports = member.ports & taken.ports if taken.site in _ENTERED else member.ports
        if member.ports and not ports:
            return [member]
        tokens = self._tokens(member.tokens & ~taken.tokens)
        parts = [replace(member, nodes=member.nodes & ~common)]
        if member.ports & ~ports:
            parts.append(replace(member, nodes=common, ports=member.ports & ~ports))
        if tokens:
            parts.append(replace(member, nodes=common, ports=ports, tokens=tokens))
        return [self._renamed(p) for p in parts if p.nodes]

    def _renamed(self, member: Member) -> Member:
        if member.site is not Site.OUT:
            return member
        names = " | ".join(self.graph.nodes[i].name for i in bits(member.nodes))
        is_input = member.nodes == self.graph.input
        ports = "".join(PORTS[i] for i in bits(member.ports))
        suffix = "" if member.ports == QKV else f".{{{', '.join(ports)}}}" if len(ports) > 1 else f".{ports}"
        return replace(member, name=("input" if is_input else names) + suffix)


_ENTERED = (Site.OUT, Site.Q, Site.K, Site.V)
"""Sites that say which ports a later step enters."""

_ENTRIES = (Site.PATTERN, Site.SCORES, Site.POST)
"""Sites that have parts of their own: entries and neurons."""


def is_head(graph: ResidualGraph, member: Member) -> bool:
    """Whether the member is one head, or one port or site of one."""
    return (
        member.nodes & graph.heads == member.nodes
        and member.nodes.bit_count() == 1
        and member.site is not Site.ATTN_OUT
    )
