"""Attention of many variants of one block at once.

For each port there is a *bank*: the base run's rows, then the rows that some variant projects anew. A query, key or
value of a variant is an index into it, so unchanged positions are read from the base run and nothing is copied a
variant. Variants that need every head are computed together; where only some heads are read, (variant, head) pairs are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from patchc.execute.banks import PAIRS, Bank, Item, Key
from patchc.execute.indices import pick, rows, where
from patchc.execute.inside import Inside
from patchc.execute.packing import packed
from patchc.ir.bits import bits
from patchc.ir.ops import PATTERN, SCORES, Core, VariantId
from patchc.ir.tokens import Tokens

if TYPE_CHECKING:
    from patchc.execute.walk import Walk


class Attention:
    """The cores of one attention block in one pass."""

    def __init__(self, walk: Walk, block: int, layer: int):
        self.walk, self.block, self.layer = walk, block, layer
        self.dag, self.pieces, self.demand = walk.dag, walk.pieces, walk.demand
        self.base, self.device = walk.stored.base_run.attention[block], walk.device
        self.n_heads = self.dag.graph.n_heads
        self.kv = [self.pieces.kv_head(h) for h in range(self.n_heads)]

    def cores(self, cores: list[VariantId]) -> dict[VariantId, tuple[list[int], Tensor]]:
        """For each core: its heads, and z less the base run's at its demanded tokens, `[n, head, d_head]`."""
        ops = {i: op for i in cores if isinstance(op := self.dag.ops[i], Core)}
        banks = self._banks(ops)
        out: dict[VariantId, tuple[list[int], Tensor]] = {}
        plain = {i for i, op in ops.items() if op.is_base(0, 1, 2)} if self.walk.schedule.deltas else set[VariantId]()
        for i in cores:
            heads = list(bits(self.demand.heads[i]))
            at = rows(self.demand.tokens[i], self.device)
            z = self.base.z[at][:, heads]
            out[i] = heads, torch.zeros_like(z) if i in plain else -z
        groups: dict[tuple[int, int, int, tuple[int, ...] | None], list[Item]] = {}
        by_head = self.pieces.masks_by_head(self.layer)
        for item in self._items(i for i in cores if i not in plain):
            length = self.dag.layout.lengths[item.prompt]
            apart = item.heads if by_head or len(item.heads) == self.n_heads else None
            groups.setdefault((length, len(item.positions), item.n_keys, apart), []).append(item)
        for (length, n_queries, n_keys, _), items in groups.items():
            step = max(1, PAIRS * 64 // ((n_queries + n_keys) * len(items[0].heads)))
            for first in range(0, len(items), step):
                self._attend(items[first : first + step], length, ops, banks, out)
        if any(op.replaced_at(SCORES, PATTERN) for op in ops.values()):
            Inside(self, ops, banks).add(out)
        return out

    # ---- projections
    def _key(self, number: VariantId, core: Core, port: int) -> Key:
        """Rows with projections set belong to one core, whose demanded heads they have; others to whoever reads
        them."""
        replaced = core.replaced_at(port)
        return (-number if replaced else core.input(port)), replaced

    def _banks(self, ops: dict[VariantId, Core]) -> list[Bank]:
        asked = self.demand.projections.get(self.block, {})
        banks: list[Bank] = []
        for port in range(3):
            flat = self.base.ready[port].reshape(-1, self.base.ready[port].shape[-1])
            bank = Bank([flat], len(flat))
            raw = self._projected(port, asked, bank)
            for i, core in ops.items():
                key = self._key(i, core, port)
                if key[1]:
                    self._set(bank, port, i, key, raw.get(core.input(port)))
            banks.append(bank)
        for x in {x for x, _ in asked}:
            self.walk.release(x)
        return banks

    def _projected(
        self, port: int, asked: dict[tuple[VariantId, int], tuple[int, Tokens]], bank: Bank
    ) -> dict[VariantId, tuple[Tokens, list[int], Tensor]]:
        """Projects what is asked of this port, inputs that need the same heads together; gives the rows before
        rotary."""
        out: dict[VariantId, tuple[Tokens, list[int], Tensor]] = {}
        by_heads: dict[tuple[int, ...], list[tuple[VariantId, Tokens]]] = {}
        for (x, p), (heads, tokens) in asked.items():
            if p == port:
                columns = sorted({h if port == 0 else self.kv[h] for h in bits(heads)})
                by_heads.setdefault(tuple(columns), []).append((x, tokens))
        for columns, parts in by_heads.items():
            every = len(columns) == (self.n_heads if port == 0 else self.dag.graph.n_kv_heads)
            for batch in packed([(p, p[1].bit_count()) for p in parts], self.walk.schedule.rows):
                y = self.pieces.norm(
                    self.layer, port, self.walk.stream_rows(self.dag.graph.blocks[self.block].rank, batch)
                )
                raw = self.pieces.project(self.layer, port, y, None if every else columns)
                at = torch.cat([rows(tokens, self.device) for _, tokens in batch])
                ready = self.pieces.prepare(self.layer, port, raw, at, self.walk.tables)
                sizes = [tokens.bit_count() for _, tokens in batch]
                for (x, tokens), r, values in zip(batch, raw.split(sizes), ready.split(sizes), strict=True):
                    out[x] = tokens, list(columns), r
                    bank.add((x, ()), tokens, list(columns), values)
        return out

    def _set(
        self, bank: Bank, port: int, core: VariantId, key: Key, raw: tuple[Tokens, list[int], Tensor] | None
    ) -> None:
        """Rows of a port with some projections set: one row a query head, so that heads that share a KV head can
        differ."""
        _, replaced = key
        tokens = 0
        for r in replaced:
            tokens |= r.tokens
        have, columns, computed = raw or (0, [], self.base.raw[port][:0])
        needed = self.demand.tokens[core] if port == 0 else self.dag.reach(self.demand.tokens[core])
        tokens = (tokens | have) & needed
        heads = list(bits(self.demand.heads[core]))
        own = [h if port == 0 else self.kv[h] for h in heads]
        values = self.base.raw[port][rows(tokens, self.device)][:, own].clone()
        if both := have & tokens:
            changed = pick(computed, have, both)
            values[where(tokens, both, self.device)] = changed[:, [columns.index(c) for c in own]]
        for r in replaced:
            here = r.tokens & tokens
            for j, h in enumerate(heads):
                if here and r.heads >> h & 1:
                    at, value = where(tokens, here, self.device), self.dag.values[r.value]
                    asked = rows(here, self.device)
                    values[at, j] = self.walk.stored.projection(self.block, port, h, value, asked, values[at, j])
        ready = self.pieces.prepare(self.layer, port, values, rows(tokens, self.device), self.walk.tables)
        bank.add(key, tokens, [-1 - h for h in heads], ready)

    # ---- attention
    def _items(self, cores: Iterable[VariantId]) -> Iterable[Item]:
        for i in cores:
            heads = tuple(bits(self.demand.heads[i]))
            for prompt, positions in self.dag.layout.split(self.demand.tokens[i]):
                n_keys = positions.bit_length() if self.dag.graph.causal else self.dag.layout.lengths[prompt]
                chosen = tuple(bits(positions))
                if len(heads) == self.n_heads:
                    yield Item(i, prompt, chosen, n_keys, heads)
                else:
                    for h in heads:
                        yield Item(i, prompt, chosen, n_keys, (h,))

    def _attend(
        self,
        items: list[Item],
        length: int,
        ops: dict[VariantId, Core],
        banks: list[Bank],
        out: dict[VariantId, tuple[list[int], Tensor]],
    ) -> None:
        q, k, v = (self.operand(items, ops, banks[port], port) for port in range(3))
        positions = torch.tensor([item.positions for item in items], device=self.device)
        heads = items[0].heads if len(items[0].heads) < self.n_heads and len({i.heads for i in items}) == 1 else None
        z = self.pieces.attend(self.layer, q, k, v, positions, length, self.walk.tables, heads)
        for item, values in zip(items, z, strict=True):
            have, all_rows = out[item.core]
            tokens = sum(1 << p for p in item.positions) << self.dag.layout.offsets[item.prompt]
            at = where(self.demand.tokens[item.core], tokens, self.device)
            if len(item.heads) == len(have):
                all_rows[at] += values
            else:
                all_rows[at, have.index(item.heads[0])] += values[:, 0]

    def operand(self, items: list[Item], ops: dict[VariantId, Core], bank: Bank, port: int) -> Tensor:
        """`[item, position, head, d_head]`: each item's rows of the bank, the base run's with its own laid over
        them."""
        width = self.n_heads if port == 0 else self.dag.graph.n_kv_heads
        found = [bank.rows(self._key(i.core, ops[i.core], port), self.dag.layout.n_tokens, width) for i in items]
        at = [self._tokens(item, port) for item in items]
        first = np.stack([rows.first[t] for rows, t in zip(found, at, strict=True)])
        base = np.array([[h if port == 0 else self.kv[h] for h in item.heads] for item in items])
        own = base.copy()
        for i, (item, mine, t) in enumerate(zip(items, found, at, strict=True)):
            if mine.own[t].any():  # else another core's heads may be all that the key's rows hold
                own[i] = [self._column(mine.heads, h, port) for h in item.heads]
        columns = base[:, None]
        if not np.array_equal(base, own):
            is_own = np.stack([rows.own[t] for rows, t in zip(found, at, strict=True)])
            columns = np.where(is_own[:, :, None], own[:, None], base[:, None])
        return bank.flat()[torch.from_numpy(first[:, :, None] + columns).to(self.device)]

    def _tokens(self, item: Item, port: int) -> npt.NDArray[np.int64]:
        """The tokens that an item reads at a port."""
        offset = self.dag.layout.offsets[item.prompt]
        if port == 0:
            return np.array(item.positions) + offset
        return np.arange(offset, offset + item.n_keys)

    def _column(self, heads: list[int], head: int, port: int) -> int:
        """Where a query head's rows stand among the heads of a key; negative heads are query heads (see `_set`)."""
        return heads.index(-1 - head if heads[0] < 0 else head if port == 0 else self.kv[head])
