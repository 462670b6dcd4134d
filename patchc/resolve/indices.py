"""Indices of layers, heads and the like: `9`, `-1`, `*`, `2..5`, `..8`, `{1, 4}`, `l + 1`.

An index outside the model is an error, except in a range with a loop variable in it, which is cut to the
model: `mlp[l - 5..l + 4]` is a window, narrower at the model's ends, and nothing where it is wholly outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchc.diagnostics import RULES, Span
from patchc.parse import tree
from patchc.resolve.bindings import Env, Number
from patchc.resolve.scope import WRONG_KIND, Scope

UNKNOWN_NODE = RULES.add("unknown-node", "a selector names a node that the model does not have")


@dataclass(frozen=True, slots=True)
class Axis:
    """What an index counts: `unit` (layer, head), how many there are, and how the model is described in an
    error."""

    unit: str
    size: int
    model: str


@dataclass(frozen=True, slots=True)
class Indexer:
    """Reads indices; `scope` knows parameters."""

    scope: Scope

    def all_of(self, node: tree.Index, axis: Axis, env: Env, written: str) -> Sequence[int]:
        """Every index that `node` stands for, in order; `written` is the selector, for errors."""
        match node:
            case tree.Every():
                return range(axis.size)
            case tree.Range():
                return self._range(node, axis, env, written)
            case tree.Braces():
                return list(dict.fromkeys(i for item in node.items for i in self._element(item, axis, env, written)))
            case _:
                return [self._one(node, axis, env, written)]

    def _element(self, item: tree.Element, axis: Axis, env: Env, written: str) -> Sequence[int]:
        if isinstance(item, tree.Text):
            raise WRONG_KIND.error(f"{axis.unit}s have numbers, not texts", span=item.span)
        return self.all_of(item, axis, env, written)

    def _one(self, node: tree.Item, axis: Axis, env: Env, written: str) -> int:
        index = self._number(node, axis, env)
        if -axis.size <= index < axis.size:
            return index % axis.size
        raise _outside(node, index, axis, written)

    def _range(self, node: tree.Range, axis: Axis, env: Env, written: str) -> Sequence[int]:
        ends = [e for e in (node.first, node.last) if e is not None]
        if any(_is_variable(e, env) for e in ends):
            first = 0 if node.first is None else self._end(node.first, axis, env)
            last = axis.size - 1 if node.last is None else self._end(node.last, axis, env)
            return range(max(first, 0), min(last, axis.size - 1) + 1)
        first = 0 if node.first is None else self._one(node.first, axis, env, written)
        last = axis.size - 1 if node.last is None else self._one(node.last, axis, env, written)
        if first > last:
            raise UNKNOWN_NODE.error(f"this range of {axis.unit}s is empty: {first} comes after {last}", span=node.span)
        return range(first, last + 1)

    def _end(self, node: tree.Item, axis: Axis, env: Env) -> int:
        """An end of a range that is cut to the model; a negative literal still counts from the end."""
        index = self._number(node, axis, env)
        return index + axis.size if index < 0 and not _is_variable(node, env) else index

    def _number(self, node: tree.Item, axis: Axis, env: Env) -> int:
        match node:
            case tree.Offset():
                return self._number(node.base, axis, env) + node.by
            case tree.Name():
                value = self._of_name(node, axis, env)
            case _:
                value = self.scope.number(node)
        if isinstance(value, int):
            return value
        raise WRONG_KIND.error(f"a {axis.unit} has a whole number, not {value}", span=node.span)

    def _of_name(self, node: tree.Name, axis: Axis, env: Env) -> int | float:
        local = env.get(node.text)
        if isinstance(local, Number) and local.unit in (None, axis.unit):
            return local.value
        if isinstance(local, Number):
            raise WRONG_KIND.error(
                f"{node.text!r} counts {local.unit}s, and a {axis.unit} is needed here", span=node.span
            )
        if local is not None:
            raise WRONG_KIND.error(f"{node.text!r} is not a number, and a {axis.unit} is needed here", span=node.span)
        raise self.scope.not_a(f"a {axis.unit}", node, [n for n, b in env.items() if isinstance(b, Number)])


def _is_variable(node: tree.Item, env: Env) -> bool:
    base = node.base if isinstance(node, tree.Offset) else node
    return isinstance(base, tree.Name) and base.text in env


def _outside(node: tree.Item, index: int, axis: Axis, written: str):
    value = "" if isinstance(node, tree.Number) else f" ({axis.unit} {index})"
    message = f"no {written}{value}: {axis.model}"
    fix = f"the last {axis.unit} is `-1`" if axis.size else None
    return UNKNOWN_NODE.error(message, fix=fix, span=_span(node))


def _span(node: tree.Item) -> Span | None:
    return node.span
