"""What a mask multiplies in a compiled graph: the value that enters at a start, less what the run itself has there.

For values that are sums of nodes' own outputs in some runs, a head's gap is formed from z and written once. Many gaps
stand in one bank `[gap, b, s, d_model]`, of which a product with a table of masks makes many streams at once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from patchc.codegen.stored import StoredNodes
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import FromWorld, Mean, Moved, Value
from patchc.ir.graph import BlockKind
from patchc.ir.ops import Const, Core, Out, Tokenwise, ValueId, VariantId
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens

CHUNK = 48
"""Gaps of one bank: fewer take more products, more are copied more often as the run proceeds."""


@dataclass(frozen=True, slots=True)
class Gap:
    """`value - own`: of members of a block (bits) where `members` is not 0 and `value` is the number of a value in the
    DAG; else `value` is a variant."""

    own: VariantId
    value: int
    block: int = -1
    members: int = 0


class Gaps:
    """Writes gaps. `z_of` gives a core's z, `mlp_of` what a `Tokenwise` writes, `difference` any variant less the base
    run (None for nothing), `at` what stands at some tokens only. b = batch, s = pos."""

    def __init__(
        self,
        dag: Dag,
        worlds: Worlds,
        stored: StoredNodes,
        z_of: Callable[[VariantId], fx.Node],
        mlp_of: Callable[[VariantId], fx.Node],
        difference: Callable[[VariantId], fx.Node | None],
    ):
        self.dag, self.worlds, self.call, self.stored = dag, worlds, worlds.call, stored
        self.z_of, self.mlp_of, self.difference = z_of, mlp_of, difference
        self._made: dict[Gap, fx.Node | None] = {}
        self._z: dict[tuple[int, int, ValueId], fx.Node] = {}
        self._banks: dict[tuple[Gap, ...], fx.Node] = {}

    # ---- which
    def gap(self, own: VariantId, value: VariantId, tokens: Tokens) -> Gap:
        """The gap at a start at `tokens`."""
        members = self.plain(value, tokens)
        op = self.dag.ops[value]
        if members and isinstance(op, Const):
            match self.dag.ops[own] if own else None:
                case None:
                    return Gap(own, op.value, op.block, members)
                case Out(core, heads) if self._block_of(core) == op.block and heads == members:
                    return Gap(own, op.value, op.block, members)
                case Tokenwise(block) if block == op.block:
                    return Gap(own, op.value, op.block, members)
                case _:
                    pass
        return Gap(own, value)

    def plain(self, value: VariantId, tokens: Tokens) -> int:
        """The heads (or the MLP) of whose outputs in some runs a value is the sum at all `tokens`; 0 where it is
        anything else."""
        op = self.dag.ops[value]
        if not isinstance(op, Const) or op.site is not Site.OUT or tokens & self.dag.layout.all & ~op.tokens:
            return 0
        block = self.dag.graph.blocks[op.block]
        writes = block.kind is not BlockKind.EMBED and not op.members >> self.dag.graph.n_heads
        return op.members if writes and is_sum_of_runs(self.dag.values[op.value]) else 0

    def _block_of(self, core: VariantId) -> int:
        op = self.dag.ops[core]
        assert isinstance(op, Core)
        return op.block

    # ---- one
    def of(self, gap: Gap) -> fx.Node | None:
        """A gap, `[b, s, d_model]`; None where it is nothing."""
        if gap not in self._made:
            self._made[gap] = self._written(gap) if gap.members else self._minus(gap)
        return self._made[gap]

    def _minus(self, gap: Gap) -> fx.Node | None:
        new, own = self.difference(gap.value), self.difference(gap.own)
        if own is None:
            return new
        return self.call(operator.neg, own) if new is None else self.call(operator.sub, new, own)

    def _written(self, gap: Gap) -> fx.Node:
        if self.dag.graph.blocks[gap.block].kind is BlockKind.MLP:
            own = self.mlp_of(gap.own) if gap.own else self.worlds.written(self.worlds.base, gap.block)
            value = self.stored.mlp(gap.block, self.dag.values[gap.value])
            return self.less(value, own)
        z = self.worlds.some_heads(self.z(gap), gap.members)
        written = self.worlds.write(gap.block, z, gap.members)
        n = gap.members.bit_count()
        return self.call(aten.select.int, written, 2, 0) if n == 1 else self.call(aten.sum.dim_IntList, written, [2])

    def z(self, gap: Gap) -> fx.Node:
        """A gap in z, `[b, s, head, d_head]`, right for its own heads."""
        own = self.own_z(gap)
        key = (id(own), gap.block, gap.value)
        if key not in self._z:
            self._z[key] = self.less(self.stored.z_of_runs(gap.block, self.dag.values[gap.value]), own)
        return self._z[key]

    def own_z(self, gap: Gap) -> fx.Node:
        """What the run itself has there."""
        op = self.dag.ops[gap.own]
        return self.z_of(op.core) if isinstance(op, Out) else self.worlds.z(self.worlds.base, gap.block)

    def less(self, value: fx.Node | None, own: fx.Node) -> fx.Node:
        """A value, None being zero, less `own`."""
        return self.call(operator.neg, own) if value is None else self.call(operator.sub, value, own)

    # ---- many
    def banks(self, gaps: tuple[Gap, ...], joined: bool) -> list[tuple[fx.Node, int]]:
        """Gaps that are something, in the order of their blocks, as banks `[gap, b, s, d_model]` and how many stand in
        each. Those of many blocks are joined once and shared; `joined`: the rest too, else each block's apart."""
        chunk: list[Gap] = []
        out: list[tuple[fx.Node, int]] = []
        for _, of_block in groupby(gaps, key=lambda g: g.block):
            chunk += of_block
            if len(chunk) >= CHUNK:
                out.append((self._bank(tuple(chunk)), len(chunk)))
                chunk = []
        if joined and chunk:
            out.append((self._bank(tuple(chunk)), len(chunk)))
        elif chunk:
            blocks = (tuple(some) for _, some in groupby(chunk, key=lambda g: g.block))
            out += [(self._bank(some), len(some)) for some in blocks]
        return out

    def _bank(self, gaps: tuple[Gap, ...]) -> fx.Node:
        if gaps not in self._banks:
            blocks = [tuple(some) for _, some in groupby(gaps, key=lambda g: g.block)]
            one = len(blocks) == 1
            parts = self._of_one_block(gaps) if one else [self._bank(some) for some in blocks]
            self._banks[gaps] = parts[0] if len(parts) == 1 else self.call(aten.cat.default, parts, 0)
        return self._banks[gaps]

    def _of_one_block(self, gaps: tuple[Gap, ...]) -> list[fx.Node]:
        """Banks that together hold the gaps of one block; heads that share a z write in one product."""
        kind = self.dag.graph.blocks[gaps[0].block].kind if gaps[0].members else None
        firsts = [next(bits(g.members)) for g in gaps if g.members]
        alike = kind is BlockKind.ATTENTION and all(g.members.bit_count() == 1 for g in gaps)
        if alike and firsts == sorted(set(firsts)) and len({id(self.z(g)) for g in gaps}) == 1:
            members = sum(g.members for g in gaps)
            z = self.worlds.some_heads(self.z(gaps[0]), members)
            return [self.call(aten.permute.default, self.worlds.write(gaps[0].block, z, members), [2, 0, 1, 3])]
        return [self._row(g) for g in gaps]

    def _row(self, gap: Gap) -> fx.Node:
        found = self.of(gap)
        assert found is not None
        return self.call(aten.unsqueeze.default, found, 0)


def is_sum_of_runs(value: Value) -> bool:
    """Whether a value is a sum of what a node writes in some runs, so that it can be formed before the node writes."""
    return all(isinstance(source, FromWorld | Mean | Moved) for _, source in value.terms)
