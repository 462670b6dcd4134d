"""How many rows go into one matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

ROWS = 960
"""Token rows of one matrix product: more only costs memory, fewer than half run slowly."""


def packed(items: Sequence[tuple[T, int]]) -> Iterator[list[T]]:
    """Runs of items, given with their rows, of about ROWS rows each."""
    batch: list[T] = []
    total = 0
    for item, n in items:
        if batch and total + n > ROWS * 1.25:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += n
    if batch:
        yield batch
