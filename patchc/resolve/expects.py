"""`expect METRIC at head[3, 1], end > 0.1`: from coordinates to the cells that they name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from patchc.diagnostics import RULES
from patchc.ir.experiment import Expect
from patchc.parse import tree
from patchc.resolve.bindings import NO_LOCALS, Binding, Number, Place, Spots
from patchc.resolve.loops import Label, label_of
from patchc.resolve.positions import Positions
from patchc.resolve.scope import Scope, bound, written
from patchc.resolve.sets import Sets
from patchc.resolve.sweeps import Sweep
from patchc.resolve.terms import NodeSet

NO_SUCH_CELL = RULES.add("no-such-cell", "an expect names a cell that the experiment does not have")
NOT_MEASURED = RULES.add("not-measured", "an expect names a metric that the experiment does not measure")

Cells = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""(place of each variable's value in its universe, the index along the dims) of each cell."""


@dataclass(frozen=True, slots=True)
class Expects:
    """Looks up what `expect` names."""

    scope: Scope
    positions: Positions
    sets: Sets

    def resolve(self, node: tree.Expect, metrics: Collection[str], swept: Sweep, cells: Cells) -> Expect:
        """An expectation with the indices of its cells."""
        name = node.metric.text
        if name not in metrics:
            message = f"{name!r} is not measured in this experiment; it measures {', '.join(metrics)}"
            raise NOT_MEASURED.error(message, span=node.metric.span)
        wanted: dict[int, set[int]] = {}
        for coordinate in node.at:
            variable, found = self._match(coordinate, swept, wanted)
            wanted[variable] = found
        indices = tuple(index for place, index in cells if all(place[v] in ok for v, ok in wanted.items()))
        if not indices:
            raise NO_SUCH_CELL.error("no cell of this experiment has these coordinates", span=node.span)
        return Expect(name, indices, node.op, float(bound(self.scope, node.bound)), node.span)

    def _match(self, node: tree.Set | tree.Bound, swept: Sweep, taken: Iterable[int]) -> tuple[int, set[int]]:
        """The first variable, of those that have no coordinate yet, that takes all that a coordinate
        names."""
        variables = [v for v in range(len(swept.universes)) if v not in set(taken)]
        for variable in variables:
            universe = swept.universes[variable]
            found = self._places(node, universe)
            if found is not None:
                return variable, found
        raise self._no_match(node, swept, variables)

    def _no_match(self, node: tree.Set | tree.Bound, swept: Sweep, variables: Sequence[int]):
        if not variables:
            count = len(swept.universes)
            return NO_SUCH_CELL.error(f"there are more coordinates than loop variables ({count})", span=node.span)
        labels = {v: [str(label_of(b)) for b in swept.universes[v]] for v in variables}
        told = "; ".join(f"{swept.bindings[v].name.text} is one of {_shown(labels[v])}" for v in variables)
        return NO_SUCH_CELL.error(f"no cell has {written(node)}: {told}", span=node.span)

    # ---- one coordinate in one universe

    def _places(self, node: tree.Set | tree.Bound, universe: Sequence[Binding]) -> set[int] | None:
        """Where all that a coordinate names stands in a variable's universe, or None."""
        at: dict[Label, int] = {label_of(b): i for i, b in enumerate(universe)}
        if isinstance(node, tree.Number | tree.Parameter | tree.Negated):
            return _numbered(bound(self.scope, node), universe, at)
        if isinstance(node, tree.Ref) and not node.indices and not node.sites:
            if node.name.text in at:
                return {at[node.name.text]}
            if self.scope.kind(node.name.text) in ("a position", "a column"):
                return self._positioned(node.name, universe)
        if not isinstance(universe[0], NodeSet):
            return None
        labels = [m.name for m in self.sets.nodes(node, NO_LOCALS).members]
        return {at[label] for label in labels} if labels and all(label in at for label in labels) else None

    def _positioned(self, name: tree.Name, universe: Sequence[Binding]) -> set[int] | None:
        if name.text not in self.positions.names():
            return None
        spots = self.positions.place(name, NO_LOCALS)
        found = {i for i, b in enumerate(universe) if _is_at(b, spots, self.positions)}
        return found or None


def _is_at(binding: Binding, spots: Spots, positions: Positions) -> bool:
    """Whether a loop's value is, in every prompt, one of these positions."""
    match binding:
        case Place(_, own, _):
            return own == spots
        case Number(int() as value, None | "position"):
            ends = positions.lengths
            return all(value % n in here for n, here in zip(ends, spots, strict=True) if -n <= value < n)
        case _:
            return False


def _numbered(value: int | float, universe: Sequence[Binding], at: dict[Label, int]) -> set[int] | None:
    """A number, which may count from the end of layers, heads or positions."""
    if not all(isinstance(b, Number) for b in universe):
        return None
    counted = any(isinstance(b, Number) and b.unit for b in universe)
    if value not in at and counted and isinstance(value, int) and value < 0:
        value += max(int(b.value) for b in universe if isinstance(b, Number)) + 1
    return {at[value]} if value in at else None


def _shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
