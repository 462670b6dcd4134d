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
from patchc.optimise.course import Courses
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

    courses: Courses

    def add(self, counts: list[int], demand: Demand, variants: Sequence[VariantId]) -> None:
        """Adds the rows of some variants to those counted so far."""
        dag = self.courses.dag
        for i in variants:
            match dag.ops[i]:
                case Core(block) | Projected(block) | Neurons(block):
                    counts[block] += demand.tokens[i].bit_count()
                case Tokenwise(block, x, replaced):
                    stored = replaced and not x and dag.graph.blocks[block].neurons_add_up
                    counts[block] += 0 if stored else demand.tokens[i].bit_count()
                case Run(rank, x):
                    for block, n in self._of_run(rank, dag.changed[x], demand.tokens[i]):
                        counts[block] += n
                case _:
                    pass

    def _of_run(self, rank: int, changed: Tokens, demanded: Tokens) -> Sequence[tuple[int, int]]:
        """Rows of the plain model from `rank` up, by block: what has changed and is read."""
        key = (rank, changed, demanded)
        found = self._runs.get(key)
        if found is None:
            blocks, stages = self.courses.dag.graph.blocks, self.courses.of(*key)
            attends = [blocks[s.block].kind is BlockKind.ATTENTION for s in stages]
            found = self._runs[key] = [
                (s.block, (s.outgoing if a else s.asking).bit_count()) for s, a in zip(stages, attends, strict=True)
            ]
        return found

    _runs: dict[tuple[int, Tokens, Tokens], list[tuple[int, int]]] = field(
        default_factory=dict[tuple[int, Tokens, Tokens], list[tuple[int, int]]]
    )
