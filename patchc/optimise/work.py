"""What a pass computes, counted before it runs: rows of each kind, block by block. Rates turn them into FLOPs.

Exact for everything the executor does with a weight; additions, norms and softmaxes are not counted, nor scores of
plain runs, which are computed when a value first needs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.ops import Const, Core, Entries, Neurons, Out, Projected, Run, Tokenwise, VariantId
from patchc.ir.paths import Site
from patchc.ir.program import FULL, Rates, Schedule
from patchc.ir.tokens import Layout, Tokens
from patchc.optimise.course import Courses
from patchc.optimise.demand import Demand, demand
from patchc.optimise.reads import world_of


@dataclass
class Work:
    """Counts by block: token rows of MLPs; head rows projected, for q and for k and v; (query, key, head) triples; head
    rows written; rows of stored neurons written, each for itself; rows of which MLPs are run up to their neurons."""

    mlp: dict[int, int] = field(default_factory=dict[int, int])
    queries: dict[int, int] = field(default_factory=dict[int, int])
    keys: dict[int, int] = field(default_factory=dict[int, int])
    triples: dict[int, int] = field(default_factory=dict[int, int])
    written: dict[int, int] = field(default_factory=dict[int, int])
    neurons: dict[int, int] = field(default_factory=dict[int, int])
    posts: dict[int, int] = field(default_factory=dict[int, int])

    def add(self, other: Work, times: int = 1) -> None:
        for mine, theirs in zip(self._counts(), other._counts(), strict=True):
            for block, n in theirs.items():
                mine[block] = mine.get(block, 0) + n * times

    def _counts(self) -> tuple[dict[int, int], ...]:
        return self.mlp, self.queries, self.keys, self.triples, self.written, self.neurons, self.posts

    def flops(self, rates: Rates) -> int:
        heads = sum(self.queries.values()) + sum(self.keys.values())
        return (
            sum(rates.mlp[block] * n for block, n in self.mlp.items())
            + sum((rates.mlp[block] - rates.down) * n for block, n in self.posts.items())
            + rates.projection * heads
            + rates.triple * sum(self.triples.values())
            + rates.write * sum(self.written.values())
            + rates.logit * sum(self.neurons.values())  # one number times a vector of the stream, as a logit is
        )


@dataclass
class Counter:
    """Counts the work of variants of one DAG; suffixes that change and ask for the same tokens are counted once."""

    courses: Courses
    base: str
    schedule: Schedule = FULL

    @property
    def dag(self) -> Dag:
        return self.courses.dag

    def of_reads(self, reads: Iterable[tuple[VariantId, Tokens]]) -> Work:
        """Everything that one pass computes for these roots, each read at its tokens, each shared variant once."""
        needs = demand(self.dag, reads, self.schedule)
        out = Work()
        for block, asked in needs.projections.items():
            for (_, port), (heads, tokens) in asked.items():
                self._add(out.queries if port == 0 else out.keys, block, self._heads(heads, port) * tokens.bit_count())
        runs: dict[tuple[int, Tokens, Tokens], int] = {}
        read: dict[int, set[str]] = {}
        for i, tokens in needs.tokens.items():
            op = self.dag.ops[i]
            if isinstance(op, Run):
                key = (op.rank, self.dag.changed[op.input], tokens)
                runs[key] = runs.get(key, 0) + 1
            elif isinstance(op, Tokenwise | Neurons) and (op.replaced or isinstance(op, Neurons)):
                read.setdefault(op.block, set()).update(self._read_inside(op))
                self._add_variant(out, op, i, needs)
            else:
                self._add_variant(out, op, i, needs)
        for key, times in runs.items():
            out.add(self._course(*key), times)
        for block, worlds in read.items():
            self._add(out.posts, block, len(worlds) * self.dag.layout.n_tokens)
        return out

    def _read_inside(self, op: Tokenwise | Neurons) -> Iterator[str]:
        """The worlds whose neurons are computed for an operation: a pass keeps those of one block at a time."""
        if isinstance(op, Neurons) or self._is_stored(op):
            yield self.base
        for replaced in op.replaced:
            yield from (w for _, source in self.dag.values[replaced.value].terms if (w := world_of(source)) is not None)

    def _add_variant(self, out: Work, op: object, i: int, needs: Demand) -> None:
        tokens = needs.tokens[i]
        match op:
            case Tokenwise(block) as mlp if self._is_stored(mlp):
                self._add(out.neurons, block, tokens.bit_count() * mlp.neurons.bit_count())
            case Tokenwise(block):
                self._add(out.mlp, block, tokens.bit_count())
            case Core(block) as core:
                again = not self.schedule.deltas and core.is_base(0, 1, 2) and bool(core.replaced)
                each = self._triples(tokens) * (1 + again)  # attention as it is, then what is set in it
                self._add(out.triples, block, each * needs.heads.get(i, 0).bit_count())
            case Neurons(block):
                self._add(out.posts, block, tokens.bit_count())
            case Entries(block):
                self._add(out.triples, block, self._triples(tokens))
            case Projected(block, port):
                self._add(out.queries if port == 0 else out.keys, block, tokens.bit_count())
            case Out(core, heads):
                inner = self.dag.ops[core]
                assert isinstance(inner, Core)
                self._add(out.written, inner.block, tokens.bit_count() * heads.bit_count())
            case Const(block, _, _, _, Site.ATTN_OUT) if self.dag.graph.blocks[block].post_norm:
                pass  # plain runs keep what their heads write together
            case Const(block, members) if self.dag.graph.blocks[block].kind is BlockKind.ATTENTION:
                heads = members & ((1 << self.dag.graph.n_heads) - 1)
                self._add(out.written, block, tokens.bit_count() * heads.bit_count())
            case _:
                pass

    def _is_stored(self, op: Tokenwise) -> bool:
        """Whether stored neurons are written, each for itself, and no MLP is run."""
        return bool(op.replaced) and not op.input and self.dag.graph.blocks[op.block].neurons_add_up

    def plain(self) -> Work:
        """One plain run of all prompts."""
        return self._course(1, self.dag.layout.all, self.dag.layout.all)

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

    def _course(self, rank: int, changed: Tokens, demanded: Tokens) -> Work:
        """The plain model from `rank` up, where `changed` has changed below it and `demanded` is asked of its end."""
        out, graph = Work(), self.dag.graph
        for stage in self.courses.of(rank, changed, demanded):
            if graph.blocks[stage.block].kind is BlockKind.ATTENTION:
                self._add(out.queries, stage.block, graph.n_heads * stage.asking.bit_count())
                self._add(out.keys, stage.block, 2 * graph.n_kv_heads * stage.incoming.bit_count())
                self._add(out.triples, stage.block, graph.n_heads * self._triples(stage.outgoing))
                self._add(out.written, stage.block, graph.n_heads * stage.outgoing.bit_count())
            else:
                self._add(out.mlp, stage.block, stage.asking.bit_count())
        return out


def triples(layout: Layout, tokens: Tokens, causal: bool) -> int:
    """(query, key) pairs that attention computes for these queries: with every key up to the last query of a prompt."""
    total = 0
    for prompt, positions in layout.split(tokens):
        total += positions.bit_count() * (positions.bit_length() if causal else layout.lengths[prompt])
    return total
