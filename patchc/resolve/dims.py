"""The dims of a result: a variable over heads gives `layer` and `head`, one over neurons `layer` and `neuron`, any
other variable one dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchc.ir.bits import bits
from patchc.ir.experiment import Dim
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Site
from patchc.resolve.bindings import Binding, Number, Place
from patchc.resolve.loops import Label, label_of
from patchc.resolve.terms import Member, NodeSet, is_head

Place_ = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Axes:
    """The dims of one variable, and where each value of its universe stands along them."""

    variable: str
    dims: tuple[Dim, ...]
    places: tuple[Place_, ...]


def axes_of(graph: ResidualGraph, variable: str, universe: Sequence[Binding], tokens: Sequence[str] | None) -> Axes:
    """The dims of a variable; `tokens` are those of the first prompt where all prompts have its length."""
    numbered = _numbered(graph, universe)
    if numbered:
        return _of_numbered(variable, numbered)
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


# ---- heads, neurons, key-value heads


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A thing that its layer and a number in the layer name, and its site."""

    dims: tuple[str, str]
    layer: int
    number: int
    site: str


def _numbered(graph: ResidualGraph, universe: Sequence[Binding]) -> list[_Numbered] | None:
    """The values as heads, as neurons or as key-value heads; None where they are not all of one kind, or where two
    differ in something else."""
    found: list[_Numbered] = []
    for b in universe:
        one = _one(graph, b.members[0]) if isinstance(b, NodeSet) and len(b.members) == 1 else None
        if one is None or one.dims != (found or [one])[0].dims:
            return None
        found.append(one)
    return found if len(set(found)) == len(found) else None


def _one(graph: ResidualGraph, member: Member) -> _Numbered | None:
    node = graph.nodes[next(bits(member.nodes), 0)]
    layer = node.layer or 0
    if member.kv >= 0:
        return _Numbered(("layer", "kv"), layer, member.kv, member.site)
    if member.site is Site.POST and member.nodes.bit_count() == 1 and _is_one(member.neurons):
        return _Numbered(("layer", "neuron"), layer, member.neurons.bit_length() - 1, member.site)
    if is_head(graph, member):
        return _Numbered(("layer", "head"), layer, node.head or 0, member.site)
    return None


def _is_one(neurons: int) -> bool:
    """Whether they are one neuron; -1 is all of them."""
    return neurons > 0 and neurons.bit_count() == 1


def _of_numbered(variable: str, found: Sequence[_Numbered]) -> Axes:
    layers = sorted({n.layer for n in found})
    numbers = sorted({n.number for n in found})
    sites = list(dict.fromkeys(n.site for n in found))
    first, second = found[0].dims
    dims = [Dim(first, tuple(layers)), Dim(second, tuple(numbers))]
    row, column = ({value: i for i, value in enumerate(values)} for values in (layers, numbers))
    if len(sites) < 2:
        return Axes(variable, tuple(dims), tuple((row[n.layer], column[n.number]) for n in found))
    places = tuple((row[n.layer], column[n.number], sites.index(n.site)) for n in found)
    return Axes(variable, (*dims, Dim("site", tuple(map(str, sites)))), places)


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
