"""The dims of a result: a variable over heads gives `layer` and `head`, any other variable one dim."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchc.ir.bits import bits
from patchc.ir.experiment import Dim
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Site
from patchc.resolve.bindings import Binding, Number, Place
from patchc.resolve.loops import Label, label_of
from patchc.resolve.terms import NodeSet, is_head

Place_ = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """The dims of one variable, and where each value of its universe stands along them."""

    variable: str
    dims: tuple[Dim, ...]
    places: tuple[Place_, ...]


def axes_of(graph: ResidualGraph, variable: str, universe: Sequence[Binding], tokens: Sequence[str] | None) -> Axes:
    """The dims of a variable; `tokens` are those of the first prompt where all prompts have its length."""
    heads = _heads(graph, universe)
    if heads is not None:
        return _of_heads(variable, heads)
    coords = tuple(label_of(b) for b in universe)
    name, labels = _name(variable, universe), None
    if tokens is not None and name == "position":
        labels = _token_labels(universe, tokens)
    return Axes(variable, (Dim(name, coords, labels),), tuple((i,) for i in range(len(coords))))


def distinct(axes: Sequence[Axes]) -> tuple[Dim, ...]:
    """The dims of all variables in order. A name that two variables have becomes the variable's own in
    both."""
    owners: dict[str, set[str]] = {}
    for a in axes:
        for dim in a.dims:
            owners.setdefault(dim.name, set()).add(a.variable)
    out: list[Dim] = []
    for a in axes:
        clash = any(len(owners[d.name]) > 1 for d in a.dims)
        out += [Dim(_own(a, d), d.coords, d.labels) if clash else d for d in a.dims]
    return tuple(out)


def _own(axes: Axes, dim: Dim) -> str:
    return f"{axes.variable}.{dim.name}" if len(axes.dims) > 1 else axes.variable


# ---- heads


@dataclass(frozen=True, slots=True)
class _Head:
    layer: int
    head: int
    site: str | None


def _heads(graph: ResidualGraph, universe: Sequence[Binding]) -> list[_Head] | None:
    """The values as heads, or None where one is none. Bare heads do not mix with sites."""
    found: list[_Head] = []
    for b in universe:
        if not isinstance(b, NodeSet) or not all(is_head(graph, m) for m in b.members):
            return None
        member = b.members[0]
        node = graph.nodes[next(bits(member.nodes))]
        site = None if member.site is Site.OUT else member.site.value
        found.append(_Head(node.layer or 0, node.head or 0, site))
    bare = {h.site is None for h in found}
    return found if len(bare) == 1 else None


def _of_heads(variable: str, heads: Sequence[_Head]) -> Axes:
    layers = sorted({h.layer for h in heads})
    numbers = sorted({h.head for h in heads})
    sites = [s for s in dict.fromkeys(h.site for h in heads) if s is not None]
    dims = [Dim("layer", tuple(layers)), Dim("head", tuple(numbers))]
    if len(sites) < 2:
        return Axes(variable, tuple(dims), tuple((layers.index(h.layer), numbers.index(h.head)) for h in heads))
    places = tuple((layers.index(h.layer), numbers.index(h.head), sites.index(h.site or "")) for h in heads)
    return Axes(variable, (*dims, Dim("site", tuple(sites))), places)


# ---- other variables


def _name(variable: str, universe: Sequence[Binding]) -> str:
    """`layer`, `head` or `position` where that is what the values are; the variable's own name otherwise."""
    units = {b.unit if isinstance(b, Number) else "position" if isinstance(b, Place) else None for b in universe}
    unit = units.pop() if len(units) == 1 else None
    return unit or variable


def _token_labels(universe: Sequence[Binding], tokens: Sequence[str]) -> tuple[str, ...] | None:
    """The token at each numbered position; named positions are their own labels."""
    if not all(isinstance(b, Number) for b in universe):
        return None
    values: list[Label] = [label_of(b) for b in universe]
    return tuple(tokens[v] if isinstance(v, int) and -len(tokens) <= v < len(tokens) else "" for v in values)
