"""The variant DAG: every value that some cell needs and that is not the base run's, each once.

A value is a *difference from the base run* in stream space, `[token, d_model]`; number 0 is "equal to the base run".
Operations are hash-consed: two that are equal are one number, within a cell and across the cells of a sweep. That, and
what else holds of every variant, are the DAG's laws (`ir.laws`). Children have lower numbers than their parents. No
tensors here, and no path language: `lower` writes it, `execute` runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from patchc.ir.experiment import Given, Noise, Value
from patchc.ir.graph import Block, BlockKind, ResidualGraph
from patchc.ir.laws import ALL_LAWS, Law
from patchc.ir.ops import (
    EQUAL_TO_BASE,
    Const,
    Core,
    Entries,
    HeadZ,
    Masked,
    Mix,
    Neurons,
    Op,
    Out,
    PostNorm,
    Projected,
    Replaced,
    ReplacedNeurons,
    Run,
    Scale,
    StoredZ,
    Stream,
    Sum,
    Tokenwise,
    ValueId,
    VariantId,
)
from patchc.ir.paths import Site
from patchc.ir.tokens import Layout, Tokens

NEVER = 1 << 30
"""The rank of something that never happens."""


@dataclass
class Dag:
    """The arena. Beside each operation: `changed`, the tokens at which it may differ from the base run, and `low`, the
    lowest rank that it computes (a cell enters there; nothing below runs). The methods that make values keep `laws`,
    but for streams, which whoever adds them up must share."""

    graph: ResidualGraph
    layout: Layout
    laws: Law = ALL_LAWS
    ops: list[Op] = field(default_factory=lambda: [Sum(())])
    changed: list[Tokens] = field(default_factory=lambda: [0])
    low: list[int] = field(default_factory=lambda: [NEVER])
    values: list[Value] = field(default_factory=list[Value])
    _index: dict[Op, VariantId] = field(default_factory=dict[Op, VariantId])
    _value_index: dict[Value, ValueId] = field(default_factory=dict[Value, ValueId])

    def __post_init__(self) -> None:
        self._one_of_a_kind, self._forward = Law.EQUAL in self.laws, Law.FORWARD in self.laws
        self._idle = 0 if Law.BASE in self.laws else self.layout.all

    def __len__(self) -> int:
        return len(self.ops)

    def spread(self, tokens: Tokens) -> Tokens:
        """The tokens that attention is taken to change when its keys and values change at `tokens`."""
        if not self._forward:
            return self.layout.all if tokens else 0
        return self.lookers(tokens)

    def lookers(self, tokens: Tokens) -> Tokens:
        """The tokens whose queries see keys and values at `tokens`."""
        return self.layout.after(tokens) if self.graph.causal else self.layout.whole(tokens)

    def reach(self, tokens: Tokens) -> Tokens:
        """The tokens whose keys and values attention reads to compute `tokens`."""
        return self.layout.upto(tokens) if self.graph.causal else self.layout.whole(tokens)

    def attends_from(self, rank: int) -> bool:
        """Whether attention moves anything between positions at this rank or above."""
        return rank <= self.graph.last_attention

    # ---- making values; each returns EQUAL_TO_BASE where nothing can change
    def value(self, value: Value) -> ValueId:
        found = self._value_index.setdefault(value, len(self.values))
        if found == len(self.values):
            self.values.append(value)
        return found

    def make(self, op: Op, changed: Tokens, low: int) -> VariantId:
        if not changed:
            return EQUAL_TO_BASE
        number = len(self.ops)
        found = self._index.setdefault(op, number) if self._one_of_a_kind else number
        if found == number:
            self.ops.append(op)
            self.changed.append(changed)
            self.low.append(low)
        return found

    def _node(self, op: Op, changed: Tokens, low: int) -> VariantId:
        """A node, or something inside one, run again: it is the base run's where nothing that it reads has changed."""
        return self.make(op, changed or self._idle, low)

    def const(self, block: int, members: int, value: Value, tokens: Tokens, site: Site = Site.OUT) -> VariantId:
        summed = not any(isinstance(source, Noise | Given) for _, source in value.terms)
        if summed and not (site is Site.ATTN_OUT and self.graph.blocks[block].post_norm):
            site = Site.OUT  # sums of a node's parts: one value, wherever it is said to enter
        return self.make(Const(block, members, self.value(value), tokens, site), tokens, NEVER)

    def stream(self, rank: int, value: Value, tokens: Tokens, block: int = -1) -> VariantId:
        block = block if any(isinstance(source, Noise) for _, source in value.terms) else -1
        return self.make(Stream(rank, self.value(value), tokens, block), tokens, NEVER)

    def masked(self, input: VariantId, starts: tuple[tuple[int, Tokens, VariantId], ...]) -> VariantId:
        changed = self.changed[input]
        for _, tokens, value in starts:
            changed |= tokens & self.layout.all & (self.changed[value] | self.changed[input])
        return self.make(Masked(input, starts), changed, self.low[input])

    def core(
        self, block: int, q: VariantId, k: VariantId, v: VariantId, replaced: tuple[Replaced, ...] = ()
    ) -> VariantId:
        asked = self.changed[q]
        looked_at = self.changed[k] | self.changed[v]
        for r in replaced:
            if r.port in (1, 2):
                looked_at |= r.tokens
            else:
                asked |= r.tokens
        return self._node(Core(block, q, k, v, replaced), asked | self.spread(looked_at), self.graph.blocks[block].rank)

    def out(self, core: VariantId, heads: int) -> VariantId:
        if core == EQUAL_TO_BASE or not heads:
            return EQUAL_TO_BASE
        return self.make(Out(core, heads), self.changed[core], self.low[core])

    def tokenwise(self, block: int, input: VariantId, replaced: tuple[ReplacedNeurons, ...] = ()) -> VariantId:
        changed = self.changed[input]
        for r in replaced:
            changed |= r.tokens
        rank = self.graph.blocks[block].rank
        return self._node(Tokenwise(block, input, replaced), changed, min(rank, self.low[input]))

    def post_norm(self, block: int, input: VariantId) -> VariantId:
        """What a block adds to the stream where what its members write differs by `input`: that itself, where the
        block has no norm."""
        if not self.graph.blocks[block].post_norm:
            return input
        return self.make(PostNorm(block, input), self.changed[input], self.low[input])

    def projected(
        self, block: int, port: int, head: int, input: VariantId, replaced: tuple[Replaced, ...]
    ) -> VariantId:
        changed = self.changed[input]
        for r in replaced:
            changed |= r.tokens
        rank = self.graph.blocks[block].rank
        return self._node(Projected(block, port, head, input, replaced), changed, min(rank, self.low[input]))

    def entries(
        self, block: int, head: int, port: int, q: VariantId, k: VariantId, replaced: tuple[Replaced, ...]
    ) -> VariantId:
        changed = self.changed[q] | self.spread(self.changed[k])
        for r in replaced:
            changed |= r.tokens
        return self._node(Entries(block, head, port, q, k, replaced), changed, self.graph.blocks[block].rank)

    def neurons(self, block: int, input: VariantId, replaced: tuple[ReplacedNeurons, ...]) -> VariantId:
        changed = self.changed[input]
        for r in replaced:
            changed |= r.tokens
        rank = self.graph.blocks[block].rank
        return self._node(Neurons(block, input, replaced), changed, min(rank, self.low[input]))

    def head_z(self, core: VariantId, head: int) -> VariantId:
        return self.make(HeadZ(core, head), self.changed[core], self.low[core])

    def stored_z(self, block: int, head: int, value: Value, tokens: Tokens) -> VariantId:
        return self.make(StoredZ(block, head, self.value(value), tokens), tokens, NEVER)

    def sum(self, parts: Iterable[VariantId]) -> VariantId:
        """A part that stands twice counts twice."""
        kept = sorted(p for p in parts if p)
        if len(kept) < 2:
            return kept[0] if kept else EQUAL_TO_BASE
        changed, low = 0, NEVER
        for p in kept:
            changed |= self.changed[p]
            low = min(low, self.low[p])
        return self.make(Sum(tuple(kept)), changed, low)

    def scale(self, factor: float, input: VariantId) -> VariantId:
        if factor == 1.0 or input == EQUAL_TO_BASE:
            return input
        return self.make(Scale(factor, input), self.changed[input] if factor else 0, self.low[input])

    def mix(self, parts: Iterable[tuple[Tokens, VariantId]]) -> VariantId:
        """Parts at disjoint tokens; what is equal to the base run there is dropped, equal neighbours are joined."""
        joined: dict[VariantId, Tokens] = {}
        for tokens, p in parts:
            if here := tokens & self.changed[p]:
                joined[p] = joined.get(p, 0) | here
        if len(joined) == 1:
            ((p, tokens),) = joined.items()
            if tokens == self.changed[p]:
                return p
        changed, low = 0, NEVER
        for p, tokens in joined.items():
            changed |= tokens
            low = min(low, self.low[p])
        return self.make(Mix(tuple((t, p) for p, t in sorted(joined.items()))), changed, low)

    def run(self, rank: int, input: VariantId) -> VariantId:
        top = self.graph.top
        if rank >= top or input == EQUAL_TO_BASE:
            return input
        changed = self.spread(self.changed[input]) if self.attends_from(rank) else self.changed[input]
        return self.make(Run(rank, input), changed, min(rank, self.low[input]))

    # ---- suffixes
    def expand(self, run: Run) -> VariantId:
        """The plain model's layers from `run.rank` up, as values of their own at the end of the arena."""
        x = run.input
        for rank in range(run.rank, self.graph.top):
            parts = [x]
            for index, block in enumerate(self.graph.blocks):
                if block.rank == rank:
                    parts.append(self._plain(index, block, x))
            x = self.sum(parts)
        return x

    def _plain(self, index: int, block: Block, x: VariantId) -> VariantId:
        """What a block adds to the stream that it reads."""
        if block.kind is BlockKind.MLP:
            return self.tokenwise(index, x)
        return self.post_norm(index, self.out(self.core(index, x, x, x), (1 << self.graph.n_heads) - 1))

    def explicit(self, root: VariantId) -> VariantId:
        """A root with its suffixes written out; they stand at the root, or in its mix over tokens, only."""
        match self.ops[root]:
            case Run() as run:
                return self.expand(run)
            case Mix(parts):
                return self.mix((tokens, self.explicit(p)) for tokens, p in parts)
            case _:
                return root

    def truncate(self, length: int) -> None:
        """Forget every value from number `length` on."""
        for op in self.ops[length:]:
            self._index.pop(op, None)
        del self.ops[length:], self.changed[length:], self.low[length:]
