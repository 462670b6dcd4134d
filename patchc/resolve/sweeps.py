"""Sweeps: the cells of all loop variables together, counted before any of them is built.

What one variable ranges over is for `loops`; which dims follow from it, for `dims`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from patchc.diagnostics import Span
from patchc.parse import tree
from patchc.resolve.bindings import Binding
from patchc.resolve.loops import EMPTY_DOMAIN, Loops, check_count, label_of


@dataclass(frozen=True)
class Sweep:
    """The variables of one experiment with their universes, and every choice of values for them."""

    loops: Loops
    bindings: tuple[tree.Binding, ...]
    universes: tuple[tuple[Binding, ...], ...]

    def choices(self) -> Iterator[tuple[tuple[int, ...], dict[str, Binding]]]:
        """(place of each variable's value in its universe, the values by name), the last variable changing
        fastest."""
        ids = tuple({label_of(b): i for i, b in enumerate(universe)} for universe in self.universes)
        env: dict[str, Binding] = {}

        def walk(at: int, place: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], dict[str, Binding]]]:
            if at == len(self.bindings):
                yield place, env
                return
            node, universe, index = self.bindings[at], self.universes[at], ids[at]
            name = node.name.text
            env.pop(name, None)
            for value in self.loops.domain(node, env):
                i = index[label_of(value)]
                env[name] = universe[i]  # the universe's own object, by which everything is memoised
                yield from walk(at + 1, (*place, i))
            env.pop(name, None)

        yield from walk(0, ())


def sweep(loops: Loops, bindings: Sequence[tree.Binding], span: Span | None) -> Sweep:
    """The sweep of some variables; `too-many-cells` where it has more than are run."""
    universes: dict[int, tuple[Binding, ...]] = {}
    needs: dict[int, set[int]] = {}
    for i, node in enumerate(bindings):
        names = {b.name.text: j for j, b in enumerate(bindings[:i])}
        used = {names[name] for name in loops.uses(node, {n: universes[j][0] for n, j in names.items()})}
        needs[i] = used.union(*(needs[j] for j in used))
        universes[i] = _universe(loops, bindings, universes, needs[i], i)
    _check_count(loops, bindings, universes, needs, span)
    return _part(loops, bindings, universes, universes)


def _part(
    loops: Loops,
    bindings: Sequence[tree.Binding],
    universes: Mapping[int, tuple[Binding, ...]],
    chosen: Iterable[int],
) -> Sweep:
    """The sweep of some of the variables, in their order."""
    at = sorted(chosen)
    return Sweep(loops, tuple(bindings[i] for i in at), tuple(universes[i] for i in at))


def _universe(
    loops: Loops,
    bindings: Sequence[tree.Binding],
    universes: Mapping[int, tuple[Binding, ...]],
    needs: set[int],
    i: int,
) -> tuple[Binding, ...]:
    """Everything that a variable has in any cell, each once."""
    node = bindings[i]
    before = _part(loops, bindings, universes, needs)
    found = {label_of(b): b for _, env in before.choices() for b in loops.domain(node, env)}
    if not found:
        raise EMPTY_DOMAIN.error(f"{node.name.text!r} has nothing to range over", span=node.domain.span)
    return tuple(found.values())


def _check_count(
    loops: Loops,
    bindings: Sequence[tree.Binding],
    universes: Mapping[int, tuple[Binding, ...]],
    needs: Mapping[int, set[int]],
    span: Span | None,
) -> None:
    """Only variables that have to do with one another are counted out; the others multiply."""
    tied = {i for i, used in needs.items() if used}.union(*needs.values())
    count = prod(len(u) for i, u in universes.items() if i not in tied)
    if tied:
        count *= sum(1 for _ in _part(loops, bindings, universes, tied).choices())
    check_count(count, span)
