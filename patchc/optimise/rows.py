"""Counts, before anything runs, the token rows that each block computes for some variants.

Exact: a `Run` is counted as the plain model on its changed tokens, as far as they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.ops import Core, Neurons, Projected, Run, Tokenwise, VariantId, children
from patchc.ir.tokens import Tokens
from patchc.optimise.demand import Demand


def reachable(dag: Dag, demand: Demand, roots: Sequence[VariantId], seen: set[VariantId]) -> list[VariantId]:
    """The demanded variants below some roots that `seen` does not hold yet; adds them to it."""
    out: list[VariantId] = []
    todo = list(roots)
    while todo:
        i = todo.pop()
        if i in seen or not demand.tokens[i]:
            continue
        seen.add(i)
        out.append(i)
        todo.extend(children(dag.ops[i]))
    return out


@dataclass
class Rows:
    """Counts rows of variants of one DAG, block by block."""

    dag: Dag
    _runs: dict[tuple[int, Tokens, Tokens], list[int]] = field(
        default_factory=dict[tuple[int, Tokens, Tokens], list[int]]
    )

    def add(self, counts: list[int], demand: Demand, variants: Sequence[VariantId]) -> None:
        """Adds the rows of some variants to those counted so far."""
        for i in variants:
            match self.dag.ops[i]:
                case Core(block) | Projected(block) | Neurons(block):
                    counts[block] += demand.tokens[i].bit_count()
                case Tokenwise(block, x, replaced):
                    counts[block] += demand.tokens[i].bit_count() if x or not replaced else 0
                case Run(rank, x):
                    for block, n in enumerate(self.of_run(rank, self.dag.changed[x], demand.tokens[i]), 1):
                        counts[-block] += n
                case _:
                    pass

    def of_run(self, rank: int, changed: Tokens, demanded: Tokens) -> list[int]:
        """Rows of the plain model from `rank` up, the last block first: what has changed by then and can still reach
        what is demanded."""
        key = (rank, changed, demanded)
        if key not in self._runs:
            self._runs[key] = self._counted(*key)
        return self._runs[key]

    def _counted(self, rank: int, changed: Tokens, demanded: Tokens) -> list[int]:
        dag = self.dag
        blocks = [b for b in dag.graph.blocks if b.rank >= rank]
        below = {rank: changed}
        for r in range(rank, dag.graph.top):
            attends = any(b.rank == r and b.kind is BlockKind.ATTENTION for b in blocks)
            below[r + 1] = dag.spread(below[r]) if attends else below[r]
        out: list[int] = []
        asked, above = demanded, dag.graph.top
        for b in reversed(blocks):
            if b.rank < above:  # blocks side by side are asked for the same
                demanded, above = asked, b.rank
            attends = b.kind is BlockKind.ATTENTION
            here = dag.spread(below[b.rank]) if attends else below[b.rank]
            out.append((here & demanded).bit_count())
            asked |= dag.reach(demanded) if attends else 0
        return out
