"""One cell by its definition: copies of nodes as the streams above them see them, down to the base run.

For the hooks backend. The value of a node's copy is computed from the streams that its ports read, a stream from the
copies of the writers below; each once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from patchc.execute.hook_points import At, Point
from patchc.execute.oracle_nodes import Classes, Nodes, always, on_column, plus, put, then
from patchc.execute.oracle_passes import TokenEdit
from patchc.execute.oracle_states import (
    INNER_SITES,
    Arrival,
    Continuation,
    Start,
    StreamStart,
    Walk,
    ports_of,
    stream_end,
)
from patchc.execute.oracle_values import Change
from patchc.execute.oracle_worlds import Worlds
from patchc.ir.bits import bits
from patchc.ir.experiment import Cell, Probe, Value
from patchc.ir.graph import Kind, Node, Reader
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of a node, as a stream sees it: what is changed of its output, and (`direct`) what it writes
    besides.

    Without changes it is left to the pass. `moves`: in the pass its input is not the base run's, nor is its
    output set.
    """

    node: Node
    changes: tuple[Change, ...]
    direct: Tensor | None
    moves: bool


@dataclass(frozen=True, slots=True)
class Stream:
    """A stream `[token, d_model]`; of the final one also the logits, where the pass that made it went on to
    them."""

    x: Tensor
    logits: Tensor | None = None


