"""Attention scores and patterns that are set: what that changes of z, added to what attention computes without it.

z is linear in the pattern, so a head whose pattern is set entry by entry needs only those rows of it: the new less the
own pattern, times the values. Rows of which q and k are the base run's are shared by all variants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchc.execute.banks import PAIRS, Bank, Item
from patchc.execute.indices import where
from patchc.execute.patterns import PlainRows, pattern_of
from patchc.ir.bits import bits
from patchc.ir.ops import PATTERN, SCORES, Core, Replaced, VariantId

if TYPE_CHECKING:
    from patchc.execute.attention import Attention

Out = dict[VariantId, tuple[list[int], Tensor]]


@dataclass(frozen=True, slots=True)
class Kind:
    """What rows that are computed together have in common: head, length of the prompt, number of rows of a variant,
    whether q and k, and v, are the base run's, and which values are set in which order."""

    head: int
    length: int
    n_rows: int
    plain: bool
    plain_values: bool
    sets: tuple[tuple[int, int], ...]


class Inside:
    """The rows of scores and patterns that are set in the cores of one block."""

    def __init__(self, attention: Attention, ops: dict[VariantId, Core], banks: list[Bank]):
        self.attention, self.ops, self.banks = attention, ops, banks
        self.dag, self.pieces = attention.dag, attention.pieces
        self.stored, self.tables = attention.walk.stored, attention.walk.tables
        self.layout = self.dag.layout

    def add(self, out: Out) -> None:
        """Adds to each core's z what its set scores and patterns change."""
        groups: dict[Kind, list[Item]] = {}
        for kind, item in self._items():
            groups.setdefault(kind, []).append(item)
        for kind, items in groups.items():
            step = max(1, PAIRS * 64 // (kind.n_rows * kind.length))
            for first in range(0, len(items), step):
                self._add(kind, items[first : first + step], out)

    def _items(self) -> Iterator[tuple[Kind, Item]]:
        """Each core's rows, head by head and prompt by prompt."""
        for i, core in self.ops.items():
            demanded = self.attention.demand.tokens[i]
            for head in bits(self.attention.demand.heads[i]):
                tokens = 0
                for r in self._set(core, head):
                    tokens |= r.tokens & demanded
                for prompt, positions in self.layout.split(tokens):
                    sets = tuple((r.port, r.value) for r in self._set(core, head))
                    length, chosen = self.layout.lengths[prompt], tuple(bits(positions))
                    kind = Kind(head, length, len(chosen), core.is_base(0, 1), core.is_base(2), sets)
                    yield kind, Item(i, prompt, chosen, length, (head,))

    def _set(self, core: Core, head: int) -> list[Replaced]:
        return [r for r in core.replaced_at(SCORES, PATTERN) if r.heads >> head & 1]

    def _add(self, kind: Kind, items: list[Item], out: Out) -> None:
        own = self._own_scores(kind, items)
        visible = own > float("-inf")
        plain = PlainRows(self.stored, self.tables, self.attention.block, self.attention.layer, kind.head)
        tokens = torch.stack([self._tokens(item) for item in items]).flatten()
        before = pattern_of(own)
        parts = {SCORES: own, PATTERN: before}
        for port in (SCORES, PATTERN):
            start = parts[port].flatten(0, 1)
            for number, (at, value) in enumerate(kind.sets):
                if at == port:
                    new = plain.value(port, self.dag.values[value], tokens, start).view_as(own)
                    parts[port] = torch.where(self._entries(items, number) & visible, new, parts[port])
            if port == SCORES and any(at == SCORES for at, _ in kind.sets):
                parts[PATTERN] = pattern_of(parts[SCORES])
        z = self._mixed(kind, items, parts[PATTERN] - before)
        for item, change in zip(items, z, strict=True):
            heads, rows = out[item.core]
            positions = sum(1 << p for p in item.positions) << self.layout.offsets[item.prompt]
            at = where(self.attention.demand.tokens[item.core], positions, self.pieces.device)
            rows[at, heads.index(kind.head)] += change

    def _own_scores(self, kind: Kind, items: list[Item]) -> Tensor:
        """Scores that the variants themselves have, `[item, row, position]`."""
        if kind.plain:
            plain = PlainRows(self.stored, self.tables, self.attention.block, self.attention.layer, kind.head)
            tokens = torch.stack([self._tokens(item) for item in items])
            scores = plain.scores(self.stored.base_run, tokens.flatten(), kind.length)
            return scores.view(*tokens.shape, kind.length)
        q, k = (self.attention.operand(items, self.ops, self.banks[port], port) for port in range(2))
        positions = torch.tensor([item.positions for item in items], device=self.pieces.device)
        layer = self.attention.layer
        return self.pieces.scores(layer, q, k, positions, kind.length, self.tables, [kind.head])[:, 0]

    def _mixed(self, kind: Kind, items: list[Item], change: Tensor) -> Tensor:
        """A change of patterns `[item, row, position]` times the values: `[item, row, d_head]`."""
        if not kind.plain_values:
            values = self.attention.operand(items, self.ops, self.banks[2], 2)[:, :, 0]
            return change @ values
        ready = self.attention.base.ready[2][:, self.attention.kv[kind.head]]
        out = torch.empty(*change.shape[:2], ready.shape[1], device=change.device, dtype=change.dtype)
        for prompt in {item.prompt for item in items}:
            mine = [i for i, item in enumerate(items) if item.prompt == prompt]
            first = self.layout.offsets[prompt]
            out[mine] = change[mine] @ ready[first : first + kind.length]
        return out

    def _entries(self, items: list[Item], number: int) -> Tensor:
        """Which entries the set of that number puts a value at, `[item, row, position]`."""
        asks: list[list[bool]] = []
        looked_at: list[list[bool]] = []
        for item in items:
            r = self._set(self.ops[item.core], item.heads[0])[number]
            first = self.layout.offsets[item.prompt]
            asks.append([bool(r.tokens >> (first + p) & 1) for p in item.positions])
            looked_at.append([bool(r.sources >> (first + p) & 1) for p in range(item.n_keys)])
        device = self.pieces.device
        return torch.tensor(asks, device=device)[:, :, None] & torch.tensor(looked_at, device=device)[:, None]

    def _tokens(self, item: Item) -> Tensor:
        """On the CPU: `patterns` looks at them one by one."""
        return torch.tensor(item.positions) + self.layout.offsets[item.prompt]
