"""What one pass of a sweep found, and where a sweep may get it without running the pass: what an earlier run kept.

Where and how passes are kept is the caller's matter; the sweep only asks and tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """What a pass found: a metric's `[cell of the pass, prompt]`, float64, as read; and which cells (by their number in
    the experiment) came out as the base run's own to the bit."""

    values: dict[str, Tensor]
    silent: tuple[int, ...]


class Kept(Protocol):
    """The finished passes of one experiment, by their number in the program."""

    def get(self, number: int) -> Found | None:
        """What the pass found, where it was run before."""
        ...

    def put(self, number: int, found: Found) -> None:
        """The pass has been run."""
        ...


class NotKept:
    """Every pass is run, and none is kept."""

    def get(self, number: int) -> None:
        """Nothing."""

    def put(self, number: int, found: Found) -> None:
        """Nothing."""
