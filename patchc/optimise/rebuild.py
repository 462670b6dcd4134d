"""Writes a program's DAG again, variant by variant, into one that keeps a further law. What no root reads is left
out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from patchc.ir.dag import Dag
from patchc.ir.laws import Law
from patchc.ir.ops import (
    EQUAL_TO_BASE,
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
    Replaced,
    ReplacedNeurons,
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
from patchc.lower.changes import Changes

Groups = Mapping[VariantId, Sequence[Sequence[VariantId]]]
"""Of sums: their parts, group by group; each group is added to the sum of those before it."""


def rebuilt(program: Program, law: Law, groups: Groups | None = None) -> Program:
    """The program on a DAG under `law` too; the same object if it stands on one already."""
    if law in program.dag.laws:
        return program
    new = Dag(program.dag.graph, program.dag.layout, program.dag.laws | law)
    return replace(program, dag=new, roots=written_into(new, program, groups or {}))


def written_into(new: Dag, program: Program, groups: Groups) -> tuple[tuple[VariantId, ...], ...]:
    """Writes what a program's roots are made of into `new`; gives the roots there."""
    old = program.dag
    rebuild = _Rebuild(old, new, Changes(new, program.prompts, program.experiment.run), groups)
    for i in read_by(old, (root for roots in program.roots for root in roots)):
        rebuild.known[i] = rebuild.again(i, old.ops[i])
    return tuple(tuple(rebuild.known[root] for root in roots) for roots in program.roots)


def read_by(dag: Dag, roots: Iterable[VariantId]) -> list[VariantId]:
    """The variants that some roots are made of, children first."""
    found = {root for root in roots if root}
    for i in range(max(found, default=0), 0, -1):
        if i in found:
            found.update(child for child in children(dag.ops[i]) if child)
    return sorted(found)


@dataclass
class _Rebuild:
    """`known`: the new number of each old variant that has been written again."""

    old: Dag
    new: Dag
    changes: Changes
    groups: Groups
    known: dict[VariantId, VariantId] = field(default_factory=lambda: {EQUAL_TO_BASE: EQUAL_TO_BASE})

    def again(self, i: VariantId, op: Op) -> VariantId:
        """One variant, whose children are known, by the constructors of the new DAG, which keep its laws."""
        new, known, values = self.new, self.known, self.old.values
        match op:
            case Const(block, members, value, tokens, site):
                return self.changes.node(block, members, site, values[value], tokens)
            case Stream(rank, value, tokens, block):
                return self.changes.stream(rank, values[value], tokens, block)
            case StoredZ(block, head, value, tokens):
                return self.changes.z(block, head, values[value], tokens)
            case Core(block, q, k, v, replaced):
                inputs = known[q], known[k], known[v]
                return new.core(block, *inputs, self._head_sets(replaced, inputs))
            case Out(core, heads):
                return new.out(known[core], heads)
            case HeadZ(core, head):
                return new.head_z(known[core], head)
            case Tokenwise(block, x, replaced):
                return new.tokenwise(block, known[x], self._neuron_sets(replaced, known[x]))
            case PostNorm(block, x):
                return new.post_norm(block, known[x])
            case Neurons(block, x, replaced):
                return new.neurons(block, known[x], self._neuron_sets(replaced, known[x]))
            case Projected(block, port, head, x, replaced):
                return new.projected(block, port, head, known[x], self._head_sets(replaced, [known[x]] * 3))
            case Entries(block, head, port, q, k, replaced):
                sets = self._head_sets(replaced, (known[q], known[k], EQUAL_TO_BASE))
                return new.entries(block, head, port, known[q], known[k], sets)
            case Sum(parts):
                return self._sum(self.groups.get(i, [parts]))
            case Scale(factor, x):
                return new.scale(factor, known[x])
            case Mix(parts):
                return new.mix((tokens, known[x]) for tokens, x in parts)
            case Masked(x, starts):
                return new.masked(known[x], tuple((mask, tokens, known[value]) for mask, tokens, value in starts))
            case Run(rank, x):
                return new.run(rank, known[x])

    def _sum(self, groups: Sequence[Sequence[VariantId]]) -> VariantId:
        out = EQUAL_TO_BASE
        for parts in groups:
            out = self.new.sum([out, *(self.known[p] for p in parts)])
        return out

    def _head_sets(self, replaced: Sequence[Replaced], inputs: Sequence[VariantId]) -> tuple[Replaced, ...]:
        named = [replace(r, value=self.new.value(self.old.values[r.value])) for r in replaced]
        where = self.changes.inside_head(named, inputs)
        return tuple(replace(r, tokens=tokens) for r, tokens in zip(named, where, strict=True) if tokens)

    def _neuron_sets(self, replaced: Sequence[ReplacedNeurons], x: VariantId) -> tuple[ReplacedNeurons, ...]:
        out: list[ReplacedNeurons] = []
        for r in replaced:
            value = self.old.values[r.value]
            if tokens := self.changes.inside(value, r.tokens, self.new.changed[x]):
                out.append(replace(r, value=self.new.value(value), tokens=tokens))
        return tuple(out)
