"""Progress bars: one an experiment, for a terminal or a notebook. Who is told of progress is the caller's choice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

Progress = Callable[[str, int, int], None]
"""Told an experiment's name, how many of its cells are done, and how many it has; of loading a model what is done, and
how many steps of it there are."""


def silent(_name: str, _done: int, _total: int) -> None:
    """Shows nothing."""


def bars(unit: str = "cell") -> Progress:
    """A bar for each name that is told; silent where nobody looks."""
    from tqdm.auto import tqdm

    shown: dict[str, Any] = {}

    def tell(name: str, done: int, total: int) -> None:
        if name not in shown:
            shown[name] = tqdm(total=total, desc=name, unit=unit, leave=False, file=sys.stderr, disable=None)
        shown[name].update(done - shown[name].n)
        if done >= total:
            shown[name].close()

    return tell
