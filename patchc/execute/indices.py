"""From token sets to index tensors on the device where they are used: rows of a set stand in token order.

Tensors are kept, so that a GPU is not sent the same numbers for every variant.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from patchc.ir.bits import bits
from patchc.ir.tokens import Tokens

CPU = torch.device("cpu")


@lru_cache(maxsize=8192)
def rows(tokens: Tokens, device: torch.device) -> Tensor:
    """The token numbers of a set, ascending: `[n]`."""
    return torch.tensor(list(bits(tokens)), dtype=torch.long, device=device)


@lru_cache(maxsize=8192)
def where(have: Tokens, want: Tokens, device: torch.device) -> Tensor | slice:
    """Where the rows of `want` stand among the rows of `have`, of which it is a subset."""
    places = [(have & ((1 << t) - 1)).bit_count() for t in bits(want)]
    if places and places[-1] - places[0] == len(places) - 1:
        return slice(places[0], places[-1] + 1)
    return torch.tensor(places, dtype=torch.long, device=device)


def pick(values: Tensor, have: Tokens, want: Tokens) -> Tensor:
    """The rows of `want` from rows of `have`."""
    return values if have == want else values[where(have, want, values.device)]
