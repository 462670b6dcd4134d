"""`circuit(...)`: the full paths, from the input to what is measured, that stay in a set of nodes or of edges.

What a circuit ends at depends on the experiment's metrics, and is for `paths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from patchc.diagnostics import RULES, PatchcError, Span
from patchc.ir.bits import bits
from patchc.ir.graph import PORTS, Kind, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Edges, Site
from patchc.ir.tokens import Tokens
from patchc.resolve.legality import BACKWARD_EDGE, empty_circuit
from patchc.resolve.scope import WRONG_KIND
from patchc.resolve.terms import Chain, Circuit, Difference, Either, Member, NodeSet, Term, of_nodes

EDGE_POSITIONS = RULES.add("edge-positions", "edges of a circuit that enter one place at different positions")

NEEDS = "a circuit is a set of nodes, or edges (`a -> b`) one by one"

Place = tuple[int, int]
"""A reader: node number and port; port -1 where it has one input."""


@dataclass(slots=True)
class _Joined:
    """For each reader the writers that are joined to it, and the tokens at which."""

    writers: dict[Place, Nodes] = field(default_factory=dict[Place, Nodes])
    tokens: dict[Place, Tokens] = field(default_factory=dict[Place, Tokens])


def circuit(graph: ResidualGraph, parts: Sequence[Term], span: Span | None) -> Circuit:
    """A circuit that is given by its nodes, or by its edges."""
    if not parts:
        raise WRONG_KIND.error(NEEDS, span=span)
    if all(isinstance(p, NodeSet) for p in parts):
        found = _of_nodes(graph, [m for p in parts if isinstance(p, NodeSet) for m in p.members], span)
    else:
        rows = _Joined()
        for part in parts:
            for writer, reader in _edges(part, span):
                _join(graph, rows, writer, reader)
        found = _of_edges(graph, rows.writers, rows.tokens, span)
    if not found.starts(graph):
        raise PatchcError([empty_circuit(span)])
    return found


def nodes_of(graph: ResidualGraph, of: Circuit, span: Span | None) -> NodeSet:
    """The nodes of a circuit, the logits aside; the input's as one where it has all of them."""
    inside = of.inside.nodes
    for node, _ in dict(of.edges.rows) if of.edges else ():
        inside |= 1 << node
    inside &= graph.all
    start = inside & graph.input
    first = (Member("input", start),) if start == graph.input else of_nodes(graph, start)
    return NodeSet((*first, *of_nodes(graph, inside & ~graph.input)), span)


def less_nodes(difference: Difference, of: Circuit, less: NodeSet, span: Span | None) -> Circuit:
    """A circuit without some of its nodes, and without every edge into or out of them."""
    graph = difference.graph
    if of.edges is None:
        return _of_nodes(graph, difference.of(of.inside, less, span).members, span)
    for m in less.members:
        if m.site is not Site.OUT or m.tokens != EVERYWHERE:
            raise WRONG_KIND.error(f"whole nodes can be taken out of a circuit of edges, not {m.name}", span=less.span)
    rows = {
        (node, port): writers & ~less.nodes
        for (node, port), writers in of.edges.rows
        if not less.nodes >> node & 1 and writers & ~less.nodes
    }
    return _of_edges(graph, rows, dict(of.tokens), span)


# ---- by nodes


def _of_nodes(graph: ResidualGraph, members: Sequence[Member], span: Span | None) -> Circuit:
    return Circuit(NodeSet(tuple(m for m in members if not m.nodes & graph.logits_set), span), span=span)


# ---- by edges


def _edges(part: Term, span: Span | None) -> Iterator[tuple[NodeSet, NodeSet]]:
    """The pairs of neighbours in a chain, or in each of several chains."""
    match part:
        case Chain(steps) if all(isinstance(s, NodeSet) for s in steps):
            nodes = [s for s in steps if isinstance(s, NodeSet)]
            yield from pairwise(nodes)
        case Either(parts):
            for one in parts:
                yield from _edges(one, span)
        case _:
            raise WRONG_KIND.error(NEEDS, span=part.span or span)


def _join(graph: ResidualGraph, rows: _Joined, writer: NodeSet, reader: NodeSet) -> None:
    """Add every edge from `writer` to `reader` that the model has; it is an error if it has none."""
    below = _writers(writer)
    found = False
    for above in reader.members:
        for node in bits(above.nodes):
            under = graph.below(graph.nodes[node].rank)
            for at, nodes in below.items():
                if writers := nodes & under:
                    places = [(node, p) for p in _ports(graph, above, node, reader.span)]
                    found |= _add(rows, writers, at & above.tokens, places, reader)
    if not found:
        message = f"{writer.label} writes after {reader.label} reads: there is no edge from the one to the other"
        raise BACKWARD_EDGE.error(message, span=reader.span)


def _add(rows: _Joined, writers: Nodes, tokens: Tokens, places: Sequence[Place], reader: NodeSet) -> bool:
    """Join writers to readers; a residual edge stays at its token, so the writer's position is the reader's."""
    for place in places:
        if rows.tokens.setdefault(place, tokens) != tokens:
            message = f"the edges of this circuit into {reader.label} are at different positions"
            fix = "the same `@` at all of them, or full paths one by one"
            raise EDGE_POSITIONS.error(message, fix=fix, span=reader.span)
        rows.writers[place] = rows.writers.get(place, 0) | writers
    return bool(places)


def _writers(nodes: NodeSet) -> dict[Tokens, Nodes]:
    """The nodes that edges leave, by the tokens at which they do."""
    out: dict[Tokens, Nodes] = {}
    for member in nodes.members:
        if member.site not in (Site.OUT, Site.ATTN_OUT) or member.kv >= 0:
            raise WRONG_KIND.error(f"an edge leaves a whole node, not {member.name}", span=nodes.span)
        out[member.tokens] = out.get(member.tokens, 0) | member.nodes
    return out


def _ports(graph: ResidualGraph, member: Member, node: int, span: Span | None) -> Sequence[int]:
    if not member.ports:
        raise WRONG_KIND.error(f"no edge enters {member.name}; the ports of a head are .q .k .v", span=span)
    if graph.nodes[node].kind is not Kind.HEAD:
        return (-1,) if graph.nodes[node].kind in (Kind.MLP, Kind.LOGITS) else ()
    return [p for p in range(len(PORTS)) if member.ports >> p & 1]


def _of_edges(
    graph: ResidualGraph, rows: dict[Place, Nodes], tokens: dict[Place, Tokens], span: Span | None
) -> Circuit:
    writers = 0
    for joined in rows.values():
        writers |= joined
    places = tuple(sorted((place, at) for place, at in tokens.items() if at != EVERYWHERE and place in rows))
    inside = NodeSet(of_nodes(graph, writers), span)
    return Circuit(inside, Edges(tuple(sorted(rows.items()))), places, span)
