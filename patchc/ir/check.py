"""How compiled numbers came out beside those of the hooks backend: what a check found, and what it allowed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """How a check of some cells of one experiment came out. Differences are in the metrics' own units, before they are
    normalised.

    max_abs_diff: the largest difference of a compiled number from the hooks backend's. tolerance: the largest that was
    allowed any cell; share: the largest part that a cell used up of what it was allowed itself. largest_effect: the
    largest difference of a checked cell from the base run. reference: the type of number in which hooks were run to
    compare with, where that is a wider one than the model's (`float32` for half precision); max_abs_diff is then that
    from these, and own_diff that of the hooks in the model's own type, None where they could not be run.
    passes: hooked forward passes."""

    cells: int
    max_abs_diff: float
    tolerance: float
    largest_effect: float
    share: float = 0.0
    reference: str | None = None
    own_diff: float | None = None
    passes: int = 0

    def to_json(self) -> dict[str, Any]:
        """What `--format json` says of it; `reference` and `hooks_diff` only where there is such a reference."""
        wider = {} if self.reference is None else {"reference": self.reference, "hooks_diff": self.own_diff}
        found = {"cells": self.cells, "max_abs_diff": self.max_abs_diff, "tolerance": self.tolerance}
        return {**found, "largest_effect": self.largest_effect, **wider}
