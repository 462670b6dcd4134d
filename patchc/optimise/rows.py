"""Counts, before anything runs, the token rows that each block computes for a cell, and the memory of holding them.

Exact where the DAG is explicit; a `Run` is counted as the plain model on its changed tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

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
        if i in seen or not (demand.tokens[i] or isinstance(dag.ops[i], Core)):
            continue
        seen.add(i)
        out.append(i)
        todo.extend(children(dag.ops[i]))
    return out


def rows_of(dag: Dag, demand: Demand, variants: list[VariantId]) -> Counter[int]:
    """Token rows by block."""
    out: Counter[int] = Counter()
    for i in variants:
        match dag.ops[i]:
            case Core(block) | Projected(block) | Neurons(block):
                out[block] += demand.tokens[i].bit_count()
            case Tokenwise(block, x, replaced):
                out[block] += demand.tokens[i].bit_count() if x or not replaced else 0
            case Run(rank, x):
                out += run_rows(dag, rank, dag.changed[x], demand.tokens[i])
            case _:
                pass
    return out


def run_rows(dag: Dag, rank: int, changed: Tokens, demanded: Tokens) -> Counter[int]:
    """Rows of the plain model from `rank` up: what has changed by then and can still reach what is demanded."""
    out: Counter[int] = Counter()
    ranks = [[(i, b) for i, b in enumerate(dag.graph.blocks) if b.rank == r] for r in range(rank, dag.graph.top)]
    moves = [any(b.kind is BlockKind.ATTENTION for _, b in blocks) for blocks in ranks]
    below = [changed]
    for attends in moves:
        below.append(dag.spread(below[-1]) if attends else below[-1])
    for blocks, attends, here in zip(reversed(ranks), reversed(moves), reversed(below[:-1]), strict=True):
        for i, b in blocks:
            out[i] = ((dag.spread(here) if b.kind is BlockKind.ATTENTION else here) & demanded).bit_count()
        demanded = dag.reach(demanded) if attends else demanded
    return out


def bytes_of(dag: Dag, rows: Counter[int], element: int) -> int:
    """Memory that a pass holds at most: the widest block's rows as stream values, projections and attention."""
    widest = max(rows.values(), default=0)
    return widest * dag.graph.d_model * element * 12
