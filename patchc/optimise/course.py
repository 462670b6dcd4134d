"""What a whole suffix (`Run`) computes: at which tokens each of its blocks reads changed streams, and at which it
writes anew. Rows, FLOPs and bytes are counted from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Stage:
    """One block of a suffix: the tokens at which the stream below it has changed and is read, and those at which the
    stream above it has changed and is read."""

    block: int
    incoming: Tokens
    outgoing: Tokens

    @property
    def asking(self) -> Tokens:
        """Outgoing tokens that have changed below the block already."""
        return self.incoming & self.outgoing


@dataclass
class Courses:
    """The courses of the suffixes of one DAG. Those that enter at one rank, changed at the same tokens and asked for
    the same, are one."""

    dag: Dag
    _known: dict[tuple[int, Tokens, Tokens], tuple[Stage, ...]] = field(
        default_factory=dict[tuple[int, Tokens, Tokens], tuple[Stage, ...]]
    )

    def of(self, rank: int, changed: Tokens, demanded: Tokens) -> tuple[Stage, ...]:
        """The blocks from `rank` up, where `changed` has changed below it and `demanded` is asked of the end."""
        key = (rank, changed, demanded)
        if key not in self._known:
            self._known[key] = self._stages(*key)
        return self._known[key]

    def _stages(self, rank: int, changed: Tokens, demanded: Tokens) -> tuple[Stage, ...]:
        top = self.dag.graph.top
        attends = {b.rank for b in self.dag.graph.blocks if b.kind is BlockKind.ATTENTION}
        below, needed = {rank: changed}, {top: demanded}
        for r in range(rank, top):
            below[r + 1] = self.dag.spread(below[r]) if r in attends else below[r]
        for r in range(top, rank, -1):
            needed[r - 1] = self.dag.reach(needed[r]) if r - 1 in attends else needed[r]
        return tuple(
            Stage(i, below[b.rank] & needed[b.rank], below[b.rank + 1] & needed[b.rank + 1])
            for i, b in enumerate(self.dag.graph.blocks)
            if b.rank >= rank
        )