class CellRun:
    """One cell."""

    def __init__(self, worlds: Worlds, run: str, cell: Cell):
        self.worlds, self.graph, self.world = worlds, worlds.graph, run
        self.base = worlds.record(run)
        self.walk = Walk(worlds.graph, worlds.layout, cell.patches)
        self._streams: dict[object, Stream | None] = {}
        self._values: dict[tuple[Node, Arrival], tuple[Tensor, Tensor | None]] = {}
        self._nodes = Nodes(worlds, self.walk, run, self._mixed)

    # ---- where paths end
    @property
    def logits(self) -> Tensor:
        """`[token, d_vocab]`."""
        return self._logits

    @cached_property
    def _logits(self) -> Tensor:
        reader = Reader(self.graph.logits)
        classes = self.walk.inputs(self.walk.at_node(reader.node), reader.node, None)
        if len(classes) > 1:
            x = self._mixed(reader, classes)
        else:
            stream = self.stream(reader, classes[0][1])
            if stream is not None and stream.logits is not None:
                return stream.logits
            x = None if stream is None else stream.x
        if x is None:
            return self.base[Point(At.LOGITS)]
        return self._nodes.run({Point(At.FINAL_IN): put(x)}, Point(At.LOGITS))[0]

    def read(self, probe: Probe) -> Tensor:
        """What stands at a probe, `[token, width]`, as the paths that end there see it."""
        node = self.graph.nodes[next(bits(probe.nodes))] if probe.site is not Site.STREAM else stream_end(probe.rank)
        match probe.site:
            case Site.STREAM:
                return self._read_stream(node)
            case Site.ATTN_OUT:
                return self._read_attn_out(node.block)
            case Site.OUT:
                own, direct = self.value(node, self.walk.at_node(node))
                written = self.worlds.written(node, own)
                return written if direct is None else written + direct
            case _:
                return self._read_inside(node, probe.site)

    def _read_inside(self, node: Node, site: Site) -> Tensor:
        """What stands inside a node, which values that enter at its output come too late to change. Where a path has
        left a circuit at the node, the circuit's value stands at the very place that is read."""
        classes, starts = self.walk.settle(self.walk.at_node(node), node)
        x = self.worlds.inside(self.base, node, site)
        for tokens, state in classes:
            mask = self.worlds.mask(tokens).view(-1, *[1] * (x.dim() - 1))
            x = torch.where(mask, self._nodes.inside(node, state, site), x)
        here = [replace(s, site=site) if s.patch.complement else s for s in starts]
        left = [s for s in here if s.site is site and (site is Site.Z or s.patch.complement)]
        changes = self._changes(node, left)[0] if site is Site.Z else self._nodes.entering(node, site, left)
        for change in changes:
            x = change(x)
        return x

    def _read_stream(self, end: Node) -> Tensor:
        arrival = self.walk.at_stream(end.rank)
        x = self._mixed(Reader(end), self.walk.inputs(arrival, end, None))
        x = self.worlds.stream(self.base, end.rank) if x is None else x
        return self._read_whole(x, end.rank, None, self.walk.end_starts(arrival, Site.STREAM))

    def _read_attn_out(self, block: int) -> Tensor:
        x = self.worlds.attn_out(self.base, block)
        more = torch.zeros_like(x)
        members = self.graph.members(self.graph.blocks[block].nodes)
        for node in members:
            if node.kind is Kind.HEAD:
                own, direct = self.value(node, self.walk.at_node(node))
                more = more + self.worlds.written(node, own - self.worlds.own(self.base, node))
                more = more if direct is None else more + direct
        x = x + self.worlds.added(self.base, block, more)
        starts = (s for node in members for s in self.walk.end_starts(self.walk.at_node(node), Site.ATTN_OUT))
        return self._read_whole(x, members[0].rank, block, list(dict.fromkeys(starts)))

    def _read_whole(self, x: Tensor, rank: int, block: int | None, starts: list[Start]) -> Tensor:
        for same in self.walk.agreed(starts, "what a metric reads"):
            x = self._stream_change(StreamStart(rank, block, tuple(same)))(x)
        return x

    # ---- streams
    def stream(self, reader: Reader, state: Continuation) -> Stream | None:
        """What a reader reads where the edge to it has that (tidy) state; None: the base run's stream."""
        if all(rests is None for rests in state):
            return None
        key = (reader if self.walk.has_via(state) else reader.node.rank, state)
        if key not in self._streams:
            self._streams[key] = self._stream(reader, state)
        return self._streams[key]

    def _stream(self, reader: Reader, state: Continuation) -> Stream:
        copies = [self._copy(w, state, reader) for w in self.walk.below(reader.node.rank)]
        starts = self.walk.stream_starts(state, reader)
        if any(copy.moves for copy in copies):
            return self._passed(reader.node.rank, copies, starts)
        return Stream(self._added(reader.node.rank, copies, starts))

    def _copy(self, node: Node, state: Continuation, reader: Reader) -> Copy:
        arrival = self.walk.arrival(state, reader, node)
        classes, starts = self.walk.settle(arrival, node)
        if node.kind is Kind.ATTN_BIAS:
            return Copy(node, (), None, False)
        if len(classes) == 1 and not self.walk.has_via(state) and self._nodes.reads_alike(node, classes[0][1], state):
            changes, direct = self._changes(node, starts)
            below = self.walk.tidy(state, Reader(node)) if ports_of(node) else ()
            moves = any(rests is not None for rests in below) and not any(c.forgets for c in changes)
            return Copy(node, changes, direct, moves)
        own, direct = self.value(node, arrival)
        return Copy(node, (always(own),), direct, False)

    def _added(self, rank: int, copies: Iterable[Copy], starts: Sequence[StreamStart]) -> Tensor:
        """The stream below `rank` where nothing in it need be run: the base run's and what stored values
        add."""
        deltas: dict[int, Tensor] = {}
        for copy in copies:
            if copy.changes or copy.direct is not None:
                deltas[copy.node.block] = deltas.get(copy.node.block, 0) + self._delta(copy)
        delta = torch.zeros_like(self.worlds.stream(self.base, rank))
        for below in range(rank + 1):
            for start in starts:
                if start.rank == below and start.block is None:
                    stream = self.worlds.stream(self.base, below) if below else torch.zeros_like(delta)
                    delta = self._stream_change(start)(stream + delta) - stream
            for i, block in enumerate(self.graph.blocks):
                if block.rank == below < rank:
                    delta = delta + self._block_delta(i, deltas.get(i), starts)
        return self.worlds.stream(self.base, rank) + delta

    def _block_delta(self, block: int, delta: Tensor | None, starts: Sequence[StreamStart]) -> Tensor | float:
        delta = None if delta is None else self.worlds.added(self.base, block, delta)
        for start in starts:
            if start.block == block:
                out = self.base[Point(At.ATTN_OUT, self.graph.blocks[block].layer or 0)]
                delta = self._stream_change(start)(out if delta is None else out + delta) - out
        return 0.0 if delta is None else delta

    def _delta(self, copy: Copy) -> Tensor:
        base = self.worlds.own(self.base, copy.node)
        own = base
        for change in copy.changes:
            own = change(own)
        delta = self.worlds.written(copy.node, own - base)
        return delta if copy.direct is None else delta + copy.direct

    def _passed(self, rank: int, copies: Iterable[Copy], starts: Sequence[StreamStart]) -> Stream:
        """The stream below `rank` from a pass in which the copies that need it are set, and the others are
        live."""
        edits: dict[Point, TokenEdit] = {}
        for copy in copies:
            for change in copy.changes:
                point, edit = self._edit(copy.node, change)
                edits[point] = then(edits.get(point), edit)
            if copy.direct is not None:
                point = self.worlds.heads_point(copy.node.block)
                edits[point] = then(edits.get(point), plus(copy.direct))
        for start in starts:
            point = self._stream_edit_point(start)
            edits[point] = then(edits.get(point), self._stream_change(start))
        at = self.worlds.stream_point(rank)
        if rank < self.graph.top:
            return Stream(self._nodes.run(edits, at)[0])
        return Stream(*self._nodes.run(edits, at, Point(At.LOGITS)))

    def _edit(self, node: Node, change: Change) -> tuple[Point, TokenEdit]:
        match node.kind:
            case Kind.HEAD:
                return Point(At.Z, node.layer or 0), on_column(node.head or 0, change)
            case Kind.MLP:
                return Point(At.MLP_OUT, node.layer or 0), change
            case _:
                return Point(At.EMBED if node.kind is Kind.EMBED else At.POS_EMBED), change

    def _stream_edit_point(self, start: StreamStart) -> Point:
        if start.block is not None:
            return Point(At.ATTN_OUT, self.graph.blocks[start.block].layer or 0)
        point = self.worlds.stream_point(start.rank)
        return Point(At.RESID_MID, point.layer) if point.at is At.MLP_IN else point

    def _stream_change(self, start: StreamStart) -> Change:
        value = start.starts[0].value
        assert value is not None
        place = self.worlds.stream_place(start.rank, start.block)
        return self.worlds.values.change(value, self.worlds.mask(_tokens(start.starts)), place, self.world)

    def _mixed(self, reader: Reader, classes: Classes) -> Tensor | None:
        """What a port reads, by classes of tokens; None: the base run's stream at all of them."""
        streams = [(tokens, self.stream(reader, state)) for tokens, state in classes]
        if all(stream is None for _, stream in streams):
            return None
        x = self.worlds.stream(self.base, reader.node.rank)
        for tokens, stream in streams:
            if stream is not None:
                x = torch.where(self.worlds.mask(tokens)[:, None], stream.x, x)
        return x

    # ---- nodes
    def value(self, node: Node, arrival: Arrival) -> tuple[Tensor, Tensor | None]:
        """The output of a copy of a node, as `Worlds.own` has it, and what it adds to the stream besides."""
        key = (node, arrival)
        if key not in self._values:
            classes, starts = self.walk.settle(arrival, node)
            changes, direct = self._changes(node, starts)
            own = self.worlds.own(self.base, node)
            if not any(change.forgets for change in changes):
                for tokens, state in classes:
                    computed = self._nodes.output(node, state)
                    own = torch.where(self.worlds.mask(tokens)[:, None], computed, own)
            for change in changes:
                own = change(own)
            self._values[key] = own, direct
        return self._values[key]

    def _changes(self, node: Node, starts: Iterable[Start]) -> tuple[tuple[Change, ...], Tensor | None]:
        """The values that enter at a node's output."""
        outputs = [s for s in starts if s.site not in INNER_SITES]
        self.walk.agreed(outputs, node.name)
        changes: list[Change] = []
        total: Tensor | None = None
        done: Tokens = 0
        for site in dict.fromkeys(s.site for s in outputs):
            # z and out are one place: what `done` holds is not changed twice.
            for same in self.walk.agreed((s for s in outputs if s.site is site), node.name):
                where = self.worlds.mask(_tokens(same) & ~done)
                value = same[0].value or Value(())
                change, direct = self.worlds.output_change(value, where, node, site, self.world)
                changes.append(change)
                if direct is not None:
                    total = direct if total is None else total + direct
                done |= _tokens(same)
        return tuple(changes), total


def _tokens(starts: Iterable[Start]) -> Tokens:
    tokens = 0
    for start in starts:
        tokens |= start.tokens
    return tokens
