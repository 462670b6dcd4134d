"""A cell's paths walked back from their ends: in which states a writer is read, and which values start there.

For the hooks backend; what a state means is said once, here. No torch, no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from patchc.diagnostics import RULES, Note, PatchcError
from patchc.execute.residuals import Move, Rest, Rests
from patchc.ir.bits import bits
from patchc.ir.experiment import Patch, Value
from patchc.ir.graph import BlockKind, Kind, Node, Reader, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Site, Step
from patchc.ir.tokens import Layout, Tokens

TWO_VALUES = RULES.add("hooks-two-values", "two patches of a cell start at one place with different values")
EDGES_FROM_STREAM = RULES.add("hooks-edges-from-stream", "a relation of edges on a start that replaces the stream")

STREAM_SITES = (Site.STREAM, Site.ATTN_OUT)
"""Sites of the stream as a whole: their starts belong to an edge's reading, not to one writer."""

PORT_SITES = (Site.Q, Site.K, Site.V)
"""Sites of a head's ports."""

ENTRY_SITES = (Site.SCORES, Site.PATTERN)
"""Sites of attention, entry by entry."""

MIDDLE_SITES = (*ENTRY_SITES, Site.POST)
"""Sites between a node's ports and its output."""

INNER_SITES = (*PORT_SITES, Site.IN, *MIDDLE_SITES)
"""Sites inside a node: the node is still computed."""

Continuation = tuple[frozenset[Rest] | None, ...]
"""A state on an edge, a member a patch: what may remain of its path below. None: the patch has nothing to say
there."""

Arrival = tuple[frozenset[Move] | None, ...]
"""A state at a node, a member a patch: the readings of the node that lead on, or start the path."""


@dataclass(frozen=True, slots=True)
class Start:
    """A value that enters at `tokens`, of entries only at those that look at `sources`, of an MLP only at `neurons`;
    without a value: what the node computes there in the state `kept`."""

    site: Site
    tokens: Tokens
    value: Value | None
    patch: Patch = field(compare=False)
    sources: Tokens = EVERYWHERE
    neurons: int = -1
    kept: Arrival = ()

    def meets(self, other: Start, layout: Layout) -> bool:
        """Whether some place is in both."""
        tokens = self.tokens & other.tokens
        if self.site in ENTRY_SITES:
            sources = self.sources & other.sources & layout.all
            prompts = map(layout.prompt, range(layout.n_prompts))
            return any(tokens & prompt and sources & prompt for prompt in prompts)
        return bool(tokens and (self.site is not Site.POST or self.neurons & other.neurons))


@dataclass(frozen=True, slots=True)
class StreamStart:
    """A value that replaces the stream below `rank` (or, with `block`, that block's whole output): starts that all
    have that value."""

    rank: int
    block: int | None
    starts: tuple[Start, ...]


