"""Terms to paths: what `patch node`, `edge`, `path` and `all` mean, and what each of them has to look like.

A member is read in two ways. As a start its site says what is replaced; later its ports say how it is
entered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from patchc.diagnostics import RULES, PatchcError, Report, Severity, Span
from patchc.ir.bits import bits, bitset
from patchc.ir.graph import QKV, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens
from patchc.resolve.ends import LOGITS, Ends
from patchc.resolve.legality import endless_circuit
from patchc.resolve.scope import WRONG_KIND
from patchc.resolve.terms import Chain, Circuit, Either, Member, NodeSet, Repeat, Term, joined

STAR_START = RULES.add("star-start", "a path starts with a star, so that nothing says where the value enters")
PATH_END = RULES.add("path-end", "a path does not end at the logits, or at another place that a metric reads")
BAD_START = RULES.add("bad-start", "a path starts where no value can enter")
MID_PATH_STREAM = RULES.add("mid-path-stream", "the stream is a start, and no step to go through")
NOT_AN_EDGE = RULES.add("not-an-edge", "`patch edge` with something else than `a -> b`")
NOT_A_PORT = RULES.add("not-a-port", "a later step names a site that no edge enters")
EDGE_OFF_PATH = RULES.add(
    "edge-off-path", "an edge of a circuit that no path from the input to what is measured takes", Severity.WARNING
)
EMPTY_STAR = RULES.add("empty-star", "a star over no nodes, which is taken no times", Severity.NOTE)

EMPTY = Seq(())


class Paths:
    """Terms to paths, for one model. Equal steps are one object. `ends` are the experiment's; each `Ends` object is
    kept, and what depends on it is kept with it."""

    def __init__(self, graph: ResidualGraph, report: Report):
        self._graph = graph
        self._report = report
        self._steps: dict[Step, Step] = {}
        self._built: dict[tuple[int, bool], tuple[Term, Path]] = {}
        self._readers: dict[tuple[int, int], tuple[NodeSet, tuple[tuple[Path, ...], ...]]] = {}
        self._last: dict[int, tuple[Ends, Path]] = {}
        self.rest: Path = Star(self._step(Step(graph.all)))

    def end(self, ends: Ends) -> Path:
        """The logits, or whatever the metrics read."""
        if id(ends) not in self._last:
            self._last[id(ends)] = (ends, _alt([self._step(s) for s in ends.steps(self._graph)]))
        return self._last[id(ends)][1]

    # ---- targets

    def node(self, term: Term, span: Span | None, ends: Ends = LOGITS) -> Path:
        """`patch node n`: `n -> any* -> logits`, and `n` itself where it is read."""
        if not isinstance(term, NodeSet):
            raise WRONG_KIND.error(
                "`patch node` takes nodes, and this is a path", fix="a path is `patch path`", span=term.span or span
            )
        start = self._start(term)
        path = Seq((start, self.rest, self.end(ends)))
        return _alt([path, *self._read_at(start, ends)])

    def _read_at(self, start: Path, ends: Ends) -> list[Path]:
        """The steps of a start at which the metrics read the value itself."""
        if not ends.probes:
            return []
        found = [ends.read_at(s) for s in _parts(start) if isinstance(s, Step)]
        return [self._step(s) for s in found if s is not None]

    def edge(self, term: Term, span: Span | None, ends: Ends = LOGITS) -> Path:
        """`patch edge a -> b`: `a -> b -> any* -> logits`; `a -> b` where paths can end at b."""
        if isinstance(term, Either):
            return _alt([self.edge(part, span, ends) for part in term.parts])
        match term:
            case Chain((NodeSet() as writer, NodeSet() as reader)):
                start, after = self._start(writer), self._after(reader, ends)
                return _alt([Seq((start, *end)) for end in after])
            case _:
                raise NOT_AN_EDGE.error(
                    "an edge is `a -> b`, two sets of nodes", fix="a path is `patch path`", span=term.span or span
                )

    def _after(self, reader: NodeSet, ends: Ends) -> tuple[tuple[Path, ...], ...]:
        """What follows an edge's writer: the reader alone where it is an end, the reader and `any* -> logits`."""
        found = self._readers.get((id(reader), id(ends)))
        if found is None:
            self.end(ends)  # keeps the ends, whose id the key has
            found = self._readers[id(reader), id(ends)] = (reader, self._after_reader(reader, ends))
        return found[1]

    def _after_reader(self, reader: NodeSet, ends: Ends) -> tuple[tuple[Path, ...], ...]:
        members = [(m, ends.is_end(self._graph, m)) for m in reader.members]
        out: list[tuple[Path, ...]] = []
        if last := tuple(m for m, is_end in members if is_end and (ends.certain or self._is_logits(m))):
            out += [(s,) for s in _parts(self._later(NodeSet(last, reader.span), last=True))]
        inner = tuple(m for m in reader.members if not self._is_logits(m) and not (m.site is Site.STREAM and last))
        if inner or not reader.members:
            out.append((self._later(NodeSet(inner, reader.span)), self.rest, self.end(ends)))
        return tuple(out)

    def _is_logits(self, member: Member) -> bool:
        return member.nodes == self._graph.logits_set

    def path(self, term: Term, span: Span | None, ends: Ends = LOGITS) -> Path:
        """`patch path P`: P, which starts at nodes and ends at what is measured."""
        if isinstance(term, NodeSet):
            return self._alone(term, span, ends)
        self._check_start(term, span)
        self._check_end(term, span, ends)
        return self._build(term, True, ends)

    def _alone(self, term: NodeSet, span: Span | None, ends: Ends) -> Path:
        """A path of one step: what is put in is what is read."""
        start = self._start(term)
        found = self._read_at(start, ends)
        if term.members and not found and ends.certain:
            raise self.not_an_end(None, term.span or span, ends)
        return _alt(found or [start])

    def everything(self, ends: Ends) -> Path:
        """`patch all`: the value enters at every edge into the logits, or into what is read."""
        return Seq((self._step(Step(self._graph.all)), self.end(ends)))

    # ---- what a path has to be

    def _check_start(self, term: Term, span: Span | None) -> None:
        match term:
            case Chain(parts):
                self._check_start(parts[0], span)
            case Either(parts):
                for part in parts:
                    self._check_start(part, span)
            case Repeat():
                message = "a path starts at the nodes whose value is replaced, not with a star"
                raise STAR_START.error(
                    message, fix="put those nodes first: `a -> any* -> logits`", span=term.span or span
                )
            case _:
                pass

    def _check_end(self, term: Term, span: Span | None, ends: Ends) -> None:
        match term:
            case Chain(parts):
                self._check_end(parts[-1], span, ends)
            case Either(parts):
                for part in parts:
                    self._check_end(part, span, ends)
            case Circuit():
                pass
            case NodeSet(members) if members:
                for m in members:
                    if not ends.is_end(self._graph, m):
                        raise self.not_an_end(m, term.span or span, ends)
            case _:
                raise self.not_an_end(None, term.span or span, ends)

    def not_an_end(self, member: Member | None, span: Span | None, ends: Ends) -> PatchcError:
        """The error for paths that end at `member`, or at nothing that is measured."""
        if not ends.probes:
            fix = "end it with `-> logits`, or with `-> any* -> logits`"
            return PATH_END.error("a path ends at the logits", fix=fix, span=span)
        here = f"; this one ends at {member.name}" if member else ""
        message = f"a path ends at what is measured, and the metrics read {ends.told(self._graph)}{here}"
        return PATH_END.error(message, fix=f"end it with `-> {ends.example(self._graph)}`", span=span)

    # ---- terms

    def _build(self, term: Term, first: bool, ends: Ends, last: bool = True) -> Path:
        """`first`, `last`: whether the whole path starts, and ends, with this part of it."""
        match term:
            case NodeSet():
                return self._start(term) if first else self._later(term, last)
            case Chain(parts):
                n = len(parts) - 1
                return _seq([self._build(p, first and i == 0, ends, last and i == n) for i, p in enumerate(parts)])
            case Either(parts):
                return _alt([self._build(part, first, ends, last) for part in parts])
            case Repeat(part):
                return self._star(term, part, ends)
            case Circuit():
                if not (first and last):
                    message = "a circuit is full paths, and nothing can stand before or after it"
                    raise WRONG_KIND.error(message, span=term.span)
                return self._circuit(term, ends)

    def _star(self, term: Repeat, part: Term, ends: Ends) -> Path:
        key = (id(term), False)
        if key not in self._built:
            inner = self._build(part, False, ends, False)
            self._built[key] = (term, EMPTY if _is_nothing(inner) else Star(inner))
            if _is_nothing(inner):
                self._report.add(EMPTY_STAR.at(term.span, "there is no node in this star: it is taken no times"))
        return self._built[key][1]

    def _circuit(self, term: Circuit, ends: Ends) -> Path:
        """`input -> (inside)* -> logits`; of a circuit of edges each step leaves by those edges alone."""
        starts = NodeSet(term.starts(self._graph), term.span)
        if term.edges is None:
            return Seq((self._start(starts), Star(self._later(term.inside)), self.end(ends)))
        inside = [self._step(replace(s, via=term.edges)) for s in self._by_tokens(term)]
        last = dict(term.tokens).get((self._graph.logits.id, -1), EVERYWHERE)
        steps = [
            self._step(replace(s, tokens=last) if s.nodes == self._graph.logits_set else s)
            for s in ends.steps(self._graph)
        ]
        start = self._step(Step(starts.nodes, via=term.edges))
        return Seq((start, Star(_alt(inside)), _alt(steps)))

    def check_edges(self, term: Circuit, ends: Ends) -> None:
        """Some path of a circuit's edges leads from the input to an end; a warning where an edge is on none."""
        graph, edges = self._graph, term.edges
        if edges is None:
            return
        last = [step for step in ends.steps(graph) if step.site is not Site.STREAM]
        if len(last) < len(ends.steps(graph)):
            return  # every writer below a stream that is read leads there
        reached = _nodes(term.starts(graph))
        for (node, _), writers in sorted(edges.rows):
            reached |= (1 << node) if writers & reached else 0
        leading = 0
        for step in last:
            leading |= step.nodes
        if not reached & leading:
            raise PatchcError([endless_circuit(term.span, ends.told(graph))])
        for (node, _), writers in sorted(edges.rows, reverse=True):
            leading |= writers if leading >> node & 1 else 0
        for (node, _), writers in edges.rows:
            if lost := writers & ~reached if leading >> node & 1 else writers:
                edge = f"{graph.members(lost)[0].name} -> {graph.nodes[node].name}"
                message = f"the edge {edge} is on no path from the input to {ends.told(graph)}"
                self._report.add(EDGE_OFF_PATH.at(term.span, message, fix="add the edges that lead to it and from it"))
                return

    def _by_tokens(self, term: Circuit) -> Iterator[Step]:
        """The nodes inside, a step for each choice of ports and tokens by which they are entered."""
        special: dict[tuple[int, Tokens], Nodes] = {}
        taken: dict[int, Nodes] = {}
        for (node, port), tokens in term.tokens:
            ports = QKV if port < 0 else 1 << port
            special[ports, tokens] = special.get((ports, tokens), 0) | 1 << node
            taken[node] = taken.get(node, 0) | ports
        plain: dict[int, Nodes] = {}
        for node in bits(term.inside.nodes):
            if ports := self._entered(term, node) & ~taken[node] if node in taken else QKV:
                plain[ports] = plain.get(ports, 0) | 1 << node
        for ports, nodes in plain.items():
            yield Step(nodes, ports)
        for (ports, tokens), nodes in special.items():
            if inner := nodes & term.inside.nodes:
                yield Step(inner, ports, tokens)

    def _entered(self, term: Circuit, node: int) -> int:
        """The ports by which edges of a circuit enter a node."""
        rows = term.edges.rows if term.edges else ()
        return bitset(port for (entered, port), _ in rows if entered == node and port >= 0)

    def _start(self, nodes: NodeSet) -> Path:
        key = (id(nodes), True)
        if key not in self._built:
            self._built[key] = (nodes, self._start_steps(nodes))
        return self._built[key][1]

    def _later(self, nodes: NodeSet, last: bool = False) -> Path:
        """`last`: the paths end here, so that a stream is the one that is read."""
        streams = tuple(m for m in nodes.members if m.site is Site.STREAM) if last else ()
        if streams:
            others = tuple(m for m in nodes.members if m.site is not Site.STREAM)
            read = [self._step(Step(m.nodes, tokens=m.tokens, site=m.site, rank=m.rank)) for m in streams]
            return _alt([*(_parts(self._later(NodeSet(others, nodes.span))) if others else ()), *read])
        key = (id(nodes), False)
        if key not in self._built:
            self._built[key] = (nodes, self._later_steps(nodes))
        return self._built[key][1]

    # ---- steps

    def _start_steps(self, nodes: NodeSet) -> Path:
        """A step for each site and place. A layer's attention output and a stream are a step each."""
        for member in nodes.members:
            self._check_can_start(member, nodes.span)
        groups: dict[tuple[object, ...], list[Member]] = {}
        for m in joined(nodes.members):
            own = m.nodes if m.site in (Site.ATTN_OUT, Site.STREAM) else 0
            groups.setdefault((m.site, m.tokens, m.rank, own, m.sources, m.neurons), []).append(m)
        return _alt([self._step(self._start_step(_nodes(g), g[0])) for g in groups.values()])

    def _start_step(self, nodes: Nodes, m: Member) -> Step:
        every = (1 << self._graph.d_mlp) - 1
        return Step(nodes, QKV, m.tokens, None, m.site, m.rank, m.sources, -1 if m.neurons == every else m.neurons)

    def _check_can_start(self, member: Member, span: Span | None) -> None:
        if member.nodes & self._graph.logits_set:
            raise BAD_START.error("nothing starts at the logits: every path ends there", span=span)
        if member.kv >= 0 and member.site is Site.OUT:
            message = f"{member.name} is keys and values, which are replaced one by one"
            raise BAD_START.error(message, fix=f"write `{member.name}.{{k, v}}`", span=span)
        if member.site is Site.OUT and member.ports != QKV:
            message = f"{member.name} is what a difference left of a head's ports, and no value can enter there"
            raise BAD_START.error(message, fix="name the sites: `h.{q, k}`", span=span)

    def _later_steps(self, nodes: NodeSet) -> Path:
        """A step for each choice of ports and place; a head that is named port by port is joined again."""
        ports: dict[tuple[Nodes, Tokens], int] = {}
        for member in nodes.members:
            self._check_can_be_entered(member, nodes.span)
            key = (member.nodes, member.tokens)
            ports[key] = ports.get(key, 0) | member.ports
        groups: dict[tuple[int, Tokens], Nodes] = {}
        for (entered, tokens), through in ports.items():
            groups[through, tokens] = groups.get((through, tokens), 0) | entered
        return _alt([self._step(Step(n, p, t)) for (p, t), n in groups.items()])

    def _check_can_be_entered(self, member: Member, span: Span | None) -> None:
        if member.site is Site.STREAM:
            message = f"{member.name} is a place to start at; a path goes on through nodes"
            raise MID_PATH_STREAM.error(message, span=span)
        if not member.ports:
            raise _no_port(member, span)

    def _step(self, step: Step) -> Step:
        """The one object for all steps that are equal to this one."""
        return self._steps.setdefault(step, step)


