"""The hooks backend: recomputes a cell from its definition, by hooked forward passes of the plain model.

Slow on purpose, and sharing nothing with the compiler but `ir`: a number that both give was found twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchc.execute.hook_drivers import At, Point, driver_for
from patchc.execute.oracle_metrics import Metrics
from patchc.execute.oracle_states import (
    PORT_SITES,
    Arrival,
    Continuation,
    Start,
    StreamStart,
    Walk,
    agreed,
    ports_of,
)
from patchc.execute.oracle_worlds import PROJECTIONS, Change, Passes, TokenEdit, Worlds
from patchc.ir.experiment import Cell, Experiment, Prompts
from patchc.ir.graph import Kind, Node, Reader, ResidualGraph
from patchc.ir.tokens import Tokens


class Oracle:
    """Recomputes cells of experiments on `prompts`.

    `eager` is copied, and neither run nor hooked. `tensors` and `metrics` are those that `Given` and `Called`
    name. `driver`: `transformer_lens`, `forward_hooks`, or `auto`, which takes the first that can hook the
    model.
    """

    def __init__(
        self,
        eager: nn.Module,
        graph: ResidualGraph,
        prompts: Prompts,
        *,
        tensors: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, Callable[..., Any]] | None = None,
        driver: str = "auto",
    ):
        self.graph, self.prompts = graph, prompts
        device = next(eager.parameters()).device
        self._passes = Passes(driver_for(eager, graph, driver), prompts, device)
        self._worlds = Worlds(self._passes, graph, tensors or {})
        self._metrics = Metrics(prompts.layout, self._world_logits, metrics or {})

    @property
    def passes(self) -> int:
        """Hooked forward passes made so far."""
        return self._passes.count

    def logits(self, experiment: Experiment, cell: Cell) -> list[Tensor]:
        """The patched run's logits, `[pos, d_vocab]` a prompt."""
        return self._by_prompt(CellRun(self._worlds, experiment.run, cell).logits())

    def measure(
        self,
        experiment: Experiment,
        cells: Sequence[Cell],
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, Tensor]:
        """Every metric of the experiment, `[cell]`, float64: means over prompts, normalised where the metric
        is.

        A number that is not finite is given as it is. `progress` hears how many cells are done.
        """
        rows: list[list[float]] = []
        for cell in cells:
            logits = self.logits(experiment, cell)
            rows.append([self._metrics.value(metric, logits) for metric in experiment.metrics])
            if progress is not None:
                progress(len(rows))
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(experiment.metrics))
        return {metric.name: table[:, i] for i, metric in enumerate(experiment.metrics)}

    def _world_logits(self, world: str) -> list[Tensor]:
        return self._by_prompt(self._worlds.record(world)[Point(At.LOGITS)])

    def _by_prompt(self, logits: Tensor) -> list[Tensor]:
        return list(logits.split(self.prompts.layout.lengths))


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy of a node, as a stream sees it: what is changed of its output, and (`direct`) what it adds
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
    """One cell. The value of a node's copy is computed from the streams that its ports read, a stream from
    the copies of the writers below; each once."""

    def __init__(self, worlds: Worlds, run: str, cell: Cell):
        self.worlds, self.graph, self.world = worlds, worlds.graph, run
        self.base = worlds.record(run)
        self.walk = Walk(worlds.graph, worlds.layout, cell.patches)
        self._streams: dict[object, Stream | None] = {}
        self._values: dict[tuple[Node, Arrival], tuple[Tensor, Tensor | None]] = {}
        self._projections: dict[object, list[Tensor]] = {}

    def logits(self) -> Tensor:
        """`[token, d_vocab]`."""
        reader = Reader(self.graph.logits)
        classes = self.walk.inputs(self.walk.top(), reader.node, None)
        if len(classes) > 1:
            x = self._mixed(reader, classes)
        else:
            stream = self.stream(reader, classes[0][1])
            if stream is not None and stream.logits is not None:
                return stream.logits
            x = None if stream is None else stream.x
        if x is None:
            return self.base[Point(At.LOGITS)]
        return self._pass({Point(At.FINAL_IN): _put(x)}, Point(At.LOGITS))[0]

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
        if self._reads_alike(node, classes, starts, state):
            changes, direct = self._changes(node, starts)
            below = self.walk.tidy(state, Reader(node)) if ports_of(node) else ()
            moves = any(rests is not None for rests in below) and not any(c.forgets for c in changes)
            return Copy(node, changes, direct, moves)
        own, direct = self.value(node, arrival)
        return Copy(node, (_always(own),), direct, False)

    def _reads_alike(
        self, node: Node, classes: list[tuple[Tokens, Arrival]], starts: list[Start], state: Continuation
    ) -> bool:
        """Whether each port of the node reads the very stream that is being made, so that the pass computes
        the node."""
        if self.walk.has_via(state) or len(classes) > 1 or any(s.site in PORT_SITES for s in starts):
            return False
        return all(
            self.walk.inputs(classes[0][1], node, port)
            == [(self.walk.layout.all, self.walk.tidy(state, Reader(node, port)))]
            for port in ports_of(node)
        )

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
                edits[point] = _then(edits.get(point), edit)
            if copy.direct is not None:
                point = Point(At.ATTN_OUT, copy.node.layer or 0)
                edits[point] = _then(edits.get(point), _plus(copy.direct))
        for start in starts:
            point = self._stream_edit_point(start)
            edits[point] = _then(edits.get(point), self._stream_change(start))
        at = self.worlds.stream_point(rank)
        if rank < self.graph.top:
            return Stream(self._pass(edits, at)[0])
        return Stream(*self._pass(edits, at, Point(At.LOGITS)))

    def _edit(self, node: Node, change: Change) -> tuple[Point, TokenEdit]:
        match node.kind:
            case Kind.HEAD:
                return Point(At.Z, node.layer or 0), _on_column(node.head or 0, change)
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
        if start.block is not None:
            point = Point(At.ATTN_OUT, self.graph.blocks[start.block].layer or 0)
        else:
            point = self.worlds.stream_point(start.rank)
        return self.worlds.change(start.value, start.tokens, lambda record: record[point])

    def _mixed(self, reader: Reader, classes: list[tuple[Tokens, Continuation]]) -> Tensor | None:
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
                    computed = self._computed(node, state, starts)
                    own = torch.where(self.worlds.mask(tokens)[:, None], computed, own)
            for change in changes:
                own = change(own)
            self._values[key] = own, direct
        return self._values[key]

    def _changes(self, node: Node, starts: Iterable[Start]) -> tuple[tuple[Change, ...], Tensor | None]:
        """The values that enter at a node's output."""
        outputs = [s for s in starts if s.site not in PORT_SITES]
        agreed(outputs, node.name)
        changes: list[Change] = []
        total: Tensor | None = None
        done: Tokens = 0
        for site in dict.fromkeys(s.site for s in outputs):
            # z and out are one place: what `done` holds is not changed twice.
            for tokens, value in agreed((s for s in outputs if s.site is site), node.name):
                change, direct = self.worlds.node_change(value, tokens & ~done, node, site)
                changes.append(change)
                if direct is not None:
                    total = direct if total is None else total + direct
                done |= tokens
        return tuple(changes), total

    def _computed(self, node: Node, state: Arrival, starts: Iterable[Start]) -> Tensor:
        """A node's output from what its ports read, without the values that enter at its output."""
        if node.kind is Kind.HEAD:
            return self._head(node, state, starts)
        base = self.worlds.own(self.base, node)
        if node.kind is not Kind.MLP:
            return base
        x = self._mixed(Reader(node), self.walk.inputs(state, node, None))
        if x is None:
            return base
        layer = node.layer or 0
        return self._pass({Point(At.MLP_IN, layer): _put(x)}, Point(At.MLP_OUT, layer))[0]

    def _head(self, node: Node, state: Arrival, starts: Iterable[Start]) -> Tensor:
        """A head's z: its q, k and v each from what that port reads, then one pass with all three set."""
        edits: dict[Point, TokenEdit] = {}
        for port, site in enumerate(PORT_SITES):
            classes = self.walk.inputs(state, node, port)
            projected = self._projected(node, port, classes)
            entering = agreed((s for s in starts if s.site is site), f"{node.name}.{site}")
            if projected is None and not entering:
                continue
            x = self.worlds.projection(self.base, node, port) if projected is None else projected
            for tokens, value in entering:
                x = self.worlds.change(value, tokens, lambda record, p=port: self.worlds.projection(record, node, p))(x)
            point = Point(PROJECTIONS[port], node.layer or 0)
            # With grouped queries this sets k and v of a whole group, but one head alone is kept of the pass.
            edits[point] = _on_column(self.worlds.column(node, port), _always(x))
        if not edits:
            return self.worlds.own(self.base, node)
        return self._pass(edits, Point(At.Z, node.layer or 0))[0][:, node.head]

    def _projected(self, node: Node, port: int, classes: list[tuple[Tokens, Continuation]]) -> Tensor | None:
        """A head's q, k or v of what the port reads; None: the base run's."""
        reader = Reader(node, port)
        private = any(self.walk.has_via(state) for _, state in classes)
        key = (reader if private else node.layer, tuple(classes))
        if key not in self._projections:
            x = self._mixed(reader, classes)
            if x is None:
                return None
            layer = node.layer or 0
            points = [Point(at, layer) for at in PROJECTIONS]
            self._projections[key] = self._pass({Point(At.RESID_PRE, layer): _put(x)}, *points)
        return self._projections[key][port][:, self.worlds.column(node, port)]

    def _pass(self, edits: Mapping[Point, TokenEdit], *capture: Point) -> list[Tensor]:
        got = self.worlds.passes.run(self.world, edits, capture)
        return [got[point] for point in capture]


# ---- edits


def _put(new: Tensor) -> TokenEdit:
    return lambda _, rows: new[rows]


def _plus(addend: Tensor) -> TokenEdit:
    return lambda x, rows: x + addend[rows]


def _always(new: Tensor) -> Change:
    return Change(torch.ones(len(new), dtype=torch.bool, device=new.device), new)


def _then(first: TokenEdit | None, second: TokenEdit) -> TokenEdit:
    if first is None:
        return second
    return lambda x, rows: second(first(x, rows), rows)


def _on_column(column: int, change: Change) -> TokenEdit:
    """A change of one head of `[token, head, d_head]`."""

    def edit(x: Tensor, rows: Tensor) -> Tensor:
        x = x.clone()
        x[:, column] = change(x[:, column], rows)
        return x

    return edit


__all__ = ["CellRun", "Oracle"]
