"""What a copy of a head or an MLP computes inside: its ports' inputs and the values that enter, all set in one pass.

For the hooks backend. Where the inputs come from is `oracle_cells`' matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from patchc.execute.hook_points import At, Point
from patchc.execute.oracle_passes import TokenEdit, is_hidden
from patchc.execute.oracle_states import PORT_SITES, Arrival, Continuation, Start, Walk, ports_of
from patchc.execute.oracle_values import Change
from patchc.execute.oracle_worlds import INSIDE, PROJECTIONS, Worlds
from patchc.ir.graph import Kind, Node, Reader
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens

Classes = list[tuple[Tokens, Continuation]]
"""What a port reads: the state on its edge, by disjoint classes of tokens."""


class Nodes:
    """The inside of nodes' copies in one cell. `mixed` gives what a port reads, None where it is the base run's."""

    def __init__(self, worlds: Worlds, walk: Walk, world: str, mixed: Callable[[Reader, Classes], Tensor | None]):
        self.worlds, self.walk, self.world, self._mixed = worlds, walk, world, mixed
        self.base = worlds.record(world)
        self._projections: dict[object, list[Tensor]] = {}
        self._insides: dict[tuple[Node, Arrival, Site], Tensor] = {}

    def output(self, node: Node, state: Arrival) -> Tensor:
        """A node's output in the form of `Worlds.own`, without the values that enter there."""
        match node.kind:
            case Kind.HEAD:
                return self.inside(node, state, Site.Z)
            case Kind.MLP:
                return self._run(node, state, Point(At.MLP_OUT, node.layer or 0))
            case _:
                return self.worlds.own(self.base, node)

    def inside(self, node: Node, state: Arrival, site: Site) -> Tensor:
        """What a node's copy in that state has at a site inside it, `[token, width]`."""
        key = (node, state, site)
        if key not in self._insides:
            x = self._run(node, state, Point(INSIDE[site], node.layer or 0))
            self._insides[key] = x[:, self.worlds.column(node, site)] if node.kind is Kind.HEAD else x
        return self._insides[key]

    def _run(self, node: Node, state: Arrival, point: Point) -> Tensor:
        starts = self.walk.inner_starts(state)
        edits = self._head(node, state, starts) if node.kind is Kind.HEAD else self._mlp(node, state, starts)
        return self.run(edits, point)[0] if edits else self.base[point]

    def run(self, edits: Mapping[Point, TokenEdit], *capture: Point) -> list[Tensor]:
        """One pass a length of prompt, on the cell's own world."""
        got = self.worlds.passes.run(self.world, edits, capture)
        return [got[point] for point in capture]

    # ---- edits
    def _mlp(self, node: Node, state: Arrival, starts: list[Start]) -> dict[Point, TokenEdit]:
        layer = node.layer or 0
        read = self._mixed(Reader(node), self.walk.inputs(state, node, None))
        entering = self.entering(node, Site.IN, starts)
        edits: dict[Point, TokenEdit] = {}
        if read is not None or entering:
            x = self.worlds.stream(self.base, node.rank) if read is None else read
            edits[Point(At.MLP_IN, layer)] = put(in_turn(entering)(x))
        if neurons := self.entering(node, Site.POST, starts):
            edits[Point(At.POST, layer)] = in_turn(neurons)
        return edits

    def _head(self, node: Node, state: Arrival, starts: list[Start]) -> dict[Point, TokenEdit]:
        edits: dict[Point, TokenEdit] = {}
        for port, site in enumerate(PORT_SITES):
            projected = self._projected(node, port, self.walk.inputs(state, node, port))
            entering = self.entering(node, site, starts)
            if projected is None and not entering:
                continue
            x = self.worlds.inside(self.base, node, site) if projected is None else projected
            # With grouped queries this sets k and v of a whole group, but one head alone is kept of the pass.
            edit = on_column(self.worlds.column(node, site), always(in_turn(entering)(x)))
            edits[Point(PROJECTIONS[port], node.layer or 0)] = edit
        for at, edit in self._attention(node, starts).items():
            edits[Point(at, node.layer or 0)] = on_column(node.head or 0, edit)
        return edits

    def _attention(self, node: Node, starts: list[Start]) -> dict[At, TokenEdit]:
        scores, pattern = (self.entering(node, site, starts) for site in (Site.SCORES, Site.PATTERN))
        if not scores:
            return {At.PATTERN: in_turn(pattern)} if pattern else {}
        blind: list[Tensor] = []

        def at_scores(x: Tensor, rows: Tensor) -> Tensor:
            x = in_turn(scores)(x, rows)
            blind[:] = [is_hidden(x).all(-1, keepdim=True)]
            return x

        def at_pattern(x: Tensor, rows: Tensor) -> Tensor:
            # Where nothing is left to look at the softmax is not defined, or looks at what the mask hides.
            return in_turn(pattern)(x.masked_fill(blind[0], 0.0), rows)

        return {At.SCORES: at_scores, At.PATTERN: at_pattern}

    def entering(self, node: Node, site: Site, starts: Iterable[Start]) -> list[Change]:
        """What replaces a site inside a node."""
        here = self.walk.agreed((s for s in starts if s.site is site), f"{node.name}.{site}")
        return [self._change(node, site, same) for same in here]

    def _change(self, node: Node, site: Site, same: list[Start]) -> Change:
        where, first = self.worlds.where(same, node, self.world), same[0]
        if first.value is None:
            return Change(where, self.inside(node, first.kept, site))
        return self.worlds.values.change(first.value, where, self.worlds.place(node, site), self.world)

    def _projected(self, node: Node, port: int, classes: Classes) -> Tensor | None:
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
            self._projections[key] = self.run({Point(At.RESID_PRE, layer): put(x)}, *points)
        return self._projections[key][port][:, self.worlds.column(node, PORT_SITES[port])]

    def reads_alike(self, node: Node, state: Arrival, below: Continuation) -> bool:
        """Whether every port of a node reads the stream of the state `below`, at all tokens, and nothing enters."""
        if self.walk.inner_starts(state):
            return False
        return all(
            self.walk.inputs(state, node, port) == [(self.walk.layout.all, self.walk.tidy(below, Reader(node, port)))]
            for port in ports_of(node)
        )


# ---- edits of an activation


def put(new: Tensor) -> TokenEdit:
    return lambda _, rows: new[rows]


def plus(addend: Tensor) -> TokenEdit:
    return lambda x, rows: x + addend[rows]


def always(new: Tensor) -> Change:
    """A change everywhere."""
    return Change(torch.ones(len(new), dtype=torch.bool, device=new.device), new)


def in_turn(changes: list[Change]) -> Callable[..., Tensor]:
    """Changes one after the other, of all tokens or of some rows."""

    def edit(x: Tensor, rows: Tensor | None = None) -> Tensor:
        for change in changes:
            x = change(x, rows)
        return x

    return edit


def then(first: TokenEdit | None, second: TokenEdit) -> TokenEdit:
    if first is None:
        return second
    return lambda x, rows: second(first(x, rows), rows)


def on_column(column: int, change: TokenEdit) -> TokenEdit:
    """A change of one head of `[token, head, width]`."""

    def edit(x: Tensor, rows: Tensor) -> Tensor:
        x = x.clone()
        x[:, column] = change(x[:, column], rows)
        return x

    return edit
