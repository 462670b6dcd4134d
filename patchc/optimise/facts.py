"""What remarks on a finished program are made of: counts that several of the optimiser's passes share, each taken when
it is first asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from patchc.ir.dag import Dag
from patchc.ir.ops import Op, VariantId
from patchc.ir.program import Program
from patchc.optimise.course import Courses
from patchc.optimise.demand import Demand, demand
from patchc.optimise.rows import Rows, reachable


@dataclass(frozen=True)
class Facts:
    """Counts of one program."""

    program: Program

    @property
    def dag(self) -> Dag:
        return self.program.dag

    @cached_property
    def live(self) -> list[tuple[VariantId, ...]]:
        """The roots of the cells that run."""
        return [self.program.roots[c] for c in self.program.live]

    @cached_property
    def needs(self) -> Demand:
        """What all cells together ask for."""
        return demand(self.dag, self.program.reads(self.program.live), self.program.schedule)

    def asked(self) -> Iterator[tuple[VariantId, Op]]:
        """The variants that some cell asks for."""
        return ((i, self.dag.ops[i]) for i in self.needs.tokens)

    @property
    def variants(self) -> int:
        return len(self.needs.tokens)

    @property
    def alone(self) -> int:
        """Variants of all cells if none shared one with another."""
        return self._alone[0]

    @property
    def blocks(self) -> int:
        """Blocks that have rows to compute, summed over cells."""
        return self._alone[1]

    @cached_property
    def _alone(self) -> tuple[int, int]:
        variants = blocks = 0
        rows = Rows(Courses(self.dag))
        for roots in self.live:
            mine, counts = reachable(self.dag, self.needs, roots, set()), [0] * len(self.dag.graph.blocks)
            rows.add(counts, self.needs, mine)
            variants += len(mine)
            blocks += sum(n > 0 for n in counts)
        return variants, blocks

    @cached_property
    def rows(self) -> int:
        """Token rows of all blocks in all passes of the program."""
        return sum(sum(work.rows) for work in self.program.passes)


def counted(n: int, what: str, several: str = "") -> str:
    """A number with its noun."""
    return f"{n:,} {what if n == 1 else several or what + 's'}"
