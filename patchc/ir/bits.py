"""Sets of small numbers as Python ints: bit i stands for member i. Fast to join, to hash and to compare."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def bits(mask: int) -> Iterator[int]:
    """The members of a set, in order."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def bitset(members: Iterable[int]) -> int:
    """The set with these members."""
    mask = 0
    for i in members:
        mask |= 1 << i
    return mask
