"""One pass: a walk over the model's blocks that computes every variant of the pass's cells, block by block.

At each block the rows of all variants are packed into common matrix products. Values are differences from the base run,
`[token rows, d_model]`, made when a block first reads them and dropped after their last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.execute.attention import Attention
from patchc.execute.entries import EntryRows
from patchc.execute.indices import pick, rows, where
from patchc.execute.packing import packed
from patchc.execute.stored import Stored
from patchc.execute.suffix import Suffixes
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.ops import (
    EQUAL_TO_BASE,
    Const,
    Core,
    Entries,
    HeadZ,
    Masked,
    Mix,
    Neurons,
    Out,
    PostNorm,
    Projected,
    Run,
    Scale,
    StoredZ,
    Stream,
    Sum,
    Tokenwise,
    ValueId,
    VariantId,
    children,
)
from patchc.ir.program import FULL, Schedule
from patchc.ir.tokens import Tokens
from patchc.model.pieces import Pieces, Tables
from patchc.optimise.demand import Counts, demand

STORED = (Const, Stream, StoredZ)


@dataclass
class Walk:
    """The state of one pass. `measured`: the tokens at which `streams()` gives the final stream of each root."""

    dag: Dag
    pieces: Pieces
    tables: Tables
    stored: Stored
    measured: Tokens = 0
    schedule: Schedule = FULL

    def __post_init__(self) -> None:
        self.device = self.pieces.device

    def streams(self, roots: Sequence[VariantId]) -> list[Tensor]:
        """For each root `[measured token, d_model]`: the base run's final stream with the root's difference added."""
        final = self.stored.base_run.stream[-1][rows(self.measured, self.device)]
        (found,) = self.read([(r,) for r in roots], [(final, self.measured)])
        return list(found)

    def read(self, cells: Sequence[Sequence[VariantId]], ends: Sequence[tuple[Tensor, Tokens]]) -> list[Tensor]:
        """What the cells have at each end, `[cell, token, width]`: the base run's numbers there, which `ends` gives
        with the tokens, and the difference of each cell's root."""
        reads = [(r, tokens) for roots in cells for r, (_, tokens) in zip(roots, ends, strict=True)]
        self.demand = demand(self.dag, reads, self.schedule)
        self.values: dict[VariantId, Tensor] = {}
        self.left = Counts(self.demand.uses)
        self.felt: dict[VariantId, Tensor] = {}
        self._blocks()
        out = [self._at_end([roots[i] for roots in cells], *end) for i, end in enumerate(ends)]
        self.zero = self._zero()
        self.unfelt = [all(map(self._is_unfelt, roots)) for roots in cells]
        return out

    def _zero(self) -> set[VariantId]:
        """Values that came out as the base run's own; read together, since each reading waits for the device."""
        felt = torch.stack(list(self.felt.values())).tolist() if self.felt else []
        return {i for i, is_felt in zip(self.felt, felt, strict=True) if not is_felt}

    def _is_unfelt(self, root: VariantId) -> bool:
        """Whether every value that enters below a root came out as the base run's own. What is computed from such
        values differs in its last bits, so the final stream would not tell."""
        seen: set[VariantId] = {EQUAL_TO_BASE}
        todo = [root]
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            op = self.dag.ops[i]
            if isinstance(op, STORED) and self.demand.tokens[i] and i not in self.zero:
                return False
            if isinstance(op, Core | Tokenwise | Projected | Entries | Neurons) and op.replaced:
                return False
            todo.extend(children(op))
        return True

    def _at_end(self, roots: Sequence[VariantId], base: Tensor, tokens: Tokens) -> Tensor:
        out = base.expand(len(roots), *base.shape).clone()
        for mine, root in zip(out, roots, strict=True):
            if not (here := self.demand.tokens[root] & tokens):
                continue
            if root in self.finals:
                mine[where(tokens, here, self.device)] = pick(self.finals[root], self.demand.tokens[root], here)
            else:
                mine[where(tokens, here, self.device)] += pick(self.value(root), self.demand.tokens[root], here)
                self.release(root)
        return out

    # ---- values that need no model
    def value(self, i: VariantId) -> Tensor:
        """A variant's difference at its demanded tokens; the reader calls `release` when it is done."""
        if i not in self.values:
            made = self.values[i] = self._make(i)
            if isinstance(self.dag.ops[i], STORED):
                self.felt[i] = made.any()
        return self.values[i]

    def release(self, i: VariantId) -> None:
        self.left[i] -= 1
        if not self.left[i]:
            self.values.pop(i, None)

    def _make(self, i: VariantId) -> Tensor:
        tokens = self.demand.tokens[i]
        match self.dag.ops[i]:
            case Const(block, members, value, _, site):
                return self.stored.node(block, members, self.dag.values[value], rows(tokens, self.device), site)
            case Stream(rank, value, _, block):
                return self.stored.stream(rank, self.dag.values[value], rows(tokens, self.device), block)
            case StoredZ(block, head, value, _):
                return self.stored.z(block, head, self.dag.values[value], rows(tokens, self.device))
            case PostNorm(block, x):
                return self._normed(block, self._add([(tokens, x)], tokens), rows(tokens, self.device))
            case Sum(parts):
                return self._add([(tokens, p) for p in parts], tokens)
            case Mix(parts):
                return self._add(parts, tokens)
            case Scale(factor, x):
                return factor * self._add([(tokens, x)], tokens)
            case Run():
                return self.finals[i] - self.stored.base_run.stream[-1][rows(tokens, self.device)]
            case Core() | Out() | Tokenwise() | Masked() | Projected() | HeadZ() | Entries() | Neurons() as op:
                raise AssertionError(f"variant {i} was read before its block ran: {op}")

    def _normed(self, block: int, x: Tensor, at: Tensor) -> Tensor:
        """What a block adds to the stream, less the base run's, where its members write `x` more."""
        own, layer = self.stored.base_run.written[block][at], self._layer(block)
        return self.pieces.post_norm(layer, own + x) - self.pieces.post_norm(layer, own)

    def _add(self, parts: Sequence[tuple[Tokens, VariantId]], tokens: Tokens) -> Tensor:
        """The sum of parts, each at its own tokens."""
        out: Tensor | None = None
        for some, p in parts:
            if here := some & tokens & self.dag.changed[p]:
                value = self.value(p)
                out = value.new_zeros(tokens.bit_count(), value.shape[1]) if out is None else out
                out[where(tokens, here, self.device)] += pick(value, self.demand.tokens[p], here)
                self.release(p)
        assert out is not None, "a variant is asked for where it changes something"
        return out

    def stream_rows(self, rank: int, parts: Sequence[tuple[VariantId, Tokens]]) -> Tensor:
        """The whole stream below `rank` for several variants, each at its tokens: `[rows, d_model]`."""
        deltas = [
            pick(self.value(x), self.demand.tokens[x], tokens)
            if tokens and not tokens & ~self.dag.changed[x]
            else self._spread_out(x, tokens)
            for x, tokens in parts
        ]
        at = torch.cat([rows(tokens, self.device) for _, tokens in parts])
        return torch.cat(deltas) + self.stored.base_run.stream[rank][at]

    def _spread_out(self, x: VariantId, tokens: Tokens) -> Tensor:
        """A variant's difference at tokens at some of which there is none; at no tokens nobody has computed it."""
        out = torch.zeros(tokens.bit_count(), self.dag.graph.d_model, device=self.device, dtype=self.pieces.dtype)
        if here := tokens & self.dag.changed[x]:
            out[where(tokens, here, self.device)] = pick(self.value(x), self.demand.tokens[x], here)
        return out

    # ---- the model's nodes
    def _blocks(self) -> None:
        by_block, suffixes = self._by_block(), Suffixes(self)
        for rank, blocks in enumerate(suffixes.blocks):
            for index, block in blocks:
                if variants := by_block.get(index):
                    (self._mlps if block.kind is BlockKind.MLP else self._attention)(index, variants)
            suffixes.advance(rank)
        self.finals = dict(suffixes.finals())

    def _by_block(self) -> dict[int, list[VariantId]]:
        """The demanded outputs of each block."""
        out: dict[int, list[VariantId]] = {}
        for i in reversed(self.demand.tokens):
            match self.dag.ops[i]:
                case Tokenwise(block) | Projected(block) | Entries(block) | Neurons(block):
                    out.setdefault(block, []).append(i)
                case Out(core) | HeadZ(core):
                    op = self.dag.ops[core]
                    assert isinstance(op, Core)
                    out.setdefault(op.block, []).append(i)
                case _:
                    pass
        return out

    def _mlps(self, index: int, variants: list[VariantId]) -> None:
        ops = {i: op for i in variants if isinstance(op := self.dag.ops[i], Tokenwise)}
        tokens = self.demand.tokens
        for kind in (self._run_mlps, self._run_neurons, self._stored_neurons):
            mine = [(i, tokens[i].bit_count()) for i, op in ops.items() if self._mlp_kind(op) == kind]
            for batch in packed(mine, self.schedule.rows):
                self._keep(batch, kind(index, [(i, ops[i]) for i in batch]))
        for i in variants:
            if isinstance(op := self.dag.ops[i], Neurons):
                self.values[i] = self._neurons(index, i, op)
        self.stored.forget(index)

    def _mlp_kind(self, op: Tokenwise) -> Callable[[int, list[tuple[VariantId, Tokenwise]]], Tensor]:
        if not op.replaced:
            return self._run_mlps
        stored = not op.input and self.dag.graph.blocks[op.block].neurons_add_up
        return self._stored_neurons if stored else self._run_neurons

    def _run_mlps(self, index: int, batch: list[tuple[VariantId, Tokenwise]]) -> Tensor:
        """MLPs on changed streams, less what the base run's write."""
        layer = self._layer(index)
        at = torch.cat([rows(self.demand.tokens[i], self.device) for i, _ in batch])
        return self.pieces.mlp(layer, self._inputs(index, batch)) - self.stored.base_run.mlp[index][at]

    def _run_neurons(self, index: int, batch: list[tuple[VariantId, Tokenwise]]) -> Tensor:
        """The same with neurons set."""
        post = self._posts(index, batch)
        at = torch.cat([rows(self.demand.tokens[i], self.device) for i, _ in batch])
        return self.pieces.mlp_down(self._layer(index), post) - self.stored.base_run.mlp[index][at]

    def _neurons(self, index: int, i: VariantId, op: Neurons) -> Tensor:
        """Neurons less the base run's, `[n, d_mlp]`."""
        base = self.stored.post(self.stored.base_run, index)
        return self._posts(index, [(i, op)]) - base[rows(self.demand.tokens[i], self.device)]

    def _posts(self, index: int, batch: Sequence[tuple[VariantId, Tokenwise | Neurons]]) -> Tensor:
        """Neurons on changed streams, with those that are set, `[rows, d_mlp]`."""
        layer = self._layer(index)
        post = self.pieces.mlp_post(layer, self._inputs(index, batch))
        sizes = [self.demand.tokens[i].bit_count() for i, _ in batch]
        for (i, op), mine in zip(batch, post.split(sizes), strict=True):
            own = mine.clone()
            for r in op.replaced:
                if here := r.tokens & self.demand.tokens[i]:
                    at, columns = where(self.demand.tokens[i], here, self.device), list(bits(r.neurons))
                    value = self.stored.neurons(index, self.dag.values[r.value], rows(here, self.device), own[at])
                    mine[at] = mine[at].index_copy(1, torch.tensor(columns, device=mine.device), value[:, columns])
        return post

    def _stored_neurons(self, index: int, batch: list[tuple[VariantId, Tokenwise]]) -> Tensor:
        """Stored neurons less the base run's, written: variants that set the same neurons in one product."""
        groups: dict[int, list[tuple[VariantId, Tokenwise]]] = {}
        for i, op in batch:
            groups.setdefault(op.neurons, []).append((i, op))
        known: dict[tuple[ValueId, Tokens], Tensor] = {}
        written: dict[VariantId, Tensor] = {}
        for neurons, group in groups.items():
            gaps = [self._gap(index, i, op, known) for i, op in group]
            out = self.pieces.neurons(self._layer(index), torch.cat(gaps), list(bits(neurons)))
            for (i, _), part in zip(group, out.split([len(g) for g in gaps]), strict=True):
                written[i] = part
        return torch.cat([written[i] for i, _ in batch])

    def _gap(self, index: int, i: VariantId, op: Tokenwise, known: dict[tuple[ValueId, Tokens], Tensor]) -> Tensor:
        """What the neurons that a variant sets have more than in the base run, `[token, neuron]`; `known` has the
        differences of whole layers."""
        neurons, demanded = list(bits(op.neurons)), self.demand.tokens[i]
        out = torch.zeros(demanded.bit_count(), len(neurons), device=self.device, dtype=self.pieces.dtype)
        for r in op.replaced:
            if here := r.tokens & demanded:
                if (r.value, here) not in known:
                    asked, value = rows(here, self.device), self.dag.values[r.value]
                    own = self.stored.post(self.stored.base_run, index)[asked]
                    known[r.value, here] = self.stored.neurons(index, value, asked, own) - own
                mine = [column for column, n in enumerate(neurons) if r.neurons >> n & 1]
                at = torch.arange(len(out), device=out.device)[where(demanded, here, self.device)]
                out[at[:, None], mine] = known[r.value, here][:, [neurons[column] for column in mine]]
        return out

    def _inputs(self, index: int, batch: Sequence[tuple[VariantId, Tokenwise | Neurons]]) -> Tensor:
        """The streams that some MLPs read, `[rows, d_model]`."""
        rank, tokens = self.dag.graph.blocks[index].rank, self.demand.tokens
        x = self.stream_rows(rank, [(op.input, tokens[i]) for i, op in batch])
        for i, op in batch:
            if tokens[i] & self.dag.changed[op.input]:  # else nobody has asked for it
                self.release(op.input)
        return x

    def _layer(self, index: int) -> int:
        layer = self.dag.graph.blocks[index].layer
        assert layer is not None
        return layer

    def _attention(self, index: int, variants: list[VariantId]) -> None:
        block = self.dag.graph.blocks[index]
        assert block.layer is not None
        outs = [(i, op) for i in variants if isinstance(op := self.dag.ops[i], Out)]
        read = [(i, op) for i in variants if isinstance(op := self.dag.ops[i], HeadZ)]
        for i in variants:
            match self.dag.ops[i]:
                case Projected() as op:
                    self.values[i] = self._projected(block.layer, op, self.demand.tokens[i])
                case Entries() as op:
                    self.values[i] = EntryRows(self, block.layer, op).differences(self.demand.tokens[i])
                    self._release_all(op)
                case _:
                    pass
        cores = sorted({op.core for _, op in (*outs, *read)})
        z = Attention(self, index, block.layer).cores(cores)
        for i, op in read:
            heads, values = z[op.core]
            values = pick(values, self.demand.tokens[op.core], self.demand.tokens[i])
            self.values[i] = values[:, heads.index(op.head)]
        by_heads: dict[int, list[tuple[VariantId, VariantId]]] = {}
        for i, op in outs:
            by_heads.setdefault(op.heads, []).append((i, op.core))
        for heads, group in by_heads.items():
            for batch in packed(
                [((i, core), self.demand.tokens[i].bit_count()) for i, core in group], self.schedule.rows
            ):
                self._keep([i for i, _ in batch], self._written(block.layer, heads, batch, z))

    def _release_all(self, op: Entries) -> None:
        for x in (op.q, op.k):
            if x:
                self.release(x)

    def _projected(self, layer: int, op: Projected, tokens: Tokens) -> Tensor:
        """A head's q, k or v less the base run's, `[n, d_head]`."""
        column = op.head if op.port == 0 else self.pieces.kv_head(op.head)
        base = self.stored.base_run.attention[op.block].raw[op.port][rows(tokens, self.device)][:, column]
        out = base.clone()
        if here := tokens & self.dag.changed[op.input]:
            x = self.stream_rows(self.dag.graph.blocks[op.block].rank, [(op.input, here)])
            self.release(op.input)
            y = self.pieces.norm(layer, op.port, x)
            out[where(tokens, here, self.device)] = self.pieces.project(layer, op.port, y, [column])[:, 0]
        for r in op.replaced:
            if here := tokens & r.tokens:
                at, value = where(tokens, here, self.device), self.dag.values[r.value]
                out[at] = self.stored.projection(op.block, op.port, op.head, value, rows(here, self.device), out[at])
        return out - base

    def _written(
        self,
        layer: int,
        heads: int,
        batch: list[tuple[VariantId, VariantId]],
        z: dict[VariantId, tuple[list[int], Tensor]],
    ) -> Tensor:
        wanted = list(bits(heads))
        parts: list[Tensor] = []
        for i, core in batch:
            have, values = z[core]
            mine = pick(values, self.demand.tokens[core], self.demand.tokens[i])
            parts.append(mine if have == wanted else mine[:, [have.index(h) for h in wanted]])
        return self.pieces.write(layer, torch.cat(parts), wanted if len(wanted) < self.dag.graph.n_heads else None)

    def _keep(self, variants: list[VariantId], values: Tensor) -> None:
        sizes = [self.demand.tokens[i].bit_count() for i in variants]
        for i, value in zip(variants, values.split(sizes), strict=True):
            self.values[i] = value
