"""Who else does the work: what a peer is. Each has a file here, imports what it needs late, and may be missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import nn

from patchc.bench.shape import Shape, Worlds
from patchc.bench.works import Work

if TYPE_CHECKING:
    from patchc.api import Compiled

Coords = tuple[str | int | float, ...]
"""A cell, by its coordinates along the spec's dims."""


@dataclass(frozen=True, slots=True)
class Task:
    """What a peer is to do: some cells of a work. `compiled` is patchc's own study of it."""

    work: Work
    shape: Shape
    worlds: Worlds
    compiled: Compiled


class PeerError(Exception):
    """A peer that is there could not do the work; the row goes without it, and says why."""


class Session(Protocol):
    """A peer made ready for a task; `fixed_s`: the CPU seconds that this took, the model's loading aside."""

    fixed_s: float

    def run(self, cells: Sequence[Coords]) -> tuple[list[float], float]:
        """The metric in each cell, and the CPU seconds that they took, all threads together."""
        ...

    def close(self) -> None: ...


class Peer(Protocol):
    """`name`: as the table has it."""

    name: str

    def missing(self) -> str | None:
        """Why it cannot be measured here, if it cannot."""
        ...

    def does(self, work: Work) -> bool: ...

    def open(self, task: Task) -> Session: ...


class Module(Protocol):
    """Makes the model that is measured on, a new copy at each call."""

    def __call__(self) -> nn.Module: ...
