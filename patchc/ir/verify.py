"""The rules of a variant DAG and of a program, executable: what `lower` and each pass of the optimiser must give, and
what execution relies on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from patchc.ir.dag import Dag
from patchc.ir.graph import BlockKind
from patchc.ir.laws import Law
from patchc.ir.ops import (
    PATTERN,
    SCORES,
    Const,
    Core,
    Entries,
    HeadZ,
    Inner,
    Masked,
    Mix,
    Neurons,
    Op,
    Out,
    PostNorm,
    Projected,
    Replaced,
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


@dataclass(frozen=True, slots=True)
class Fault:
    """A rule that a variant breaks."""

    rule: str
    variant: VariantId
    message: str


def faults(dag: Dag, roots: Iterable[VariantId]) -> Iterator[Fault]:
    """Every way in which a DAG breaks a rule; nothing if it is sound."""
    known: dict[Op, VariantId] = {}
    for i, op in enumerate(dag.ops):
        if i:
            yield from (Fault(rule, i, message) for rule, message in _broken(dag, i, op))
        if Law.EQUAL in dag.laws and known.setdefault(op, i) != i:
            yield Fault("stands-once", i, f"v{i} is v{known[op]} again")
    for root in roots:
        if root >= len(dag) or isinstance(dag.ops[root], Core):
            yield Fault("root-is-a-stream", root, "a cell's root is no value of the stream")


def program_faults(program: Program) -> Iterator[Fault]:
    """The same of a program: its DAG, and that each cell runs once or provably has no effect."""
    yield from faults(program.dag, {root for roots in program.roots for root in roots})
    times = Counter([*program.live, *program.no_effect])
    for cell in range(len(program.roots)):
        if times.pop(cell, 0) != 1:
            yield Fault("runs-each-cell-once", program.roots[cell][0], f"cell {cell} runs never, or more than once")
    for cell in times:
        yield Fault("runs-each-cell-once", 0, f"there is no cell {cell}")


def _broken(dag: Dag, i: VariantId, op: Op) -> Iterator[tuple[str, str]]:
    for child in children(op):
        if not 0 <= child < i:
            yield "reads-an-earlier-variant", f"v{i} reads v{child}"
        elif isinstance(dag.ops[child], Core) != isinstance(op, Out | HeadZ):
            yield "z-is-read-by-out-alone", f"v{i} reads v{child}, {type(dag.ops[child]).__name__}"
        elif isinstance(dag.ops[child], Inner) and not isinstance(op, Mix | Sum | Scale | Masked | Entries):
            yield "no-node-reads-what-is-inside-one", f"v{i} reads v{child}, {type(dag.ops[child]).__name__}"
        elif isinstance(dag.ops[child], Run) and not isinstance(op, Mix):
            yield "a-run-ends-at-the-logits", f"v{i} reads the suffix v{child}"
    if not dag.changed[i] or dag.changed[i] & ~dag.layout.all:
        yield "changes-some-token", f"v{i} changes tokens {dag.changed[i]:b}"
    yield from _broken_by_kind(dag, i, op)


def _broken_by_kind(dag: Dag, i: VariantId, op: Op) -> Iterator[tuple[str, str]]:
    match op:
        case Const(block, members, value, tokens):
            if tokens != dag.changed[i]:
                yield "is-stored-where-it-differs", f"v{i} is stored at other tokens than it changes"
            if not members or members >> dag.graph.blocks[block].size or not 0 <= value < len(dag.values):
                yield "names-what-there-is", f"v{i} stores members {members:b} of block {block}"
        case Core(block) | Tokenwise(block):
            kind = BlockKind.ATTENTION if isinstance(op, Core) else BlockKind.MLP
            if dag.graph.blocks[block].kind is not kind:
                yield "runs-a-block-of-its-kind", f"v{i} runs block {block}, {dag.graph.blocks[block].kind}"
            yield from _broken_replaced(dag, i, op)
        case PostNorm(block):
            if not dag.graph.blocks[block].post_norm:
                yield "runs-a-block-of-its-kind", f"v{i} norms what block {block} writes, which has no such norm"
        case Projected(block, _, head) | StoredZ(block, head):
            if dag.graph.blocks[block].kind is not BlockKind.ATTENTION or head >= dag.graph.n_heads:
                yield "names-what-there-is", f"v{i} is of head {head} of block {block}"
        case Out(_, heads):
            if not heads or heads >> dag.graph.n_heads:
                yield "names-what-there-is", f"v{i} writes heads {heads:b}"
        case Sum(parts):
            if len(parts) < 2 or 0 in parts or list(parts) != sorted(parts):
                yield "is-in-normal-form", f"v{i} adds {parts}"
        case Mix(parts):
            yield from _broken_mix(dag, i, parts)
        case Scale(factor, _):
            if factor in (0.0, 1.0):
                yield "is-in-normal-form", f"v{i} scales by {factor}"
        case Entries(block, head) if head >= dag.graph.n_heads:
            yield "names-what-there-is", f"v{i} is of head {head} of block {block}"
        case Stream() | Masked() | Run() | HeadZ() | Entries() | Neurons():
            pass


def _broken_replaced(dag: Dag, i: VariantId, op: Core | Tokenwise) -> Iterator[tuple[str, str]]:
    for r in op.replaced:
        if isinstance(r, Replaced):
            known = r.heads and not r.heads >> dag.graph.n_heads and 0 <= r.port <= PATTERN
            if (r.port >= SCORES) != bool(r.sources):
                yield "sources-belong-to-entries", f"v{i} sets port {r.port} looking at {r.sources:b}"
        else:
            known = r.neurons and not r.neurons >> dag.graph.d_mlp
        if not known or not 0 <= r.value < len(dag.values):
            yield "names-what-there-is", f"v{i} sets {r}"
        if not r.tokens or r.tokens & ~dag.changed[i]:
            yield "is-set-where-it-differs", f"v{i} is set at other tokens than it changes"


def _broken_mix(dag: Dag, i: VariantId, parts: tuple[tuple[int, VariantId], ...]) -> Iterator[tuple[str, str]]:
    seen = 0
    for tokens, part in parts:
        if tokens & seen:
            yield "mixes-disjoint-tokens", f"v{i} takes tokens {tokens & seen:b} twice"
        if not tokens or tokens & ~dag.changed[part]:
            yield "is-in-normal-form", f"v{i} takes v{part} where it equals the base run"
        seen |= tokens
