"""How much memory a pass holds at its fullest, told before it runs: plain runs, live differences, one block's work.

An estimate: every large tensor is counted where it is alive, small ones and what the allocator keeps are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.ops import (
    Core,
    Entries,
    HeadZ,
    Neurons,
    Op,
    Out,
    Projected,
    Run,
    StoredZ,
    Tokenwise,
    VariantId,
    children,
)
from patchc.ir.program import FULL, Schedule
from patchc.ir.tokens import Tokens
from patchc.optimise.demand import Demand, demand
from patchc.optimise.work import Work

ROWS = 1200
"""Token rows that one matrix product takes at most."""
GATHERED = 4096 * 64
"""Rows of head width that attention gathers at once, for queries, keys and values together."""


def plain_run_bytes(graph: ResidualGraph, tokens: int, element: int) -> int:
    """What one world's plain run keeps: embeddings, the stream below each rank, q, k, v twice, z, MLP outputs."""
    heads, kv = graph.n_heads * graph.d_head, graph.n_kv_heads * graph.d_head
    total = (graph.blocks[0].size + graph.top + 1) * graph.d_model
    for block in graph.blocks[1:]:
        total += graph.d_model if block.kind is BlockKind.MLP else 2 * (heads + 2 * kv) + heads
    return total * tokens * element


def bytes_of(graph: ResidualGraph, rows: int, element: int) -> int:
    """About what a pass holds whose widest block has so many token rows: streams below and above it, q, k, v and z, and
    one product's neurons."""
    heads = graph.n_heads * graph.d_head
    return (rows * (3 * graph.d_model + 5 * heads) + ROWS * 2 * graph.d_mlp) * element