class Walk:
    """The paths of one cell, walked from the logits back."""

    def __init__(self, graph: ResidualGraph, layout: Layout, patches: tuple[Patch, ...]):
        self.graph, self.layout, self.patches = graph, layout, patches
        self._rests = Rests()
        self._completes: dict[tuple[Rest, object], bool] = {}
        self._enters: dict[tuple[int, frozenset[Rest], object], bool] = {}
        writers = graph.nodes[:-1]
        self._below = [[w for w in writers if w.rank < rank] for rank in range(graph.top + 1)]

    def below(self, rank: int) -> list[Node]:
        """Every writer below a rank, in residual order."""
        return self._below[rank]

    # ---- states
    def at_node(self, node: Node) -> Arrival:
        """The state at a node where paths end: the logits, or one that a metric reads."""
        return self._at_end(lambda step: step.site is not Site.STREAM and bool(step.nodes >> node.id & 1))

    def at_stream(self, rank: int) -> Arrival:
        """The state at the stream below a rank where paths end."""
        return self._at_end(lambda step: step.site is Site.STREAM and step.rank == rank)

    def _at_end(self, ends: Callable[[Step], bool]) -> Arrival:
        rests = (self._rests.of((patch.path,)) for patch in self.patches)
        return tuple(frozenset(m for m in rest.moves if ends(m.step)) for rest in rests)

    def arrival(self, continuation: Continuation, reader: Reader, writer: Node) -> Arrival:
        """The state at `writer`, read by `reader` in the state `continuation`."""
        return tuple(
            None if rests is None else self._arrive(i, rests, reader, writer) for i, rests in enumerate(continuation)
        )

    def _arrive(self, patch: int, rests: Iterable[Rest], reader: Reader, writer: Node) -> frozenset[Move] | None:
        useful = frozenset(
            move for move in self._matching(rests, reader, writer) if move.accepts or self._leads_on(move, writer)
        )
        return useful if useful or self.patches[patch].complement else None

    def inputs(self, arrival: Arrival, node: Node, port: int | None) -> list[tuple[Tokens, Continuation]]:
        """What a port of a node in that state reads: the state on the edge, by disjoint classes of tokens."""
        classes: dict[Continuation, Tokens] = {}
        for tokens in self._token_classes(arrival):
            state = tuple(
                None if moves is None else self._onward(i, moves, tokens, node, port) for i, moves in enumerate(arrival)
            )
            state = self.tidy(state, Reader(node, port))
            classes[state] = classes.get(state, 0) | tokens
        return [(tokens, state) for state, tokens in classes.items()]

    def _token_classes(self, arrival: Arrival) -> list[Tokens]:
        """Disjoint classes of tokens; those of one class are in the `tokens` of the same steps."""
        classes = [self.layout.all]
        for named in {m.step.tokens for moves in arrival if moves for m in moves}:
            classes = [part for c in classes for part in (c & named, c & ~named) if part]
        return classes

    def _onward(
        self, patch: int, moves: frozenset[Move], tokens: Tokens, node: Node, port: int | None
    ) -> frozenset[Rest] | None:
        if self.patches[patch].complement:
            here = (m for m in moves if m.accepts and m.step.site is port_site(node, port))
            if any(m.step.tokens & tokens for m in here):
                return None  # The path is complete at this port: the base run's value stays.
        return frozenset(m.rest for m in moves if m.step.tokens & tokens and (port is None or m.step.ports >> port & 1))

    def tidy(self, continuation: Continuation, reader: Reader) -> Continuation:
        """The same without what leads nowhere below `reader`. Equal tidy states on a port mean equal
        inputs."""
        return tuple(None if rests is None else self._tidy(i, rests, reader) for i, rests in enumerate(continuation))

    def _tidy(self, patch: int, rests: frozenset[Rest], reader: Reader) -> frozenset[Rest] | None:
        useful = self._useful(rests, reader)
        if self.patches[patch].complement:
            return useful if self._value_enters(patch, useful, reader) else None
        return useful or None

    # ---- what a state says of its node
    def settle(self, arrival: Arrival, node: Node) -> tuple[list[tuple[Tokens, Arrival]], list[Start]]:
        """The states in which a node is computed, by disjoint classes of tokens, and the values that enter
        there.

        They differ by token only where a circuit's path starts at some tokens: its patch has nothing more to
        say there.
        """
        classes: list[tuple[Tokens, Arrival]] = [(self.layout.all, arrival)]
        starts: list[Start] = []
        for i, (patch, moves) in enumerate(zip(self.patches, arrival, strict=True)):
            if moves is None:
                continue
            leading = self._leading(moves, node)
            if not patch.complement:
                starts += self._starts(patch, moves)
                classes = [(t, _with(a, i, leading or None)) for t, a in classes]
                continue
            inside = self._accepted(moves)
            classes = [
                (part, _with(a, i, leading if leading and part & ~inside else None))
                for t, a in classes
                for part in (t & inside, t & ~inside)
                if part
            ]
            if not leading and self.layout.all & ~inside:
                starts.append(Start(Site.OUT, self.layout.all & ~inside, patch.value, patch))
        if node.kind is Kind.ATTN_BIAS:  # A constant: no value changes it.
            starts = []
        return classes, starts

    def _starts(self, patch: Patch, moves: frozenset[Move]) -> list[Start]:
        return [self._start(m.step, patch) for m in moves if m.accepts and m.step.site not in STREAM_SITES]

    def _start(self, step: Step, patch: Patch) -> Start:
        tokens = step.tokens & self.layout.all
        return Start(step.site, tokens, patch.value, patch, step.sources, step.neurons)

    def inner_starts(self, arrival: Arrival) -> list[Start]:
        """The values that enter inside a node in that state; first what paths of a complement's set keep there."""
        kept: list[Start] = []
        entering: list[Start] = []
        for i, (patch, moves) in enumerate(zip(self.patches, arrival, strict=True)):
            starts = [s for s in self._starts(patch, moves or frozenset()) if s.site in INNER_SITES]
            if patch.complement:
                without = _with(arrival, i, None)
                kept += [replace(s, value=None, kept=without) for s in starts if s.site in MIDDLE_SITES]
            else:
                entering += starts
        return kept + entering

    def end_starts(self, arrival: Arrival, site: Site) -> list[Start]:
        """The values that enter at the very stream, or attention output, at which paths end in that state."""
        return [
            self._start(m.step, patch)
            for patch, moves in zip(self.patches, arrival, strict=True)
            if moves and not patch.complement
            for m in moves
            if m.accepts and m.step.site is site
        ]

    def stream_starts(self, continuation: Continuation, reader: Reader) -> list[StreamStart]:
        """The values that replace the stream, or a layer's attention output, as `reader` reads it in this
        state; the one nearest the logits last."""
        places: dict[tuple[int, int | None], list[Start]] = {}
        for patch, rests in zip(self.patches, continuation, strict=True):
            if rests is None or patch.complement:
                continue
            for move in {m for rest in rests for m in rest.moves if m.accepts and m.step.site in STREAM_SITES}:
                start = self._start(move.step, patch)
                for place in self._places(move.step, patch, reader.node.rank):
                    places.setdefault(place, []).append(start)
        return [
            StreamStart(rank, block, tuple(starts))
            for rank, block in sorted(places, key=lambda place: place[0])
            for starts in self.agreed(places[rank, block], "the stream" if block is None else "an attention output")
        ]

    def _places(self, step: Step, patch: Patch, rank: int) -> Iterator[tuple[int, int | None]]:
        """Where a start of the stream takes effect below `rank`: the rank, and the block where it is a
        block's output."""
        if step.via is not None:
            message = "an edge relation cannot restrict a start that replaces the stream or an attention output"
            raise EDGES_FROM_STREAM.error(message, span=patch.span)
        if step.site is Site.STREAM:
            if step.rank <= rank:
                yield step.rank, None
            return
        for i, block in enumerate(self.graph.blocks):
            if block.kind is BlockKind.ATTENTION and block.rank < rank and block.nodes & step.nodes:
                yield block.rank, i

    def has_via(self, continuation: Continuation) -> bool:
        """Whether different readers in this state read different writers."""
        return any(rest.has_via for rests in continuation if rests for rest in rests)

    # ---- reading
    def _matching(self, rests: Iterable[Rest], reader: Reader, writer: Node) -> Iterator[Move]:
        for rest in rests:
            for move in rest.moves:
                if _joins(move.step, reader, writer):
                    yield move

    def _accepted(self, moves: frozenset[Move]) -> Tokens:
        """Where a path is complete at a node's output."""
        tokens = 0
        for move in moves:
            tokens |= move.step.tokens if move.accepts and move.step.site not in INNER_SITES else 0
        return tokens & self.layout.all

    def _leading(self, moves: frozenset[Move], node: Node) -> frozenset[Move]:
        """The readings that matter to how the node is computed."""
        inside = (m for m in moves if m.accepts and m.step.site in INNER_SITES and m.step.tokens & self.layout.all)
        return frozenset((*inside, *(m for m in moves if self._leads_on(m, node))))

    def _leads_on(self, move: Move, node: Node) -> bool:
        """Whether a path that passes through `node` so can be completed below it."""
        if not move.step.tokens & self.layout.all:
            return False
        ports = [p for p in ports_of(node) if p is None or move.step.ports >> p & 1]
        return any(self._can_complete(move.rest, Reader(node, port)) for port in ports)

    def _can_complete(self, rest: Rest, reader: Reader) -> bool:
        key = (rest, reader if rest.has_via else reader.node.rank)
        found = self._completes.get(key)
        if found is None:
            found = self._completes[key] = any(
                (move.accepts and bool(move.step.tokens & self.layout.all)) or self._leads_on(move, writer)
                for writer in self.below(reader.node.rank)
                for move in self._matching((rest,), reader, writer)
            )
        return found

    def _value_enters(self, patch: int, rests: frozenset[Rest], reader: Reader) -> bool:
        """Whether a complement's value enters at any writer that `reader` can come to in this state."""
        key = (patch, rests, reader if any(rest.has_via for rest in rests) else reader.node.rank)
        found = self._enters.get(key)
        if found is None:
            found = self._enters[key] = any(
                self._enters_by(patch, self._arrive(patch, rests, reader, writer) or frozenset(), writer)
                for writer in self.below(reader.node.rank)
                if writer.kind is not Kind.ATTN_BIAS
            )
        return found

    def _enters_by(self, patch: int, moves: frozenset[Move], writer: Node) -> bool:
        outside = self.layout.all & ~self._accepted(moves)
        leading = self._leading(moves, writer)
        if not outside or not leading:
            return bool(outside)
        readings = (
            (port, self._onward(patch, leading, tokens, writer, port))
            for tokens in self._token_classes((leading,))
            for port in ports_of(writer)
        )
        return any(
            rests is not None
            and self._value_enters(patch, self._useful(rests, Reader(writer, port)), Reader(writer, port))
            for port, rests in readings
        )

    def agreed(self, starts: Iterable[Start], where: str) -> list[list[Start]]:
        """Starts at one place, those of one value together. Two values at one token are an error."""
        merged: dict[object, list[Start]] = {}
        seen: list[Start] = []
        for start in starts:
            for other in seen:
                if other.value and start.value and other.value != start.value and other.meets(start, self.layout):
                    raise _two_values(other, start, where)
            seen.append(start)
            merged.setdefault((start.value, start.kept), []).append(start)
        return [same for same in merged.values() if any(start.tokens for start in same)]

    def _useful(self, rests: frozenset[Rest], reader: Reader) -> frozenset[Rest]:
        return frozenset(rest for rest in rests if self._can_complete(rest, reader))


