"""Many streams at once in a compiled graph: one product of a table of masks with the bank of all that they multiply.

Which streams are written so, and what they have in common, `variants` says. b = batch, s = pos.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from patchc.codegen.gaps import Gap, Gaps
from patchc.codegen.homes import Homes, Parts, Term
from patchc.codegen.masks import Masks
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.dag import Dag
from patchc.ir.tokens import Tokens

ELEMENTWISE = 24
"""A multiplication and an addition of whole arrays cost as much as so many inside a matrix product."""
COPY = 8
"""And so many, a copy of one into a bank."""


@dataclass
class Products:
    """Writes products into the graph of `worlds`."""

    dag: Dag
    worlds: Worlds
    masks: Masks
    gaps: Gaps
    homes: Homes

    def are_cheaper(self, streams: list[list[Term]]) -> bool:
        """Whether a product of all masks with a bank of all gaps costs less than masks one by one."""
        gaps = {gap for some in streams for *_, gap in some}
        sparse = sum(map(len, streams)) * ELEMENTWISE
        return len(streams) * len(gaps) + len(streams) * ELEMENTWISE + len(gaps) * COPY < sparse

    def of(self, own: fx.Node, streams: list[Parts]) -> fx.Node | None:
        """`own` and masks times gaps, stream by stream, `[n, b, s, d_model]` (`[1, ...]` where there are none); None
        where two masks act on one gap of a stream at one position."""
        terms = [self.homes.terms(parts) for parts in streams]
        order = self._in_order({gap for some in terms for *_, gap in some})
        if not order:
            return self.worlds.call(aten.unsqueeze.default, own, 0)
        slots: list[list[tuple[int, Tokens]]] = []
        for some in terms:
            row: dict[Gap, list[tuple[int, Tokens]]] = {gap: [] for gap in order}
            for mask, tokens, gap in some:
                if gap in row:
                    row[gap].append((mask, tokens))
            slots += row.values()
        table = self.masks.table(slots)
        if table is None:
            return None
        product = self._by_position if self._names_positions(slots) else self._everywhere
        return product(own, table, order, len(streams))

    def _names_positions(self, slots: list[list[tuple[int, Tokens]]]) -> bool:
        every = self.dag.layout.all
        return any(tokens & every != every for slot in slots for _, tokens in slot)

    def _everywhere(self, own: fx.Node, table: fx.Node, gaps: tuple[Gap, ...], n: int) -> fx.Node:
        """`own + masks @ gaps`, `[n, b, s, d_model]`."""
        call = self.worlds.call
        table = call(aten.reshape.default, table, [n, len(gaps)])
        sizes = [call(aten.sym_size.int, own, axis) for axis in range(2)]
        out, first = call(aten.reshape.default, own, [1, -1]), 0
        for bank, size in self.gaps.banks(gaps, joined=n > 1):
            some = call(aten.narrow.default, table, 1, first, size)
            out = call(aten.addmm.default, out, some, call(aten.reshape.default, bank, [size, -1]))
            first += size
        return call(aten.reshape.default, out, [n, *sizes, self.dag.graph.d_model])

    def _by_position(self, own: fx.Node, table: fx.Node, gaps: tuple[Gap, ...], n: int) -> fx.Node:
        """The same with a mask a position; r = stream, g = gap."""
        call = self.worlds.call
        table = call(aten.reshape.default, table, [-1, n, len(gaps)])
        out, first = own, 0
        for bank, size in self.gaps.banks(gaps, joined=True):
            some = call(aten.narrow.default, table, 2, first, size)
            out = call(operator.add, call(aten.einsum.default, "srg,gbsd->rbsd", [some, bank]), out)
            first += size
        return out

    def _in_order(self, gaps: set[Gap]) -> tuple[Gap, ...]:
        """Gaps that are something, by block, then by member."""
        kept = [g for g in gaps if g.members or self.gaps.of(g) is not None]
        return tuple(sorted(kept, key=lambda g: (g.block, g.members, g.own, g.value)))
