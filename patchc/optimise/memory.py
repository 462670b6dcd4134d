"""How much memory a pass holds at its fullest, told before it runs: plain runs, live differences, suffixes, one block's
work.

An estimate: every large tensor is counted where it is alive, small ones and what the allocator keeps are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
from patchc.ir.program import FULL, GATHERED, Schedule
from patchc.ir.tokens import Tokens
from patchc.optimise.course import Courses, Stage
from patchc.optimise.demand import Demand, demand

ROWS = 1200
"""Token rows that one matrix product takes at most."""
KEPT = 2
"""A product's own tensors come and go; the C library gives their memory back late, so about as much again is held."""


def plain_run_bytes(graph: ResidualGraph, tokens: int, element: int, prepared: bool = True) -> int:
    """What one world's plain run keeps: embeddings, the stream below each rank, q, k, v, z, MLP outputs, what a block
    writes before its own norm; with `prepared` q, k and v both as projected and as attention takes them."""
    heads, kv = graph.n_heads * graph.d_head, graph.n_kv_heads * graph.d_head
    total = (graph.blocks[0].size + graph.top + 1) * graph.d_model
    for block in graph.blocks[1:]:
        total += graph.d_model if block.kind is BlockKind.MLP else (1 + prepared) * (heads + 2 * kv) + heads
        total += graph.d_model * block.post_norm
    return total * tokens * element


def bytes_of(graph: ResidualGraph, rows: int, element: int) -> int:
    """About what a pass holds whose widest block has so many token rows: streams below and above it, q, k, v and z, and
    one block's work."""
    heads = graph.n_heads * graph.d_head
    product = KEPT * min(ROWS, rows) * (3 * graph.d_model + 2 * graph.d_mlp)
    return (rows * (3 * graph.d_model + 5 * heads) + product) * element


@dataclass(frozen=True, slots=True)
class Through:
    """Rows of suffixes at one block: those that come in, that ask and that go out (see `Stage`), and those of queries,
    keys and values that attention gathers for one call."""

    incoming: int = 0
    asking: int = 0
    outgoing: int = 0
    gathered: int = 0


@dataclass
class Live:
    """Bytes alive at each block, by when each value is made and when its last reader has run."""

    courses: Courses
    element: int
    schedule: Schedule = FULL

    @property
    def dag(self) -> Dag:
        return self.courses.dag

    def peak(self, reads: Sequence[tuple[VariantId, Tokens]]) -> int:
        """The most that one pass holds for these roots, each read at its tokens, beside plain runs and the reading of
        metrics."""
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
        at_work = self._at_work(needs)
        finals = sum(tokens.bit_count() for _, tokens in reads) * self.dag.graph.d_model
        return max((a + b for a, b in zip(live, at_work, strict=True)), default=0) + finals * self.element

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

    # ---- what a block holds while it works
    def _at_work(self, needs: Demand) -> list[int]:
        """By block: suffixes' streams and projections, the work of one matrix product or attention call."""
        graph = self.dag.graph
        suffixes, front = self._suffix_rows(needs), self._front_rows(needs)
        out = [0] * (len(graph.blocks) + 1)
        for index, block in enumerate(graph.blocks):
            through = suffixes.get(index, Through())
            if block.kind is BlockKind.ATTENTION:
                out[index] = self._attention(through) + self._banks(needs, index, front[index])
            else:
                held = through.incoming + (through.outgoing if self._stands_beside(index) else 0)
                rows = min(ROWS, max(through.asking, front[index]))
                out[index] = held * graph.d_model + KEPT * rows * (3 * graph.d_model + 2 * graph.d_mlp)
        out[-1] = suffixes.get(len(graph.blocks) - 1, Through()).outgoing * graph.d_model
        return [n * self.element for n in out]

    def _suffix_rows(self, needs: Demand) -> dict[int, Through]:
        """What goes through each block."""
        kinds: Counter[tuple[int, Tokens, Tokens]] = Counter()
        for i, tokens in needs.tokens.items():
            if isinstance(op := self.dag.ops[i], Run):
                kinds[op.rank, self.dag.changed[op.input], tokens] += 1
        stages: dict[int, Counter[Stage]] = {}
        for kind, n in kinds.items():
            for stage in self.courses.of(*kind):
                stages.setdefault(stage.block, Counter())[stage] += n
        return {block: self._through(alike) for block, alike in stages.items()}

    def _through(self, stages: Counter[Stage]) -> Through:
        counted = stages.items()
        return Through(
            sum(n * s.incoming.bit_count() for s, n in counted),
            sum(n * s.asking.bit_count() for s, n in counted),
            sum(n * s.outgoing.bit_count() for s, n in counted),
            min(GATHERED, max(n * self._gathered(s.outgoing) for s, n in counted)),
        )

    def _gathered(self, outgoing: Tokens) -> int:
        """Rows of queries, keys and values of one run."""
        layout, causal = self.dag.layout, self.dag.graph.causal
        parts = [(p.bit_count(), p.bit_length() if causal else layout.lengths[i]) for i, p in layout.split(outgoing)]
        return sum(queries + 2 * keys for queries, keys in parts)

    def _front_rows(self, needs: Demand) -> list[int]:
        """By block the rows of everything that is no suffix."""
        out = [0] * len(self.dag.graph.blocks)
        for i, tokens in needs.tokens.items():
            match self.dag.ops[i]:
                case Tokenwise(block) | Neurons(block):
                    out[block] += tokens.bit_count()
                case Core(block):
                    out[block] += tokens.bit_count()
                case _:
                    pass
        return out

    def _attention(self, through: Through) -> int:
        """Numbers that suffixes hold: streams below and above, q, k and v; then the norm's output, or z and what is
        gathered for one call."""
        graph = self.dag.graph
        heads, kv = graph.n_heads * graph.d_head, graph.n_kv_heads * graph.d_head
        held = (
            (through.incoming + through.outgoing) * graph.d_model + through.asking * heads + through.incoming * 2 * kv
        )
        copied = through.asking * graph.d_model if through.asking != through.incoming else 0
        calls = through.outgoing * heads + through.gathered * 3 * heads // 2
        return held + copied + max(through.incoming * graph.d_model, calls)

    def _banks(self, needs: Demand, block: int, rows: int) -> int:
        """The base run's rows of all ports in one piece with those that variants project, and what is gathered."""
        graph = self.dag.graph
        if not rows:
            return 0
        projected = sum(h.bit_count() * t.bit_count() for h, t in needs.projections.get(block, {}).values())
        base = self.dag.layout.n_tokens * (graph.n_heads + 2 * graph.n_kv_heads) if projected else 0
        gathered = 2 * min(GATHERED * graph.n_heads, 3 * projected) if projected else 0
        return (base + projected + gathered) * graph.d_head

    def _stands_beside(self, index: int) -> bool:
        """Whether a block shares its rank with attention."""
        blocks = self.dag.graph.blocks
        rank = blocks[index].rank
        return any(b.rank == rank and b.kind is BlockKind.ATTENTION for b in blocks)


def readout_bytes(rows: int, columns: int, element: int) -> int:
    """The logits of the rows that are read at once, in the model's dtype, in float64 and as log-probabilities."""
    return min(rows, 480) * columns * (element + 16)
