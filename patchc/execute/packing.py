"""How many rows go into one matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import ceil
from typing import TypeVar

from torch import Tensor

T = TypeVar("T")


def packed(items: Sequence[tuple[T, int]], most: int) -> Iterator[list[T]]:
    """Runs of items, given with their rows, of about `most` rows each."""
    batch: list[T] = []
    total = 0
    for item, n in items:
        if batch and total + n > most * 1.25:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += n
    if batch:
        yield batch


def even(x: Tensor, most: int) -> tuple[Tensor, ...]:
    """Rows in pieces of equal size, of about `most` at most."""
    pieces = max(1, ceil(len(x) / (1.25 * max(1, most))))
    return x.split(max(1, -(-len(x) // pieces)))
