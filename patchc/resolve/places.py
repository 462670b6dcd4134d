"""Places as sets of tokens: what follows `@`, and the indices of a pattern. Each is worked out once for each choice of
the local names in it.

What a position is in each prompt is for `positions`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from patchc.ir.paths import EVERYWHERE
from patchc.ir.tokens import Tokens
from patchc.parse import tree
from patchc.resolve.bindings import Env
from patchc.resolve.positions import Positions


@dataclass(frozen=True, slots=True)
class Places:
    """The places of a spec."""

    positions: Positions
    _names: dict[int, frozenset[str]] = field(default_factory=dict[int, frozenset[str]])
    _memo: dict[tuple[int, ...], tuple[Tokens, tuple[Any, ...]]] = field(default_factory=dict[Any, Any])

    def tokens(self, node: tree.Place | tree.Index, env: Env) -> Tokens:
        """The tokens of a place; every token for `*`."""
        if isinstance(node, tree.Every):
            return EVERYWHERE
        local = tuple(env[name] for name in self._locals(node, env))
        key = (id(node), *map(id, local))
        found = self._memo.get(key)
        if found is None:
            # The bindings are kept with the result: a key holds their ids.
            found = self._memo[key] = (self.positions.tokens(self.positions.place(node, env)), local)
        return found[0]

    def _locals(self, node: tree.Place | tree.Index, env: Env) -> list[str]:
        names = self._names.get(id(node))
        if names is None:
            names = self._names[id(node)] = frozenset(names_in(node))
        return [name for name in env if name in names]


def names_in(node: Any) -> Iterator[str]:
    """Every name in a part of the syntax tree."""
    if isinstance(node, tree.Name):
        yield node.text
    elif isinstance(node, tuple):
        for item in node:  # pyright: ignore[reportUnknownVariableType]
            yield from names_in(item)
    elif isinstance(node, tree.Construct) and is_dataclass(node):
        for f in fields(node):
            if f.name != "span":
                yield from names_in(getattr(node, f.name))