@dataclass
class Live:
    """Bytes alive at each block, by when each value is made and when its last reader has run."""

    dag: Dag
    element: int
    schedule: Schedule = FULL
    _suffixes: dict[tuple[int, Tokens, Tokens], list[int]] = field(
        default_factory=dict[tuple[int, Tokens, Tokens], list[int]]
    )

    def peak(self, reads: Sequence[tuple[VariantId, Tokens]], work: Work) -> int:
        """The most that one pass holds for these roots, each read at its tokens, beside plain runs and the reading of
        metrics; `work` is what it computes."""
        needs = demand(self.dag, reads, self.schedule)
        n = len(self.dag.graph.blocks) + 1
        change = [0] * (n + 1)
        made, last = self._lives(needs, (root for root, _ in reads))
        for i, birth in made.items():
            size = self._size(needs, i)
            change[birth] += size
            change[last.get(i, birth) + 1] -= size
        live, now = [0] * n, 0
        for block in range(n):
            now += change[block]
            live[block] = now
        self._add_suffixes(live, needs)
        scratch = self._scratch(work)
        finals = sum(tokens.bit_count() for _, tokens in reads) * self.dag.graph.d_model * self.element
        return max(a + b for a, b in zip(live, scratch, strict=True)) + finals

    def _size(self, needs: Demand, i: VariantId) -> int:
        op, tokens = self.dag.ops[i], needs.tokens[i].bit_count()
        if isinstance(op, Core):  # z, and the base run's that it is taken from
            return 2 * tokens * needs.heads.get(i, 0).bit_count() * self.dag.graph.d_head * self.element
        return 0 if isinstance(op, Run) else tokens * self._width(op) * self.element

    def _width(self, op: Op) -> int:
        """Numbers a token row of a value."""
        match op:
            case Projected() | HeadZ() | StoredZ():
                return self.dag.graph.d_head
            case Neurons():
                return self.dag.graph.d_mlp
            case Entries():
                return max(self.dag.layout.lengths)
            case _:
                return self.dag.graph.d_model

    def _lives(self, needs: Demand, roots: Iterable[VariantId]) -> tuple[dict[VariantId, int], dict[VariantId, int]]:
        """For each demanded variant: the block at which it is made, and that of its last reader. A sum is made when it
        is first read; the end of the pass counts as a block."""
        end = len(self.dag.graph.blocks)
        first: dict[VariantId, int] = {}
        last: dict[VariantId, int] = {}
        for root in roots:
            first[root] = last[root] = end
        made: dict[VariantId, int] = {}
        for i in needs.tokens:
            own = self._block(i)
            made[i] = first.get(i, end) if own is None else own
            for child in children(self.dag.ops[i]):
                first[child] = min(first.get(child, end), made[i])
                last[child] = max(last.get(child, 0), made[i])
        return made, last

    def _block(self, i: VariantId) -> int | None:
        """The block that computes a variant; None where it is made whenever it is read."""
        match self.dag.ops[i]:
            case Tokenwise(block) | Core(block) | Projected(block) | Entries(block) | Neurons(block):
                return block
            case Out(core) | HeadZ(core):
                op = self.dag.ops[core]
                assert isinstance(op, Core)
                return op.block
            case Run(rank):
                return next(j for j, b in enumerate(self.dag.graph.blocks) if b.rank >= rank)
            case _:
                return None

    # ---- suffixes
    def _add_suffixes(self, live: list[int], needs: Demand) -> None:
        for i in needs.tokens:
            if isinstance(op := self.dag.ops[i], Run):
                for block, size in enumerate(self._suffix(op.rank, self.dag.changed[op.input], needs.tokens[i])):
                    live[block] += size

    def _suffix(self, rank: int, changed: Tokens, demanded: Tokens) -> list[int]:
        """Of one suffix, by block."""
        key = (rank, changed, demanded)
        if key not in self._suffixes:
            self._suffixes[key] = self._of_suffix(rank, changed, demanded)
        return self._suffixes[key]

    def _of_suffix(self, rank: int, changed: Tokens, demanded: Tokens) -> list[int]:
        graph = self.dag.graph
        out = [0] * (len(graph.blocks) + 1)
        width = graph.d_model * self.element
        needed = demanded
        for index in range(len(graph.blocks) - 1, -1, -1):
            block = graph.blocks[index]
            if block.rank >= rank:
                out[index] = self._widths(block.kind) * needed.bit_count()
                needed = self.dag.reach(needed) if block.kind is BlockKind.ATTENTION else needed
        spread = self.dag.spread(changed) if self.dag.attends_from(rank) else changed
        most = spread.bit_count() * self._widths(BlockKind.ATTENTION)
        out[-1] = width * demanded.bit_count()
        return [min(size, most) for size in out]

    def _widths(self, kind: BlockKind) -> int:
        """Bytes a token row of a suffix while a block works: the stream; then q, k, v, one of them before it is ready,
        and z; or what the MLP adds and their sum."""
        graph = self.dag.graph
        heads = graph.n_heads * graph.d_head
        return (graph.d_model + (5 * heads if kind is BlockKind.ATTENTION else 2 * graph.d_model)) * self.element

    # ---- one block's work
    def _scratch(self, work: Work) -> list[int]:
        graph = self.dag.graph
        out: list[int] = []
        for index, block in enumerate(graph.blocks):
            if block.kind is BlockKind.ATTENTION:
                out.append(self._attention(work, index))
            else:
                rows = min(ROWS, work.mlp.get(index, 0))
                out.append(rows * (3 * graph.d_model + 2 * graph.d_mlp) * self.element)
        return [*out, 0]

    def _attention(self, work: Work, block: int) -> int:
        """The base run's rows in one piece with those that are projected, what is gathered for one call, and the
        streams that are projected at once."""
        graph, rows = self.dag.graph, work.queries.get(block, 0) + work.keys.get(block, 0)
        if not work.triples.get(block, 0):
            return 0
        banks = self.dag.layout.n_tokens * (graph.n_heads + 2 * graph.n_kv_heads)
        gathered = min(GATHERED, 3 * work.triples[block])
        streams = min(ROWS, rows) * 3 * graph.d_model
        return ((banks + gathered) * graph.d_head + streams) * self.element


def readout_bytes(rows: int, columns: int, element: int) -> int:
    """The logits of the rows that are read at once, in the model's dtype, in float64 and as log-probabilities."""
    return min(rows, 480) * columns * (element + 16)