def ports_of(node: Node) -> tuple[int | None, ...]:
    """The inputs of a node: a head's q, k and v, an MLP's or the logits' one (None), no other's any."""
    match node.kind:
        case Kind.HEAD:
            return (0, 1, 2)
        case Kind.MLP | Kind.LOGITS:
            return (None,)
        case _:
            return ()


def port_site(node: Node, port: int | None) -> Site | None:
    """The site at a node's input: a head's q, k or v, what an MLP reads, or the stream where it is read itself."""
    match node.kind:
        case Kind.HEAD:
            return PORT_SITES[port or 0]
        case Kind.MLP:
            return Site.IN
        case _:
            return Site.STREAM if node.id < 0 else None


def stream_end(rank: int) -> Node:
    """The stream below a rank where a metric reads it, as a node that reads it."""
    return Node(-1, Kind.LOGITS, rank, -1)


def _joins(step: Step, reader: Reader, writer: Node) -> bool:
    """Whether `step` may be the step through `writer` towards `reader`."""
    if not step.nodes >> writer.id & 1 or writer.rank >= reader.node.rank:
        return False
    if step.site is Site.STREAM and not writer.rank < step.rank <= reader.node.rank:
        return False
    if step.via is None:
        return True
    port = -1 if reader.port is None else reader.port
    return bool(step.via.writers(reader.node.id, port) >> writer.id & 1)


def _with(arrival: Arrival, index: int, moves: frozenset[Move] | None) -> Arrival:
    return (*arrival[:index], moves, *arrival[index + 1 :])


def _two_values(one: Start, other: Start, where: str) -> PatchcError:
    token = next(bits(one.tokens & other.tokens))
    message = f"{where} is patched with two different values at token {token}"
    notes = [Note("the other value is given here", one.patch.span)]
    return PatchcError([TWO_VALUES.at(other.patch.span, message, notes=notes)])
