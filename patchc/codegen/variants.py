"""Variants of a masked DAG as graph nodes: streams and what blocks write, whole rather than as differences wherever
that spares running the base run beside them.

A stream is the one a rank lower and what the blocks between write; what only one reader sees is the stream that all
read, and its own masks times gaps. b = batch, s = pos.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from torch import fx

from patchc.codegen.cores import Cores
from patchc.codegen.gaps import Gaps, is_sum_of_runs
from patchc.codegen.homes import Homes, Parts
from patchc.codegen.inside import Insides
from patchc.codegen.masks import Masks
from patchc.codegen.products import Products
from patchc.codegen.stored import StoredNodes
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.ops import (
    Const,
    Core,
    HeadZ,
    Masked,
    Mix,
    Out,
    PostNorm,
    Projected,
    Scale,
    StoredZ,
    Stream,
    Sum,
    Tokenwise,
    VariantId,
)
from patchc.ir.tokens import Tokens


@dataclass
class Forms:
    """How many reader inputs were written with masks one by one, and how many by products with a bank."""

    sparse: int = 0
    dense: int = 0

    def __str__(self) -> str:
        counts = ((self.sparse, "sparse"), (self.dense, "dense"))
        return ", ".join(f"{name} at {n} input{'s' * (n > 1)}" for n, name in counts if n) or "sparse"


class Variants:
    """Writes the variants of `dag` among those `read`."""

    def __init__(
        self, dag: Dag, read: Iterable[VariantId], worlds: Worlds, stored: StoredNodes, masks: Masks, form: str = "cost"
    ):
        self.dag, self.graph, self.worlds, self.call = dag, dag.graph, worlds, worlds.call
        self.stored, self.masks, self.base, self.form = stored, masks, worlds.base, form
        self.insides = Insides(worlds, dag.values, stored, masks.of, masks.rows)
        self.cores = Cores(dag, read, worlds, stored, masks, self.insides, self.stream, self.streams)
        self.gaps = Gaps(dag, worlds, stored, self.cores.z, self.mlp, self.difference)
        self.homes = Homes(dag, self.gaps.gap)
        self.products = Products(dag, worlds, masks, self.gaps, self.homes)
        self.forms = Forms()
        self._differences: dict[VariantId, fx.Node] = {}
        self._streams: dict[tuple[Parts, int], fx.Node] = {}
        self._whole: dict[tuple[VariantId, int], fx.Node] = {}
        self._written: dict[tuple[int, Parts], fx.Node] = {}
        self._mlps: dict[VariantId, fx.Node] = {}

    # ---- streams
    def stream(self, x: VariantId, rank: int) -> fx.Node:
        """The stream below `rank` that differs from the base run's by `x`, `[b, s, d_model]`."""
        if x == 0:
            return self.worlds.stream(self.base, rank)
        op = self.dag.ops[x]
        if self.homes.home(x) is not None or isinstance(op, Sum):
            return self._summed(op.parts if isinstance(op, Sum) else (x,), rank)
        if (x, rank) not in self._whole:
            self._whole[x, rank] = self._of_other_kind(x, rank)
        return self._whole[x, rank]

    def _of_other_kind(self, x: VariantId, rank: int) -> fx.Node:
        match self.dag.ops[x]:
            case Mix(parts):
                covered = reduce(operator.or_, (tokens for tokens, _ in parts))
                left = self.dag.layout.all & ~covered
                out = self.stream(0 if left else parts[0][1], rank)
                for tokens, p in parts if left else parts[1:]:
                    gap = self.call(operator.sub, self.stream(p, rank), out)
                    out = self.call(operator.add, out, self.masks.at(tokens, gap))
                return out
            case Masked(own, starts):
                return self._masked(self.stream(own, rank), starts, rank)
            case _:
                return self.call(operator.add, self.stream(0, rank), self._some(x))

    def _masked(self, own: fx.Node, starts: Sequence[tuple[int, Tokens, VariantId]], rank: int) -> fx.Node:
        """A stream with values in its place, as its masks say; starts of one value together."""
        together: dict[tuple[int, VariantId], list[tuple[int, Tokens]]] = {}
        for mask, tokens, x in starts:
            plain = self._plain(x, rank, tokens)
            together.setdefault((plain, 0 if plain >= 0 else x), []).append((mask, tokens))
        out = own
        for (plain, x), mine in together.items():
            value = self.stream(x, rank) if plain < 0 else self.stored.stream_of_runs(rank, self.dag.values[plain])
            gap = self.gaps.less(value, own)
            table = self.masks.table([mine])
            if table is not None:
                out = self.call(operator.add, out, self.call(operator.mul, gap, table))
                continue
            for mask, tokens in mine:
                change = self.masks.at(tokens, self.call(operator.mul, gap, self.masks.of(mask)))
                out = self.call(operator.add, out, change)
        return out

    def _plain(self, x: VariantId, rank: int, tokens: Tokens) -> int:
        """The number of the value, a sum of streams in some runs, that a start puts in place; -1 where it is else."""
        op = self.dag.ops[x]
        everywhere = isinstance(op, Stream) and not tokens & self.dag.layout.all & ~op.tokens
        if isinstance(op, Stream) and everywhere and op.rank == rank and is_sum_of_runs(self.dag.values[op.value]):
            return op.value
        return -1

    def _summed(self, parts: Parts, rank: int) -> fx.Node:
        key = (parts, rank)
        if key not in self._streams:
            self._streams[key] = (
                self._private(parts, rank) if self.homes.is_private(parts, rank) else self._on(parts, rank)
            )
        return self._streams[key]

    def _on(self, parts: Parts, rank: int) -> fx.Node:
        """The stream below, and what the blocks between write."""
        just_below = {i for i, b in enumerate(self.graph.blocks) if b.rank == rank - 1}
        here = [p for p in parts if self.homes.home(p) in just_below]
        rest = tuple(p for p in parts if p not in here)
        if rank == 1:
            return self._with(self.worlds.stream(self.base, 1), parts)
        if len(rest) > 1:
            out = self._summed(rest, rank - 1)
        else:
            out = self.stream(rest[0] if rest else 0, rank - 1)
        for n, i in enumerate(sorted(just_below), 1):
            mine = tuple(p for p in here if self.homes.home(p) == i)
            name = f"stream_{rank}" if n == len(just_below) else None
            out = self.call(operator.add, out, self.written(i, mine), name=name)
        return out

    # ---- one reader's masks
    def _private(self, parts: Parts, rank: int) -> fx.Node:
        """The stream that everyone reads, and masks times gaps."""
        if self._is_dense([parts]):
            return self.call(aten.select.int, self._dense([parts], rank), 0, 0)
        return self._sparse(parts, rank)

    def _sparse(self, parts: Parts, rank: int) -> fx.Node:
        self.forms.sparse += 1
        out = self._common_stream(parts, rank)
        for mask, tokens, gap in self.homes.terms(parts):
            change = self.gaps.of(gap)
            if change is not None:
                change = self.masks.at(tokens, self.call(operator.mul, change, self.masks.of(mask)))
                out = self.call(operator.add, out, change)
        return out

    def _common_stream(self, parts: Parts, rank: int) -> fx.Node:
        own = self.homes.own(parts)
        return self._summed(own, rank) if own else self.worlds.stream(self.base, rank)

    def streams(self, xs: list[VariantId], rank: int) -> fx.Node:
        """The streams of several variants, `[n, b, s, d_model]`."""
        parts = [self.homes.parts(x) for x in xs]
        private = all(some and self.homes.is_private(some, rank) for some in parts)
        if private and len({self.homes.unmasked(some) for some in parts}) == 1 and self._is_dense(parts):
            return self._dense(parts, rank)
        return self.call(aten.stack.default, [self.stream(x, rank) for x in xs], 0)

    def _is_dense(self, streams: list[Parts]) -> bool:
        terms = [self.homes.every_term(parts) for parts in streams]
        return self.form == "dense" or (self.form == "cost" and self.products.are_cheaper(terms))

    def _dense(self, streams: list[Parts], rank: int) -> fx.Node:
        """`[n, b, s, d_model]` of streams that differ by their masks alone."""
        found = self._sums(streams, rank)
        if found is None:
            return self.call(aten.stack.default, [self._sparse(parts, rank) for parts in streams], 0)
        self.forms.dense += len(streams)
        return found

    def _sums(self, streams: list[Parts], rank: int) -> fx.Node | None:
        """The same as products; None where masks have no table. What blocks with a norm write is summed before it."""
        out = self.products.of(self._common_stream(self.homes.rest(streams[0]), rank), [*map(self.homes.rest, streams)])
        normed = [self.homes.normed(parts) for parts in streams]
        for block in normed[0]:
            raw = [mine[block] for mine in normed]
            own = self.products.of(self._raw(block, self.homes.own(raw[0])), raw)
            if out is None or own is None:
                return None
            gap = self.call(operator.sub, self.worlds.normed(block, own), self.worlds.written(self.base, block))
            out = self.call(operator.add, out, gap)
        return out

    # ---- what blocks write
    def written(self, block: int, parts: Parts) -> fx.Node:
        """All that a block writes where it differs from the base run by `parts`, `[b, s, d_model]`."""
        if not parts:
            return self.worlds.written(self.base, block)
        key = (block, parts)
        if key not in self._written:
            self._written[key] = self._block_written(block, parts)
        return self._written[key]

    def _block_written(self, block: int, parts: Parts) -> fx.Node:
        op = self.dag.ops[parts[0]] if len(parts) == 1 else None
        if isinstance(op, PostNorm):
            return self.worlds.normed(block, self._raw(block, self.homes.before_norm(op)))
        if isinstance(op, Tokenwise):
            return self.mlp(parts[0])
        kind, normed = self.graph.blocks[block].kind, self.graph.blocks[block].post_norm
        if kind is BlockKind.ATTENTION and not normed:
            return self._raw(block, parts)
        if len(parts) == 1 and self.homes.is_start(parts[0]):
            out = self.written(block, self.homes.own(parts))
            for mask, tokens, gap in self.homes.terms(parts):
                if (change := self.gaps.of(gap)) is not None:
                    change = self.call(operator.mul, change, self.masks.of(mask))
                    out = self.call(operator.add, out, self.masks.at(tokens, change))
            return out
        return self._with(self.written(block, ()), parts)

    def _raw(self, block: int, parts: Parts) -> fx.Node:
        """What the heads and bias of a block write together where they differ by `parts`, before a norm of its own."""
        if not parts:
            return self.worlds.raw(self.base, block)
        z = self._z_of(block, self.homes.flat(parts))
        if z is not None:
            layer = self.graph.blocks[block].layer
            return self.worlds.module(f"layer{layer}_attn", z, name=f"attn_{layer}")
        return self._with(self.worlds.raw(self.base, block), parts)

    def _with(self, x: fx.Node, parts: Parts) -> fx.Node:
        return reduce(lambda x, p: self.call(operator.add, x, self._some(p)), parts, x)

    def _z_of(self, block: int, parts: Parts) -> fx.Node | None:
        """z of a whole block whose heads are run again or masked, each at most once; None where it is not such."""
        seen, own, starts = 0, dict[fx.Node, int](), dict[int, list[tuple[int, int, Tokens]]]()
        for p in parts:
            op, terms = self.dag.ops[p], self.homes.terms((p,))
            if isinstance(op, Out):
                heads, z = op.heads, self.cores.z(op.core)
            elif terms and all(gap.members for *_, gap in terms):
                heads, z = terms[0][2].members, self.gaps.own_z(terms[0][2])
                for mask, tokens, gap in terms:
                    starts.setdefault(gap.value, []).append((gap.members, mask, tokens))
            else:
                return None
            if seen & heads:
                return None
            seen |= heads
            own[z] = own.get(z, 0) | heads
        left = ((1 << self.graph.n_heads) - 1) & ~seen
        if left:
            z = self.worlds.z(self.base, block)
            own[z] = own.get(z, 0) | left
        z = self._joined(own)
        return self._with_starts(block, z, starts)

    def _joined(self, parts: dict[fx.Node, int]) -> fx.Node:
        """One z of the heads of several."""
        most = max(parts, key=lambda z: parts[z].bit_count())
        return reduce(lambda out, z: self.cores.at_heads(out, z, parts[z]), (z for z in parts if z is not most), most)

    def _with_starts(self, block: int, z: fx.Node, starts: dict[int, list[tuple[int, int, Tokens]]]) -> fx.Node | None:
        """z with masks times gaps, all heads of one value at once."""
        out = z
        for value, mine in starts.items():
            slots: list[list[tuple[int, Tokens]]] = [[] for _ in range(self.graph.n_heads)]
            for members, mask, tokens in mine:
                for h in bits(members):
                    slots[h].append((mask, tokens))
            table = self.masks.table(slots)
            if table is None:
                return None
            change = self.gaps.less(self.stored.z_of_runs(block, self.dag.values[value]), z)
            change = self.call(operator.mul, change, self.call(aten.unsqueeze.default, table, -1))
            out = self.call(operator.add, out, change)
        return out

    def mlp(self, i: VariantId) -> fx.Node:
        """What an MLP that is run again writes, `[b, s, d_model]`."""
        if i not in self._mlps:
            op = self.dag.ops[i]
            assert isinstance(op, Tokenwise)
            layer, rank = self.graph.blocks[op.block].layer, self.graph.blocks[op.block].rank
            x, name = self.stream(op.input, rank), f"mlp_{layer}"
            made = (
                self.insides.mlp(op, x, name) if op.replaced else self.worlds.module(f"layer{layer}_mlp", x, name=name)
            )
            self._mlps[i] = made
        return self._mlps[i]

    # ---- differences from the base run
    def difference(self, i: VariantId) -> fx.Node | None:
        """A variant less the base run, `[b, s, d_model]` (what metrics read inside nodes, in its own space); None for
        nothing."""
        return self._some(i) if i else None

    def _some(self, i: VariantId) -> fx.Node:
        if i not in self._differences:
            self._differences[i] = self._difference(i)
        return self._differences[i]

    def _difference(self, i: VariantId) -> fx.Node:
        op = self.dag.ops[i]
        match op:
            case Const():
                return self.masks.at(op.tokens, self._const(i, op))
            case Stream(rank, value, tokens, block):
                return self.masks.at(tokens, self.stored.stream(rank, self.dag.values[value], block))
            case Sum(parts):
                return reduce(lambda x, y: self.call(operator.add, x, y), map(self._some, parts))
            case Mix(parts):
                return reduce(
                    lambda x, y: self.call(operator.add, x, y), (self.masks.at(t, self._some(p)) for t, p in parts)
                )
            case Scale(factor, x):
                return self.call(operator.mul, self._some(x), factor)
            case Masked(x, starts):
                return self._masked_difference(x, starts)
            case Out(core, heads):
                block = self.homes.home(i)
                assert block is not None
                return self.heads(
                    block, self.call(operator.sub, self.cores.z(core), self.worlds.z(self.base, block)), heads
                )
            case Tokenwise(block):
                return self.call(operator.sub, self.mlp(i), self.worlds.written(self.base, block))
            case PostNorm(block):
                return self.call(operator.sub, self.written(block, (i,)), self.worlds.written(self.base, block))
            case Projected(block, port, head, x, replaced):
                now = self.cores.port(block, port, x, replaced)
                return self._of_head(now, self.worlds.projection(self.base, block, port), head)
            case HeadZ(core, head):
                at = self.dag.ops[core]
                assert isinstance(at, Core)
                return self._of_head(self.cores.z(core), self.worlds.z(self.base, at.block), head)
            case StoredZ(block, head, value, tokens):
                z = self.stored.z(block, 1 << head, self.dag.values[value])
                return self.masks.at(tokens, self.call(aten.select.int, z, 2, head))
            case _:
                raise AssertionError("cores stand in what they write; suffixes and entries are not lowered for graphs")

    def _const(self, i: VariantId, op: Const) -> fx.Node:
        if self.graph.blocks[op.block].kind is BlockKind.ATTENTION and self.gaps.plain(i, op.tokens):
            base = self.worlds.z(self.base, op.block)
            z = self.gaps.less(self.stored.z_of_runs(op.block, self.dag.values[op.value]), base)
            return self.heads(op.block, z, op.members)
        return self.stored.node(op.block, op.members, self.dag.values[op.value], op.site)

    def heads(self, block: int, z: fx.Node, heads: int) -> fx.Node:
        """What some heads of `[b, s, head, d_head]` write together."""
        written = self.worlds.write(block, self.worlds.some_heads(z, heads), heads)
        if heads.bit_count() == 1:
            return self.call(aten.select.int, written, 2, 0)
        return self.call(aten.sum.dim_IntList, written, [2])

    def _masked_difference(self, x: VariantId, starts: Sequence[tuple[int, Tokens, VariantId]]) -> fx.Node:
        """`x + sum of mask * (value - x)`."""
        out = self.difference(x)
        for mask, tokens, value in starts:
            gap = self._gap(x, value, tokens)
            if gap is not None:
                change = self.masks.at(tokens, self.call(operator.mul, gap, self.masks.of(mask)))
                out = change if out is None else self.call(operator.add, out, change)
        assert out is not None
        return out

    def _gap(self, x: VariantId, value: VariantId, tokens: Tokens) -> fx.Node | None:
        if isinstance(self.dag.ops[x], HeadZ) or isinstance(self.dag.ops[value], StoredZ):
            new, own = self.difference(value), self.difference(x)
            if new is None or own is None:
                return new if own is None else self.call(operator.neg, own)
            return self.call(operator.sub, new, own)
        return self.gaps.of(self.gaps.gap(x, value, tokens))

    def _of_head(self, now: fx.Node, base: fx.Node, head: int) -> fx.Node:
        """What one head has more than in the base run, of `[b, s, head, d_head]`."""
        return self.call(aten.select.int, self.call(operator.sub, now, base), 2, head)
