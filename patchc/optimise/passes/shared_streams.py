"""Adds up streams once for all their readers: a sum of writers becomes a chain by rank, where another sum begins alike.

Before    v3 = v1 + v2                                        After    v3 = v1 + v2
          v4 = attention 1(q: v3, k: base, v: base)                    v4 = attention 1(q: v3, k: base, v: base)
          v5 = head[1, 0] of v4                                        v5 = head[1, 0] of v4
          v6 = v1 + v2 + v5                                            v6 = v3 + v5
So a reader costs one addition a rank in which something is written, not one a writer below it. Sums may be taken in
another order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from patchc.ir.dag import Dag
from patchc.ir.laws import Law
from patchc.ir.ops import (
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
    Run,
    Scale,
    StoredZ,
    Stream,
    Sum,
    Tokenwise,
    VariantId,
    children,
)
from patchc.ir.program import Program
from patchc.optimise.facts import Facts, counted
from patchc.optimise.rebuild import Groups, read_by, rebuilt

Parts = tuple[VariantId, ...]


def apply(program: Program) -> Program:
    if Law.STREAMS in program.dag.laws:
        return program
    return rebuilt(program, Law.STREAMS, _chains(program))


def _chains(program: Program) -> Groups:
    """Every sum that begins as another one does, cut behind each such beginning."""
    dag = program.dag
    read = read_by(dag, (root for roots in program.roots for root in roots))
    ranks = _ranks(dag, read)
    sums = {i: list(_beginnings(op.parts, ranks)) for i in read if isinstance(op := dag.ops[i], Sum)}
    shared = Counter(beginning for beginnings in sums.values() for beginning in beginnings)
    return {i: list(_groups([b for b in begin if shared[b] > 1 or b == begin[-1]])) for i, begin in sums.items()}


def _beginnings(parts: Parts, ranks: dict[VariantId, int]) -> Iterator[Parts]:
    """The parts up to each rank, from two parts on, up to all of them."""
    ordered = sorted(parts, key=lambda p: (ranks[p], p))
    for n in range(2, len(ordered) + 1):
        if n == len(ordered) or ranks[ordered[n - 1]] < ranks[ordered[n]]:
            yield tuple(ordered[:n])


def _groups(beginnings: list[Parts]) -> Iterator[Parts]:
    """What each of some beginnings, each longer than the one before, adds to that."""
    done = 0
    for beginning in beginnings:
        yield beginning[done:]
        done = len(beginning)


def _ranks(dag: Dag, read: list[VariantId]) -> dict[VariantId, int]:
    """The rank at which each variant is complete."""
    out = {0: 0}
    for i in read:
        out[i] = _rank(dag, dag.ops[i], out)
    return out


def _rank(dag: Dag, op: Op, known: dict[VariantId, int]) -> int:
    match op:
        case Const(block) | Core(block) | Tokenwise(block) | PostNorm(block):
            return dag.graph.blocks[block].rank
        case Projected(block) | Entries(block) | Neurons(block) | StoredZ(block):
            return dag.graph.blocks[block].rank
        case Stream(rank):
            return rank - 1
        case Run():
            return dag.graph.top
        case Out() | HeadZ() | Sum() | Scale() | Mix() | Masked():
            return max(known[child] for child in children(op))


def remark(facts: Facts) -> tuple[bool, str]:
    readers = [n for i, op in facts.asked() if isinstance(op, Sum) and (n := facts.needs.uses[i]) > 1]
    runs = sum(isinstance(op, Run) for _, op in facts.asked())
    found = [f"{counted(len(readers), 'stream')} added up once for {sum(readers):,} readers" if readers else ""]
    found.append(f"the plain model runs on from {counted(runs, 'stream')}, each planned as one value" if runs else "")
    return any(found), "; ".join(filter(None, found)) or "no stream that is added up has a second reader"