def _no_port(member: Member, span: Span | None) -> PatchcError:
    whole = member.name.split(".")[0]
    if member.kv >= 0:
        message = f"{member.name} is keys and values, and a path enters one of them"
        return NOT_A_PORT.error(message, fix=f"write `{member.name}.{{k, v}}`", span=span)
    if member.site is Site.POST:
        message = f"no edge enters {member.name}: a path goes through the MLP itself"
        return NOT_A_PORT.error(message, fix=f"did you mean `{whole}`?", span=span)
    message = f"no edge enters {member.name}: a head's ports are .q .k .v, and the head itself is all three"
    return NOT_A_PORT.error(message, fix=f"did you mean `{whole}`?", span=span)


def _nodes(members: Iterable[Member]) -> Nodes:
    out = 0
    for member in members:
        out |= member.nodes
    return out


def _parts(path: Path) -> Sequence[Path]:
    return path.parts if isinstance(path, Alt) else (path,)


def _is_nothing(path: Path) -> bool:
    return isinstance(path, Alt) and not path.parts


def _seq(parts: Sequence[Path]) -> Path:
    """One after the other, flat, without what is taken no times."""
    flat = [q for p in parts for q in (p.parts if isinstance(p, Seq) else (p,))]
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def _alt(parts: Sequence[Path]) -> Path:
    """Any one of them; one alone is itself."""
    return parts[0] if len(parts) == 1 else Alt(tuple(parts))
