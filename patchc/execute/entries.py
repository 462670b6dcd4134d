"""Rows of a head's attention scores or pattern as a metric reads them in a patched run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchc.execute.indices import CPU, pick, rows, where
from patchc.execute.patterns import HIDDEN, PlainRows, pattern_of
from patchc.ir.bits import bits
from patchc.ir.ops import PATTERN, SCORES, Entries, VariantId
from patchc.ir.tokens import Tokens

if TYPE_CHECKING:
    from patchc.execute.walk import Walk


class EntryRows:
    """One variant's rows; its q and k are variants that have been computed."""

    def __init__(self, walk: Walk, layer: int, op: Entries):
        self.walk, self.layer, self.op = walk, layer, op
        self.pieces, self.layout, self.base = walk.pieces, walk.dag.layout, walk.stored.base_run.attention[op.block]
        self.plain = PlainRows(walk.stored, walk.tables, op.block, layer, op.head)

    def differences(self, tokens: Tokens) -> Tensor:
        """Less the base run's, at some tokens: `[n, longest prompt]`; 0 where both are hidden."""
        width = max(self.layout.lengths)
        out = torch.zeros(tokens.bit_count(), width, device=self.pieces.device, dtype=self.pieces.dtype)
        for prompt, positions in self.layout.split(tokens):
            here = positions << self.layout.offsets[prompt]
            length = self.layout.lengths[prompt]
            base = self.plain.of_world(self.op.port, self.walk.stored.base, rows(here, CPU), length)
            new = self._of_prompt(prompt, here)
            gap = (new - base).masked_fill((new == HIDDEN) & (base == HIDDEN), 0)
            out[where(tokens, here, out.device), :length] = gap
        return out

    def _of_prompt(self, prompt: int, here: Tokens) -> Tensor:
        """Scores or pattern of some tokens of one prompt, `[n, length]`."""
        length = self.layout.lengths[prompt]
        q, k = self._ready(0, self.op.q, here), self._ready(1, self.op.k, self.layout.prompt(prompt))
        positions = (rows(here, self.pieces.device) - self.layout.offsets[prompt])[None]
        tables = self.walk.tables
        own = self.pieces.scores(self.layer, q, k, positions, length, tables, [self.op.head])[0, 0]
        scores = self._set(SCORES, own, own > HIDDEN, prompt, here)
        if self.op.port == SCORES:
            return scores
        return self._set(PATTERN, pattern_of(scores), own > HIDDEN, prompt, here)

    def _ready(self, port: int, x: VariantId, tokens: Tokens) -> Tensor:
        """q or k as attention reads them, `[1, n, 1, d_head]`."""
        at = rows(tokens, self.pieces.device)
        column = self.op.head if port == 0 else self.pieces.kv_head(self.op.head)
        raw = self.base.raw[port][at][:, column].clone()
        if here := tokens & self.walk.dag.changed[x]:
            raw[where(tokens, here, raw.device)] += pick(self.walk.value(x), self.walk.demand.tokens[x], here)
        return self.pieces.prepare(self.layer, port, raw[:, None], at, self.walk.tables)[None]

    def _set(self, port: int, own: Tensor, visible: Tensor, prompt: int, here: Tokens) -> Tensor:
        """With values at the entries where they start."""
        out, first, length = own, self.layout.offsets[prompt], self.layout.lengths[prompt]
        for r in self.op.replaced:
            if r.port == port and r.tokens & here:
                asks = torch.tensor([bool(r.tokens >> t & 1) for t in bits(here)], device=own.device)
                looked_at = torch.tensor([bool(r.sources >> (first + p) & 1) for p in range(length)], device=own.device)
                new = self.plain.value(port, self.walk.dag.values[r.value], rows(here, CPU), own)
                out = torch.where(asks[:, None] & looked_at & visible, new, out)
        return out
