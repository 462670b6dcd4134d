"""What a pass computes, counted before it runs: rows of each kind, block by block. Rates turn them into FLOPs.

Exact for everything the executor does with a weight; additions, norms and softmaxes are not counted, nor scores and
neurons of plain runs, which are computed when a value first needs them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.ops import Const, Core, Entries, Neurons, Out, Projected, Run, Tokenwise, VariantId
from patchc.ir.program import FULL, Rates, Schedule
from patchc.ir.tokens import Layout, Tokens
from patchc.optimise.demand import Demand, demand


@dataclass
class Work:
    """Counts by block: token rows of MLPs; head rows projected, for q and for k and v; (query, key, head) triples; head
    rows written; rows of stored neurons written, each for itself."""

    mlp: dict[int, int] = field(default_factory=dict[int, int])
    queries: dict[int, int] = field(default_factory=dict[int, int])
    keys: dict[int, int] = field(default_factory=dict[int, int])
    triples: dict[int, int] = field(default_factory=dict[int, int])
    written: dict[int, int] = field(default_factory=dict[int, int])
    neurons: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, other: Work) -> None:
        for mine, theirs in zip(self._counts(), other._counts(), strict=True):
            for block, n in theirs.items():
                mine[block] = mine.get(block, 0) + n

    def _counts(self) -> tuple[dict[int, int], ...]:
        return self.mlp, self.queries, self.keys, self.triples, self.written, self.neurons

    def flops(self, rates: Rates) -> int:
        heads = sum(self.queries.values()) + sum(self.keys.values())
        return (
            sum(rates.mlp[block] * n for block, n in self.mlp.items())
            + rates.projection * heads
            + rates.triple * sum(self.triples.values())
            + rates.write * sum(self.written.values())
            + rates.logit * sum(self.neurons.values())  # one number times a vector of the stream, as a logit is
        )


@dataclass
class Counter:
    """Counts the work of variants of one DAG; suffixes that change and ask for the same tokens are counted once and
    remembered."""

    dag: Dag
    schedule: Schedule = FULL
    _suffixes: dict[tuple[int, Tokens, Tokens], Work] = field(default_factory=dict[tuple[int, Tokens, Tokens], "Work"])

    def of_reads(self, reads: Iterable[tuple[VariantId, Tokens]]) -> Work:
        """Everything that one pass computes for these roots, each read at its tokens, each shared variant once."""
        needs = demand(self.dag, reads, self.schedule)
        out = Work()
        for block, asked in needs.projections.items():
            for (_, port), (heads, tokens) in asked.items():
                self._add(out.queries if port == 0 else out.keys, block, self._heads(heads, port) * tokens.bit_count())
        for i in needs.tokens:
            self._add_variant(out, self.dag.ops[i], i, needs)
        return out

    def _add_variant(self, out: Work, op: object, i: int, needs: Demand) -> None:
        tokens = needs.tokens[i]
        match op:
            case Tokenwise(block, 0) as mlp if mlp.replaced:
                self._add(out.neurons, block, tokens.bit_count() * mlp.neurons.bit_count())
            case Tokenwise(block):
                self._add(out.mlp, block, tokens.bit_count())
            case Core(block) as core:
                again = not self.schedule.deltas and core.is_base(0, 1, 2) and bool(core.replaced)
                each = self._triples(tokens) * (1 + again)  # attention as it is, then what is set in it
                self._add(out.triples, block, each * needs.heads.get(i, 0).bit_count())
            case Neurons(block):
                self._add(out.mlp, block, tokens.bit_count())
            case Entries(block):
                self._add(out.triples, block, self._triples(tokens))
            case Projected(block, port):
                self._add(out.queries if port == 0 else out.keys, block, tokens.bit_count())
            case Out(core, heads):
                inner = self.dag.ops[core]
                assert isinstance(inner, Core)
                self._add(out.written, inner.block, tokens.bit_count() * heads.bit_count())
            case Const(block, members) if self.dag.graph.blocks[block].kind is BlockKind.ATTENTION:
                heads = members & ((1 << self.dag.graph.n_heads) - 1)
                self._add(out.written, block, tokens.bit_count() * heads.bit_count())
            case Run(rank, x):
                out.add(self._suffix(rank, self.dag.changed[x], tokens))
            case _:
                pass

    def plain(self) -> Work:
        """One plain run of all prompts."""
        return self._suffix(1, self.dag.layout.all, self.dag.layout.all)

    # ---- parts
    def _heads(self, heads: int, port: int) -> int:
        """Projected heads: key/value heads for k and v."""
        graph = self.dag.graph
        if port == 0:
            return heads.bit_count()
        group = graph.n_heads // graph.n_kv_heads
        return len({h // group for h in range(graph.n_heads) if heads >> h & 1})

    def _triples(self, tokens: Tokens) -> int:
        return triples(self.dag.layout, tokens, self.dag.graph.causal)

    def _add(self, counts: dict[int, int], block: int, n: int) -> None:
        if n:
            counts[block] = counts.get(block, 0) + n

    def _suffix(self, rank: int, changed: Tokens, demanded: Tokens) -> Work:
        """The plain model from `rank` up, where `changed` has changed below it and `demanded` is asked of its end."""
        key = (rank, changed, demanded)
        found = self._suffixes.get(key)
        if found is None:
            found = self._suffixes[key] = self._counted(rank, changed, demanded)
        return found

    def _counted(self, rank: int, changed: Tokens, demanded: Tokens) -> Work:
        out = Work()
        below = [changed]
        for blocks in self._ranks[rank:]:
            below.append(self.dag.spread(below[-1]) if self._attends(blocks) else below[-1])
        for blocks, here in zip(reversed(self._ranks[rank:]), reversed(below[:-1]), strict=True):
            asked = demanded
            for block in blocks:
                if self.dag.graph.blocks[block].kind is BlockKind.ATTENTION:
                    self._add_attention(out, block, here, demanded)
                    asked |= self.dag.reach(demanded)
                else:
                    self._add(out.mlp, block, (here & demanded).bit_count())
            demanded = asked
        return out

    def _add_attention(self, out: Work, block: int, changed: Tokens, demanded: Tokens) -> None:
        graph = self.dag.graph
        queries = self.dag.spread(changed) & demanded
        keys = self.dag.reach(queries) & changed
        self._add(out.queries, block, graph.n_heads * (queries & changed).bit_count())
        self._add(out.keys, block, 2 * graph.n_kv_heads * keys.bit_count())
        self._add(out.triples, block, graph.n_heads * self._triples(queries))
        self._add(out.written, block, graph.n_heads * queries.bit_count())

    def _attends(self, blocks: list[int]) -> bool:
        return any(self.dag.graph.blocks[b].kind is BlockKind.ATTENTION for b in blocks)

    @cached_property
    def _ranks(self) -> list[list[int]]:
        """The blocks of each rank."""
        out: list[list[int]] = [[] for _ in range(self.dag.graph.top)]
        for index, block in enumerate(self.dag.graph.blocks):
            out[block.rank].append(index)
        return out


def triples(layout: Layout, tokens: Tokens, causal: bool) -> int:
    """(query, key) pairs that attention computes for these queries: with every key up to the last query of a prompt."""
    total = 0
    for prompt, positions in layout.split(tokens):
        total += positions.bit_count() * (positions.bit_length() if causal else layout.lengths[prompt])
    return total
