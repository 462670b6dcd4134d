"""`circuit(...)`: the full paths, from the input to the logits, that stay in a set of nodes or of edges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from patchc.diagnostics import RULES, Span
from patchc.ir.bits import bits
from patchc.ir.graph import PORTS, Kind, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Edges, Seq, Site, Star, Step
from patchc.resolve.legality import BACKWARD_EDGE
from patchc.resolve.scope import NOT_SUPPORTED_YET, WRONG_KIND
from patchc.resolve.terms import Chain, Either, Member, NodeSet, Ready, Repeat, Term, of_nodes

EMPTY_CIRCUIT = RULES.add("empty-circuit", "a circuit that holds no path from the input to the logits")

NEEDS = "a circuit is a set of nodes, or edges (`a -> b`) one by one"

Rows = dict[tuple[int, int], Nodes]
"""For each reader (node, port; port -1 where it has one input) the writers that are joined to it."""


def circuit(graph: ResidualGraph, parts: Sequence[Term], span: Span | None) -> Term:
    """The paths of a circuit that is given by its nodes, or by its edges."""
    if not parts:
        raise WRONG_KIND.error(NEEDS, span=span)
    if all(isinstance(p, NodeSet) for p in parts):
        return _of_nodes(graph, [m for p in parts if isinstance(p, NodeSet) for m in p.members], span)
    rows: Rows = {}
    for part in parts:
        for writer, reader in _edges(part, span):
            _join(graph, rows, writer, reader)
    return _of_edges(graph, rows, span)


def _of_nodes(graph: ResidualGraph, members: Sequence[Member], span: Span | None) -> Chain:
    inside = tuple(m for m in members if not m.nodes & graph.logits_set)
    starts = tuple(m for m in inside if not m.nodes & ~graph.input)
    if not starts:
        raise _empty(span)
    return Chain((NodeSet(starts, span), Repeat(NodeSet(inside, span), span), _logits(graph, span)), span)


def _logits(graph: ResidualGraph, span: Span | None) -> NodeSet:
    return NodeSet(of_nodes(graph, graph.logits_set), span)


def _empty(span: Span | None):
    message = "no path from the input to the logits is in this circuit: its first nodes are not `input`'s"
    return EMPTY_CIRCUIT.error(message, fix="add `input`, or `embed`", span=span)


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


def _join(graph: ResidualGraph, rows: Rows, writer: NodeSet, reader: NodeSet) -> None:
    """Add every edge from `writer` to `reader` that the model has; it is an error if it has none."""
    found = False
    for member in (*writer.members, *reader.members):
        if member.tokens != EVERYWHERE:
            raise NOT_SUPPORTED_YET.error("a circuit of edges at positions is not supported yet", span=reader.span)
    for member in reader.members:
        for node in bits(member.nodes):
            below = _writers(writer) & graph.below(graph.nodes[node].rank)
            for port in _ports(graph, member, node, reader.span) if below else ():
                rows[node, port] = rows.get((node, port), 0) | below
                found = True
    if not found:
        message = f"{writer.label} writes after {reader.label} reads: there is no edge from the one to the other"
        raise BACKWARD_EDGE.error(message, span=reader.span)


def _writers(nodes: NodeSet) -> Nodes:
    for member in nodes.members:
        if member.site not in (Site.OUT, Site.ATTN_OUT):
            raise WRONG_KIND.error(f"an edge leaves a whole node, not {member.name}", span=nodes.span)
    return nodes.nodes


def _ports(graph: ResidualGraph, member: Member, node: int, span: Span | None) -> Sequence[int]:
    if graph.nodes[node].kind is not Kind.HEAD:
        return (-1,) if graph.nodes[node].kind in (Kind.MLP, Kind.LOGITS) else ()
    if not member.ports:
        raise WRONG_KIND.error(f"no edge enters {member.name}; the ports of a head are .q .k .v", span=span)
    return [p for p in range(len(PORTS)) if member.ports >> p & 1]


def _of_edges(graph: ResidualGraph, rows: Rows, span: Span | None) -> Ready:
    edges = Edges(tuple(sorted(rows.items())))
    writers = 0
    for joined in rows.values():
        writers |= joined
    if not writers & graph.input or (graph.logits.id, -1) not in rows:
        raise _empty(span)
    start, inside = Step(writers & graph.input, via=edges), Step(writers, via=edges)
    return Ready(Seq((start, Star(inside), Step(graph.logits_set))), span)
