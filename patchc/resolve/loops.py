"""Loops: what a variable ranges over, alone or given the variables before it.

All variables of an experiment together are for `sweeps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from patchc.diagnostics import RULES, Span, closest
from patchc.ir.graph import ResidualGraph
from patchc.parse import tree
from patchc.resolve.bindings import Binding, Env, Number, Place, WorldName
from patchc.resolve.data import Dataset
from patchc.resolve.positions import UNEQUAL_POSITIONS, Positions
from patchc.resolve.scope import NODE_NAMES, NUMBER_DOMAINS, OTHERS_WORDS, WRONG_KIND, Scope, written
from patchc.resolve.sets import Sets
from patchc.resolve.terms import NodeSet

TOO_MANY_CELLS = RULES.add("too-many-cells", "a sweep of more cells than are run")
EMPTY_DOMAIN = RULES.add("empty-domain", "a loop variable with nothing to range over")

MAX_CELLS = 10**8
SITES = ("q", "k", "v", "z", "pattern", "scores", "post")
Label = str | int | float


def label_of(binding: Binding) -> Label:
    """The coordinate that a binding has on its own."""
    assert isinstance(binding, Number | Place | WorldName | NodeSet), "a loop ranges over no paths"
    return binding.label


def check_count(cells: int, span: Span | None) -> None:
    """Refuse more cells than are run, before they are built."""
    if cells > MAX_CELLS:
        message = f"this sweep has {cells:,} cells; at most {MAX_CELLS:,} are run"
        raise TOO_MANY_CELLS.error(message, span=span)


class Loops:
    """The domains of a spec's loops."""

    def __init__(self, scope: Scope, graph: ResidualGraph, dataset: Dataset, positions: Positions, sets: Sets):
        self._scope = scope
        self._graph = graph
        self._data = dataset
        self._positions = positions
        self._sets = sets
        self._memo: dict[tuple[int, ...], tuple[tuple[Binding, ...], tuple[Any, ...]]] = {}

    def domain(self, node: tree.Binding, env: Env) -> tuple[Binding, ...]:
        """What a variable ranges over, given the variables before it. Never empty where it stands alone."""
        local = tuple(env[n] for n in self._sets.locals_of(node.domain, env))
        key = (id(node), *map(id, local))
        if key not in self._memo:
            found = _distinct(self._of(node.domain, env), node)
            if not found and not local:
                raise EMPTY_DOMAIN.error(f"{node.name.text!r} has nothing to range over", span=node.domain.span)
            self._memo[key] = (found, local)
        return self._memo[key][0]

    def uses(self, node: tree.Binding, env: Env) -> tuple[str, ...]:
        """The earlier variables that a variable's domain has in it."""
        return self._sets.locals_of(node.domain, env)

    # ---- kinds of domain

    def _of(self, node: tree.Set | tree.Braces | tree.Range, env: Env) -> list[Binding]:
        match node:
            case tree.Braces():
                return [b for item in node.items for b in self._element(item, env)]
            case tree.Range():
                return self._range(node, env)
            case tree.Ref(tree.Name(name), (), ()) if name in NUMBER_DOMAINS and name not in env:
                return self._numbers(name, node.span)
            case tree.Ref(tree.Name(name), (), ()) if self._is_domain_misspelt(name, env):
                known = [*NUMBER_DOMAINS, *NODE_NAMES]
                raise self._scope.not_a("something to range over", node.name, known)
            case _:
                nodes = self._sets.nodes(node, env, "something to range over")
                return [NodeSet((member,), node.span) for member in nodes.members]

    def _is_domain_misspelt(self, name: str, env: Env) -> bool:
        """Whether a name that nothing has was meant to be `layers`, `positions` or the like."""
        meant = OTHERS_WORDS.get(name.lower()) or closest(name, [*NUMBER_DOMAINS, *NODE_NAMES])
        return name not in env and self._scope.kind(name) is None and meant in NUMBER_DOMAINS

    def _numbers(self, name: str, span: Span | None) -> list[Binding]:
        """Layers, heads or positions; a loop over prompts makes no cells and is for `by_prompt`."""
        match name:
            case "positions":
                return [Number(i, "position") for i in range(self._length(span))]
            case "heads":
                return [Number(i, "head") for i in range(self._graph.n_heads)]
            case _:
                return [Number(i, "layer") for i in range(self._graph.n_layers)]

    def _length(self, span: Span | None) -> int:
        """The length that all prompts have."""
        lengths = self._data.lengths
        if len(set(lengths)) > 1:
            shortest, longest = min(lengths), max(lengths)
            message = f"the prompts have {shortest} to {longest} tokens, and no position has one number in all"
            fix = f"name positions in the data (`at ...`), or count from the end: `{-min(shortest, 5)}..-1`"
            raise UNEQUAL_POSITIONS.error(message, fix=fix, span=span)
        return lengths[0]

    def _element(self, item: tree.Element, env: Env) -> Sequence[Binding]:
        match item:
            case tree.Range():
                return self._range(item, env)
            case tree.Number() | tree.Parameter():
                return [Number(self._scope.number(item))]
            case tree.Text():
                raise WRONG_KIND.error(
                    "a loop ranges over nodes, numbers, positions or worlds, not over texts", span=item.span
                )
            case tree.Name() if item.text in env:
                return [env[item.text]]
            case tree.Name():
                return [self._named(item)]
            case tree.Offset():
                return [self._offset(item, env)]

    def _named(self, name: tree.Name) -> Binding:
        """A position or a world, by its name."""
        if not self._data.records:
            return WorldName(self._data.world(name))  # raises: the data set is broken, and that has been said
        if name.text in self._positions.names():
            return self._place(name.text, self._positions.place(name, {}))
        if name.text in self._data.columns:
            return WorldName(self._data.world(name))
        known = [*self._positions.names(), *(self._data.likely_worlds or self._data.columns)]
        meant = "sites follow a node: `in head.{q, k, v}`" if name.text in SITES else None
        raise self._scope.not_a("a position or a world", name, known, meant)

    def _place(self, label: str, spots: Any) -> Place:
        return Place(label, spots, self._positions.tokens(spots))

    def _offset(self, node: tree.Offset, env: Env) -> Binding:
        base = env.get(node.base.text) if isinstance(node.base, tree.Name) else None
        if isinstance(base, Number):
            return Number(base.value + node.by, base.unit)
        if isinstance(node.base, tree.Name):
            sign = "+" if node.by >= 0 else "-"
            return self._place(f"{node.base.text} {sign} {abs(node.by)}", self._positions.place(node, env))
        return Number(self._scope.number(node.base) + node.by)

    # ---- ranges

    def _range(self, node: tree.Range, env: Env) -> list[Binding]:
        if node.first is None or node.last is None:
            message = "a range to loop over needs both ends: what it counts is not known here"
            raise WRONG_KIND.error(message, fix="as in `0..5`", span=node.span)
        first, last = self._end(node.first, env), self._end(node.last, env)
        if first is None or last is None:
            return self._positions_between(node, env)
        if first.value > last.value and not self._sets.locals_of(node, env):
            raise EMPTY_DOMAIN.error(f"this range is empty: {first.value} comes after {last.value}", span=node.span)
        check_count(int(last.value) - int(first.value) + 1, node.span)
        unit = first.unit or last.unit
        return [Number(i, unit) for i in range(int(first.value), int(last.value) + 1)]

    def _end(self, node: tree.Item, env: Env) -> Number | None:
        """An end of a range as a whole number, or None where it is a position's name."""
        base, by = (node.base, node.by) if isinstance(node, tree.Offset) else (node, 0)
        found = env.get(base.text) if isinstance(base, tree.Name) else Number(self._scope.number(base))
        if not isinstance(found, Number):
            return None
        if not isinstance(found.value, int):
            raise WRONG_KIND.error(f"a range has whole numbers as its ends, not {found.value}", span=node.span)
        return Number(found.value + by, found.unit)

    def _positions_between(self, node: tree.Range, env: Env) -> list[Binding]:
        """`noun..verb`: as many places as every prompt has there."""
        spots = self._positions.place(node, env)
        counts = sorted({len(here) for here in spots})
        if len(counts) > 1:
            message = f"from prompt to prompt this range has {counts[0]} to {counts[-1]} positions"
            raise UNEQUAL_POSITIONS.error(message, span=node.span)
        steps = [tuple((here[i],) for here in spots) for i in range(counts[0])]
        if all(len(set(step)) == 1 for step in steps):
            return [Number(step[0][0], "position") for step in steps]
        return [self._place(f"{written(node)} [{i}]", step) for i, step in enumerate(steps)]


def _distinct(found: Sequence[Binding], node: tree.Binding) -> tuple[Binding, ...]:
    """Each value once. Two values that would share a coordinate are an error: the one would hide the
    other."""
    out: dict[Label, Binding] = {}
    for b in found:
        other = out.setdefault(label_of(b), b)
        if isinstance(b, NodeSet) and isinstance(other, NodeSet) and b.members != other.members:
            message = f"{node.name.text!r} has two values that are both called {b.label}, at different positions"
            raise WRONG_KIND.error(message, fix="loop over the positions with another variable", span=node.domain.span)
    return tuple(out.values())
