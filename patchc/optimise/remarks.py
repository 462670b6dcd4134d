"""What each optimisation did for a program, in words and numbers, or why it could not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchc.ir.dag import NEVER
from patchc.ir.experiment import Experiment, Measure, NodeRead, Read
from patchc.ir.leaves import leaves
from patchc.ir.ops import Core, Out, Run, VariantId
from patchc.ir.program import Program
from patchc.optimise.cut import MOST_ROWS
from patchc.optimise.demand import Demand, demand
from patchc.optimise.rows import reachable


@dataclass(frozen=True, slots=True)
class Remark:
    """`used`: whether the optimisation changed anything here."""

    optimisation: str
    used: bool
    text: str


def remarks(program: Program, budget: int) -> tuple[Remark, ...]:
    """In the order in which they act."""
    dead = set(program.no_effect)
    cells = [c for c in range(len(program.roots)) if c not in dead]
    live = [program.roots[c] for c in cells]
    needs = demand(program.dag, program.reads(cells))
    return (
        _folded(program, needs, live),
        _dropped(program),
        _late_entry(program, live),
        _forward(program),
        _backward(program),
        _columns(program),
        _heads(program, needs),
        _suffixes(program),
        _passes(program, budget),
    )


def _folded(program: Program, needs: Demand, live: Sequence[tuple[VariantId, ...]]) -> Remark:
    alone = sum(len(reachable(program.dag, needs, roots, set())) for roots in live)
    together = sum(bool(tokens) for tokens in needs.tokens)
    text = f"{together:,} variants, where every cell by itself would have {alone:,}"
    return Remark("equal variants are one", together < alone, text)


def _dropped(program: Program) -> Remark:
    n, cells = len(program.no_effect), len(program.roots)
    if not n:
        return Remark("cells without effect", False, "every cell can change what is measured")
    return Remark("cells without effect", True, f"{n:,} of {cells:,} provably equal the unpatched run and are not run")


def _late_entry(program: Program, live: Sequence[tuple[VariantId, ...]]) -> Remark:
    graph, lows = program.dag.graph, [min(program.dag.low[root] for root in roots) for roots in live]
    blocks = len(graph.blocks) - 1
    skipped = [sum(b.rank < low for b in graph.blocks[1:]) if low < NEVER else blocks for low in lows]
    if not any(skipped):
        return Remark("late entry", False, "every cell changes the stream before the first block")
    mean = sum(skipped) / len(skipped)
    return Remark("late entry", True, f"a cell runs nothing below its patch: on average {mean:.1f} of {blocks} blocks")


def _forward(program: Program) -> Remark:
    name = "forward positions"
    if not program.dag.graph.causal:
        return Remark(name, False, "this model attends to later positions, so a change spreads to every position")
    changed = (program.dag.changed[root] for roots in program.roots for root in roots)
    sizes = [tokens.bit_count() for tokens in changed if tokens]
    total = program.prompts.layout.n_tokens
    mean = sum(sizes) / max(1, len(sizes))
    if mean == total:
        return Remark(name, False, "the first token differs already, so every position can change")
    return Remark(name, True, f"a cell can change {mean:.1f} of {total} tokens; the others keep the unpatched values")


def _backward(program: Program) -> Remark:
    read = 0
    for end in program.ends:
        read |= end.tokens
    measured, total = read.bit_count(), program.prompts.layout.n_tokens
    used = measured < total
    text = f"{measured} of {total} tokens are measured; what no measured token reads is not computed"
    return Remark("backward positions", used, text if used else "every token is measured")


def _columns(program: Program) -> Remark:
    name, vocabulary = "answer columns", program.dag.graph.d_vocab
    if program.columns is not None:
        return Remark(name, True, f"{len(program.columns)} of {vocabulary:,} logits a token are computed")
    return Remark(name, False, f"{_whole_vocabulary(program.experiment)} needs all {vocabulary:,} logits a token")


def _whole_vocabulary(experiment: Experiment) -> str:
    """The first metric that reads more than logits of answers."""
    for metric in experiment.metrics:
        for leaf in leaves(metric.expression):
            if not isinstance(leaf, NodeRead) and not (isinstance(leaf, Read) and leaf.measure is Measure.LOGIT):
                return f"`{metric.name}`"
    return "a metric"


def _heads(program: Program, needs: Demand) -> Remark:
    written = every = 0
    for i, op in enumerate(program.dag.ops):
        if isinstance(op, Core) and needs.tokens[i]:
            written += needs.tokens[i].bit_count() * needs.heads.get(i, 0).bit_count()
            every += needs.tokens[i].bit_count() * program.dag.graph.n_heads
    name = "heads"
    if not any(isinstance(op, Out) for op in program.dag.ops):
        return Remark(name, True, "no attention is computed again but in whole suffixes")
    if written == every:
        return Remark(name, False, "every head of a layer that is computed again is needed")
    return Remark(name, True, f"head rows computed again: {written:,}, of {every:,} of all heads of those layers")


def _suffixes(program: Program) -> Remark:
    n = sum(isinstance(op, Run) for op in program.dag.ops)
    name = "suffixes"
    if not n:
        return Remark(name, False, "no cell ends in the plain model: its paths name their nodes up to the logits")
    return Remark(name, True, f"paths end in the plain model, whose {n:,} runs are planned as one value each")


def _passes(program: Program, budget: int) -> Remark:
    size = f"{budget / 2**30:.3g} GiB" if budget >= 2**28 else f"{budget / 2**20:.3g} MiB"
    if program.n_passes <= 1:
        return Remark("one pass", True, "all cells fit into it")
    may = f"a pass may hold about {size}, and {MOST_ROWS:,} token rows"
    return Remark("one pass", False, f"{may}: the cells are cut into {program.n_passes} passes")
