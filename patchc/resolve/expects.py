"""`expect METRIC at head[3, 1], end > 0.1`: from coordinates to the cells that they name."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from patchc.diagnostics import RULES, Report, Severity, Span, nearest
from patchc.ir.experiment import Expect, PromptDim
from patchc.parse import tree
from patchc.resolve.bindings import NO_LOCALS, Binding, Number, Place, Spots
from patchc.resolve.loops import Label, label_of
from patchc.resolve.positions import Positions
from patchc.resolve.scope import Scope, bound, written
from patchc.resolve.sets import Sets
from patchc.resolve.terms import NodeSet

NO_SUCH_CELL = RULES.add("no-such-cell", "an expect names a cell that the experiment does not have")
AMBIGUOUS_COORDINATE = RULES.add(
    "ambiguous-coordinate", "a number in an expect that several loop variables have", Severity.WARNING
)
NOT_MEASURED = RULES.add("not-measured", "an expect names a metric that the experiment does not measure")

BAD_TOLERANCE = RULES.add("bad-tolerance", "a tolerance that a comparison has no use for")
BAD_TOP = RULES.add("bad-top", "an expectation about the top cells that holds always, or never")

Cells = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""(place of each variable's value in its universe, the index along the dims) of each cell."""


@dataclass(frozen=True, slots=True)
class Table:
    """An experiment's cells as an `expect` names them: variables, what each ranges over, and the cells' places.

    A loop over prompts is variable number `at`; the cells' places and indices are without it.
    """

    names: tuple[str, ...]
    universes: tuple[tuple[Binding, ...], ...]
    cells: Cells
    at: int = -1
    by_prompt: PromptDim | None = None

    def indices(self, wanted: Mapping[int, set[int]]) -> tuple[tuple[int, ...], ...]:
        """The indices of the cells whose variables have these places."""
        by = self.by_prompt
        own = {v - (by is not None and v > self.at): ok for v, ok in wanted.items() if by is None or v != self.at}
        found = [index for place, index in self.cells if all(place[v] in ok for v, ok in own.items())]
        if by is None:
            return tuple(found)
        shown = sorted(wanted.get(self.at, range(len(by.prompts))))
        return tuple((*index[: by.axis], i, *index[by.axis :]) for index in found for i in shown)


@dataclass(frozen=True, slots=True)
class Expects:
    """Looks up what `expect` names."""

    scope: Scope
    positions: Positions
    sets: Sets
    report: Report

    def resolve(self, node: tree.Expect | tree.ExpectTop, metrics: Collection[str], table: Table) -> Expect:
        """An expectation with the indices of its cells."""
        name = node.metric.text
        if name not in metrics:
            message = f"{name!r} is not measured in this experiment; it measures {', '.join(metrics)}"
            raise NOT_MEASURED.error(message, fix=nearest(name, metrics), span=node.metric.span)
        if isinstance(node, tree.ExpectTop):
            return self._top(node, name, table)
        indices = self._indices(node.at, table, node.span)
        bounded = float(bound(self.scope, node.bound))
        return Expect(name, indices, node.op, bounded, node.span, self._tolerance(node))

    def _tolerance(self, node: tree.Expect) -> float | None:
        if node.tolerance is None:
            return None
        tolerance = float(self.scope.number(node.tolerance))
        if node.op != "==":
            message = f"`within` belongs to ==, and this is {node.op}, which needs no tolerance"
            raise BAD_TOLERANCE.error(
                message, fix=f"write `== {written(node.bound)} within {tolerance:g}`", span=node.span
            )
        if not 0 <= tolerance < math.inf:
            raise BAD_TOLERANCE.error(f"a tolerance is a number from 0 on, not {tolerance:g}", span=node.tolerance.span)
        return tolerance

    def _top(self, node: tree.ExpectTop, name: str, table: Table) -> Expect:
        top = self.scope.number(node.top)
        if not isinstance(top, int) or top < 1:
            raise BAD_TOP.error(
                f"top takes a whole number of cells, not {top}", fix="as in `top(3)`", span=node.top.span
            )
        indices, total = self._indices(node.cells, table, node.span), len(table.indices({}))
        if top >= total:
            message = f"top({top}) is every cell of this experiment, which has {total}"
            raise BAD_TOP.error(message, span=node.span)
        if len(indices) > top:
            message = f"{len(indices)} cells are named, and top({top}) has room for {top}"
            raise BAD_TOP.error(message, fix=f"write `top({len(indices)})`", span=node.span)
        return Expect(name, indices, "includes", 0.0, node.span, top=top)

    def _indices(
        self, coordinates: Sequence[tree.Set | tree.Bound], table: Table, span: Span | None
    ) -> tuple[tuple[int, ...], ...]:
        wanted: dict[int, set[int]] = {}
        taken: dict[int, tree.Set | tree.Bound] = {}
        for coordinate in coordinates:
            variable, found = self._match(coordinate, table, wanted)
            wanted[variable], taken[variable] = found, coordinate
        self._warn_ambiguous(taken, table)
        indices = table.indices(wanted)
        if not indices:
            raise NO_SUCH_CELL.error("no cell of this experiment has these coordinates", span=span)
        return indices

    def _warn_ambiguous(self, taken: Mapping[int, tree.Set | tree.Bound], table: Table) -> None:
        """Say of a number which variable it is of, where one without a coordinate has it too."""
        free = [v for v in range(len(table.universes)) if v not in taken]
        for variable, node in taken.items():
            if not isinstance(node, tree.Number | tree.Parameter | tree.Negated):
                continue
            others = [table.names[v] for v in free if v > variable and self._places(node, table.universes[v])]
            if others:
                told = f"{' and '.join(others)} {'has' if len(others) == 1 else 'have'} it too"
                message = f"{written(node)} is read as {table.names[variable]}, and {told}"
                fix = f"write a coordinate for each of {', '.join(table.names)}, or the name of a position"
                self.report.add(AMBIGUOUS_COORDINATE.at(node.span, message, fix=fix))

    def _match(self, node: tree.Set | tree.Bound, table: Table, taken: Iterable[int]) -> tuple[int, set[int]]:
        """The first variable, of those that have no coordinate yet, that takes all that a coordinate
        names."""
        variables = [v for v in range(len(table.universes)) if v not in set(taken)]
        for variable in variables:
            universe = table.universes[variable]
            found = self._places(node, universe)
            if found is not None:
                return variable, found
        raise self._no_match(node, table, variables)

    def _no_match(self, node: tree.Set | tree.Bound, table: Table, variables: Sequence[int]):
        if not variables:
            count = len(table.universes)
            return NO_SUCH_CELL.error(f"there are more coordinates than loop variables ({count})", span=node.span)
        labels = {v: [str(label_of(b)) for b in table.universes[v]] for v in variables}
        told = "; ".join(f"{table.names[v]} is one of {_shown(labels[v])}" for v in variables)
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
