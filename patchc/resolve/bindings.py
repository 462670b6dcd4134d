"""What a loop variable or a parameter of a `let` stands for while an expression is resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from patchc.ir.tokens import Tokens
from patchc.resolve.terms import Term

Spots = tuple[tuple[int, ...], ...]
"""Positions of each prompt, counted from 0."""


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a loop; `unit` says what it counts where the loop's domain does: layer, head, position."""

    value: int | float
    unit: str | None = None

    @property
    def label(self) -> str | int | float:
        return self.value


@dataclass(frozen=True, slots=True)
class Place:
    """A named position, or one of a range between named positions."""

    label: str
    spots: Spots
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class WorldName:
    """A world that a loop ranges over."""

    label: str


Binding = Number | Place | WorldName | Term
Env = Mapping[str, Binding]
"""The local names of an expression: an experiment's loop variables, or a `let`'s parameters."""

NO_LOCALS: Env = {}
