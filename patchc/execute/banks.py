"""Rows of projections of one attention block: the base run's, and those that some variant projects anew.

What is projected, and what is done with the rows, is `attention`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchc.ir.bits import bits
from patchc.ir.ops import Replaced, VariantId
from patchc.ir.tokens import Tokens

Key = tuple[int, tuple[Replaced, ...]]
"""Whose rows: the input that a port reads, or minus a core's number where some of its projections are set."""

PAIRS = 1024
"""(variant, prompt, head) triples of one attention call, times positions: bounds its memory."""


@dataclass(frozen=True, slots=True)
class KeyRows:
    """For every token: where its row begins in the bank, and whether it is the key's own. `heads`: those of its own
    rows."""

    first: npt.NDArray[np.int64]
    own: npt.NDArray[np.bool_]
    heads: list[int]


@dataclass
class Bank:
    """Rows of one port, flattened to `[row * head, d_head]`; `first[key]`: where a key's rows begin; `tokens[key]`: at
    which tokens it has some; `heads[key]`: which heads stand in each of its rows."""

    parts: list[Tensor]
    size: int
    first: dict[Key, int] = field(default_factory=dict[Key, int])
    tokens: dict[Key, Tokens] = field(default_factory=dict[Key, Tokens])
    heads: dict[Key, list[int]] = field(default_factory=dict[Key, list[int]])
    _rows: dict[Key, KeyRows] = field(default_factory=dict["Key", "KeyRows"])

    def add(self, key: Key, tokens: Tokens, heads: list[int], values: Tensor) -> None:
        self.first[key], self.tokens[key], self.heads[key] = self.size, tokens, heads
        self.parts.append(values.reshape(-1, values.shape[-1]))
        self.size += len(self.parts[-1])

    def rows(self, key: Key, n_tokens: int, width: int) -> KeyRows:
        """Where the rows of a key stand for every token."""
        found = self._rows.get(key)
        if found is None:
            first = np.arange(n_tokens) * width
            own = np.zeros(n_tokens, dtype=np.bool_)
            tokens = np.array(list(bits(self.tokens.get(key, 0))), dtype=np.int64)
            if len(tokens):
                first[tokens] = self.first[key] + np.arange(len(tokens)) * len(self.heads[key])
                own[tokens] = True
            found = self._rows[key] = KeyRows(first, own, self.heads.get(key, []))
        return found

    def flat(self) -> Tensor:
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts)]
        return self.parts[0]


@dataclass(frozen=True, slots=True)
class Item:
    """One variant on one prompt: the queries wanted, as positions, and how many keys they may read."""

    core: VariantId
    prompt: int
    positions: tuple[int, ...]
    n_keys: int
    heads: tuple[int, ...]
