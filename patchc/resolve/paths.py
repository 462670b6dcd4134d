"""Terms to paths: what `patch node`, `edge`, `path` and `all` mean, and what each of them has to look like.

A member is read in two ways. As a start its site says what is replaced; later its ports say how it is
entered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from patchc.diagnostics import RULES, Report, Severity, Span
from patchc.ir.graph import QKV, Nodes, ResidualGraph
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens
from patchc.resolve.scope import WRONG_KIND
from patchc.resolve.terms import Chain, Either, Member, NodeSet, Ready, Repeat, Term

STAR_START = RULES.add("star-start", "a path starts with a star, so that nothing says where the value enters")
NO_LOGITS = RULES.add("path-end", "a path does not end at the logits")
BAD_START = RULES.add("bad-start", "a path starts where no value can enter")
MID_PATH_STREAM = RULES.add("mid-path-stream", "the stream is a start, and no step to go through")
NOT_AN_EDGE = RULES.add("not-an-edge", "`patch edge` with something else than `a -> b`")
NOT_A_PORT = RULES.add("not-a-port", "a later step names a site that no edge enters")
EMPTY_STAR = RULES.add("empty-star", "a star over no nodes, which is taken no times", Severity.NOTE)

EMPTY = Seq(())


class Paths:
    """Terms to paths, for one model. Equal steps are one object."""

    def __init__(self, graph: ResidualGraph, report: Report):
        self._graph = graph
        self._report = report
        self._steps: dict[Step, Step] = {}
        self._built: dict[tuple[int, bool], tuple[Term, Path]] = {}
        self._readers: dict[int, tuple[NodeSet, tuple[tuple[Path, ...], ...]]] = {}
        self.rest: Path = Star(self._step(graph.all))
        self.logits = self._step(graph.logits_set)

    # ---- targets

    def node(self, term: Term, span: Span | None) -> Path:
        """`patch node n`: `n -> any* -> logits`."""
        if not isinstance(term, NodeSet):
            raise WRONG_KIND.error(
                "`patch node` takes nodes, and this is a path", fix="a path is `patch path`", span=term.span or span
            )
        return Seq((self._start(term), self.rest, self.logits))

    def edge(self, term: Term, span: Span | None) -> Path:
        """`patch edge a -> b`: `a -> b -> any* -> logits`; `a -> logits` where b is the logits."""
        if isinstance(term, Either):
            return _alt([self.edge(part, span) for part in term.parts])
        match term:
            case Chain((NodeSet() as writer, NodeSet() as reader)):
                start, ends = self._start(writer), self._ends(reader)
                return _alt([Seq((start, *end)) for end in ends])
            case _:
                raise NOT_AN_EDGE.error(
                    "an edge is `a -> b`, two sets of nodes", fix="a path is `patch path`", span=term.span or span
                )

    def _ends(self, reader: NodeSet) -> tuple[tuple[Path, ...], ...]:
        """What follows an edge's writer: the reader and `any* -> logits`, or the logits, or either."""
        found = self._readers.get(id(reader))
        if found is None:
            found = self._readers[id(reader)] = (reader, self._ends_of(reader))
        return found[1]

    def _ends_of(self, reader: NodeSet) -> tuple[tuple[Path, ...], ...]:
        entered = self._later(reader)
        steps = entered.parts if isinstance(entered, Alt) else (entered,)
        to_logits = [self._cut(s, self._graph.logits_set) for s in steps]
        inner = [s for s in (self._cut(s, self._graph.all) for s in steps) if s.nodes]
        ends: list[tuple[Path, ...]] = [(s,) for s in to_logits if s.nodes]
        if inner or not ends:
            ends.append((_alt(inner), self.rest, self.logits))
        return tuple(ends)

    def path(self, term: Term, span: Span | None) -> Path:
        """`patch path P`: P, which starts at nodes and ends at the logits."""
        self._check_start(term, span)
        self._check_end(term, span)
        return self._build(term, True)

    def everything(self) -> Path:
        """`patch all`: the value enters at every edge into the logits."""
        return Seq((self._step(self._graph.all), self.logits))

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

    def _check_end(self, term: Term, span: Span | None) -> None:
        match term:
            case Chain(parts):
                self._check_end(parts[-1], span)
            case Either(parts):
                for part in parts:
                    self._check_end(part, span)
            case Ready():
                pass
            case NodeSet(members) if members and all(m.nodes == self._graph.logits_set for m in members):
                pass
            case _:
                fix = "end it with `-> logits`, or with `-> any* -> logits`"
                raise NO_LOGITS.error("a path ends at the logits", fix=fix, span=term.span or span)

    # ---- terms

    def _build(self, term: Term, first: bool) -> Path:
        match term:
            case NodeSet():
                return self._start(term) if first else self._later(term)
            case Chain(parts):
                return _seq([self._build(part, first and i == 0) for i, part in enumerate(parts)])
            case Either(parts):
                return _alt([self._build(part, first) for part in parts])
            case Repeat(part):
                return self._star(term, part)
            case Ready(path):
                if not first:
                    raise WRONG_KIND.error("a circuit is full paths, and nothing can stand before it", span=term.span)
                return path

    def _star(self, term: Repeat, part: Term) -> Path:
        key = (id(term), False)
        if key not in self._built:
            inner = self._build(part, False)
            self._built[key] = (term, EMPTY if _is_nothing(inner) else Star(inner))
            if _is_nothing(inner):
                self._report.add(EMPTY_STAR.at(term.span, "there is no node in this star: it is taken no times"))
        return self._built[key][1]

    def _start(self, nodes: NodeSet) -> Path:
        key = (id(nodes), True)
        if key not in self._built:
            self._built[key] = (nodes, self._start_steps(nodes))
        return self._built[key][1]

    def _later(self, nodes: NodeSet) -> Path:
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
        for m in nodes.members:
            own = m.nodes if m.site in (Site.ATTN_OUT, Site.STREAM) else 0
            groups.setdefault((m.site, m.tokens, m.rank, own), []).append(m)
        return _alt(
            [self._step(_nodes(g), tokens=g[0].tokens, site=g[0].site, rank=g[0].rank) for g in groups.values()]
        )

    def _check_can_start(self, member: Member, span: Span | None) -> None:
        if member.nodes & self._graph.logits_set:
            raise BAD_START.error("nothing starts at the logits: every path ends there", span=span)
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
        return _alt([self._step(n, ports=p, tokens=t) for (p, t), n in groups.items()])

    def _check_can_be_entered(self, member: Member, span: Span | None) -> None:
        if member.site is Site.STREAM:
            message = f"{member.name} is a place to start at; a path goes on through nodes"
            raise MID_PATH_STREAM.error(message, span=span)
        if not member.ports:
            message = f"no edge enters {member.name}: a head's ports are .q .k .v, and the head itself is all three"
            raise NOT_A_PORT.error(message, fix=f"did you mean `{member.name.removesuffix('.z')}`?", span=span)

    def _cut(self, step: Path, nodes: Nodes) -> Step:
        assert isinstance(step, Step)
        if step.nodes & nodes == step.nodes:
            return step
        return self._step(step.nodes & nodes, ports=step.ports, tokens=step.tokens)

    def _step(
        self, nodes: Nodes, *, ports: int = QKV, tokens: Tokens = -1, site: Site = Site.OUT, rank: int = -1
    ) -> Step:
        step = Step(nodes, ports, tokens, None, site, rank)
        return self._steps.setdefault(step, step)


def _nodes(members: Iterable[Member]) -> Nodes:
    out = 0
    for member in members:
        out |= member.nodes
    return out


def _is_nothing(path: Path) -> bool:
    return isinstance(path, Alt) and not path.parts


def _seq(parts: Sequence[Path]) -> Path:
    """One after the other, flat, without what is taken no times."""
    flat = [q for p in parts for q in (p.parts if isinstance(p, Seq) else (p,))]
    return flat[0] if len(flat) == 1 else Seq(tuple(flat))


def _alt(parts: Sequence[Path]) -> Path:
    """Any one of them; one alone is itself."""
    return parts[0] if len(parts) == 1 else Alt(tuple(parts))
