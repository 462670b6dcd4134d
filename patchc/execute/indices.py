"""From token sets to index tensors: rows of a set stand in token order."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from patchc.ir.bits import bits
from patchc.ir.tokens import Tokens


@lru_cache(maxsize=8192)
def rows(tokens: Tokens) -> Tensor:
    """The token numbers of a set, ascending."""
    return torch.tensor(list(bits(tokens)), dtype=torch.long)


@lru_cache(maxsize=65536)
def where(have: Tokens, want: Tokens) -> Tensor | slice:
    """Where the rows of `want` stand among the rows of `have`, of which it is a subset."""
    places = [(have & ((1 << t) - 1)).bit_count() for t in bits(want)]
    if places and places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, dtype=torch.long)


def pick(values: Tensor, have: Tokens, want: Tokens) -> Tensor:
    """The rows of `want` from rows of `have`."""
    return values if have == want else values[where(have, want)]
