"""Backward demand: which tokens, heads and projections of each variant anyone reads, from the roots down.

What is not demanded is not computed. Demand is no part of a variant's identity: two cells that read different tokens of
one variant share it. A program's schedule says whether tokens and heads that nobody reads are computed all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush

from patchc.ir.dag import Dag
from patchc.ir.ops import (
    Const,
    Core,
    Entries,
    HeadZ,
    Masked,
    Mix,
    Neurons,
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
)
from patchc.ir.program import FULL, Schedule
from patchc.ir.tokens import Tokens


class Counts(dict[VariantId, int]):
    """Numbers, or bits, by variant: 0 where there is none."""

    def __missing__(self, key: VariantId) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Demand:
    """`tokens[i]`: where variant i is computed (it differs from the base run there, and someone reads it), the last
    variant first. `uses[i]`: how many readers it has. `heads[core]`: bits of the heads read. `projections[block]`: for
    (input, port) the heads and tokens to project. Only what is demanded stands in them."""

    tokens: Counts = field(default_factory=Counts)
    uses: Counts = field(default_factory=Counts)
    schedule: Schedule = FULL
    heads: dict[VariantId, int] = field(default_factory=dict[VariantId, int])
    projections: dict[int, dict[tuple[VariantId, int], tuple[int, Tokens]]] = field(
        default_factory=dict[int, dict[tuple[VariantId, int], tuple[int, Tokens]]]
    )


def demand(dag: Dag, roots: Iterable[tuple[VariantId, Tokens]], schedule: Schedule = FULL) -> Demand:
    """What `roots`, each read at its tokens, need. A `Run` is asked for its input only: expand it first to see
    inside."""
    out = Demand(schedule=schedule)
    waiting: list[int] = []
    for root, tokens in roots:
        _ask(dag, out, waiting, root, tokens)
    order: list[VariantId] = []
    while waiting:  # children have lower numbers: when a variant is taken, all its readers have asked
        order.append(-heappop(waiting))
        _ask_children(dag, out, waiting, order[-1])
    tokens = {i: out.tokens[i] for i in order}
    out.tokens.clear()
    out.tokens.update(tokens)
    return out


def _ask(dag: Dag, out: Demand, waiting: list[int], variant: VariantId, tokens: Tokens) -> None:
    changed = dag.changed[variant]
    if here := tokens & changed if out.schedule.backward else changed:
        if variant not in out.tokens:
            heappush(waiting, -variant)
        out.tokens[variant] |= here
        out.uses[variant] += bool(tokens & changed)


def _ask_children(dag: Dag, out: Demand, waiting: list[int], i: VariantId) -> None:
    tokens = out.tokens[i]
    match dag.ops[i]:
        case Sum(parts):
            for p in parts:
                _ask(dag, out, waiting, p, tokens)
        case Tokenwise(_, x) | PostNorm(_, x) | Scale(_, x) | Projected(_, _, _, x) | Neurons(_, x):
            _ask(dag, out, waiting, x, tokens)
        case Entries(_, _, _, q, k):
            _ask(dag, out, waiting, q, tokens)
            _ask(dag, out, waiting, k, dag.layout.whole(tokens))
        case HeadZ(core, head):
            _ask(dag, out, waiting, core, tokens)
            out.heads[core] = out.heads.get(core, 0) | 1 << head
        case Mix(parts):
            for here, p in parts:
                _ask(dag, out, waiting, p, here & tokens)
        case Out(core, heads):
            _ask(dag, out, waiting, core, tokens)
            out.heads[core] = out.heads.get(core, 0) | heads
        case Core() as core:
            if not out.schedule.heads:
                out.heads[i] = (1 << dag.graph.n_heads) - 1
            for port in range(3):
                _ask_projection(dag, out, waiting, core, port, tokens, out.heads[i])
        case Run(rank, x):
            _ask(dag, out, waiting, x, dag.reach(tokens) if dag.attends_from(rank) else tokens)
        case Masked(x, starts):
            _ask(dag, out, waiting, x, tokens)
            for _, here, value in starts:
                _ask(dag, out, waiting, value, here & tokens)
        case Const() | Stream() | StoredZ():
            pass


def _ask_projection(
    dag: Dag, out: Demand, waiting: list[int], core: Core, port: int, tokens: Tokens, heads: int
) -> None:
    """A projection of one input counts as one reader, however many cores share it."""
    x = core.input(port)
    needed = dag.changed[x]
    if out.schedule.backward:
        needed &= tokens if port == 0 else dag.reach(tokens)
    if not needed:
        return
    at_block = out.projections.setdefault(core.block, {})
    known_heads, known_tokens = at_block.get((x, port), (0, 0))
    if not any((x, p) in at_block for p in range(3)):
        out.uses[x] += 1
    if x not in out.tokens:
        heappush(waiting, -x)
    out.tokens[x] |= needed
    at_block[x, port] = known_heads | heads, known_tokens | needed
