"""Random small sweeps: cells of random patches on a random network, measured at random places; and how to run them."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from patchc.diagnostics import PatchcError
from patchc.execute.sweep import Sweep
from patchc.ir.experiment import Cell, Dim, Experiment, Measure, Metric, NodeRead, Patch, Probe, Prompts, Read
from patchc.ir.ops import Sum
from patchc.ir.paths import Path, Seq, Site, Star, Step
from patchc.ir.program import End, Program, Rates
from patchc.ir.tokens import Layout
from patchc.lower import Lowered, lower
from patchc.optimise import naive, optimise, reads
from patchc.optimise.course import Courses
from patchc.optimise.demand import demand
from patchc.optimise.passes import laws_without
from patchc.optimise.work import Counter, Work
from tests.drawn import VALUES, Draw, data, network
from tests.toy import D_HEAD, D_MODEL, VOCAB, Toy

RATES = Rates(dict.fromkeys(range(9), 8 * D_MODEL), D_HEAD * D_MODEL, D_HEAD * D_MODEL, 2 * D_HEAD, D_MODEL)


@dataclass(frozen=True)
class Drawn:
    """A network, its data and an experiment on it. The run is `clean`."""

    toy: Toy
    prompts: Prompts
    experiment: Experiment
    tensors: dict[str, Tensor]
    budget: int

    def program(self, without: Set[str] = frozenset()) -> Program:
        """The program that the optimiser makes without these passes, lowered without their laws."""
        return optimise(*self._lowered(without), self.budget, 8, without)

    def rewritten(self, names: Set[str]) -> Program:
        """The program that all passes make of what is lowered without the laws of these."""
        return optimise(*self._lowered(names), self.budget, 8)

    def before_passes(self, names: Set[str]) -> Program:
        """What is lowered without the laws of these, before any pass."""
        return naive(*self._lowered(names), self.budget, 8)

    def _lowered(self, without: Set[str]) -> tuple[Experiment, Prompts, Lowered, tuple[End, ...]]:
        ends = reads.ends(self.experiment.metrics, self.prompts)
        lowered = lower(self.experiment, self.prompts, self.toy.graph, ends, laws=laws_without(without))
        return self.experiment, self.prompts, lowered, ends

    def run(self, program: Program) -> Tensor:
        """`[metric, cell, prompt]`."""
        tables = self.toy.tables(self.prompts.layout)
        outcome = Sweep(program, self.toy, tables, tensors=self.tensors).run()
        return torch.stack([found.per_prompt for found in outcome.numbers.values()])

    def cost(self, program: Program) -> tuple[int, int]:
        """Planned, of the passes and of unembedding what they give: FLOPs, and numbers added up in streams."""
        done, counter, additions, cells = Work(), Counter(Courses(program.dag), program.base, program.schedule), 0, 0
        for work in program.passes:
            asked = program.reads(work.cells)
            done.add(counter.of_reads(asked))
            needs = demand(program.dag, asked, program.schedule)
            sums = ((op, needs.tokens[i]) for i, op in enumerate(program.dag.ops) if isinstance(op, Sum))
            additions += sum((len(op.parts) - 1) * tokens.bit_count() for op, tokens in sums)
            cells += len(work.cells)
        columns = VOCAB if program.columns is None else len(program.columns)
        logits = cells * program.measured.bit_count() * columns
        return done.flops(RATES) + logits * RATES.logit, additions


def drawn_sweep(seed: int, budget: int | None = None, kind: type[Toy] = Toy) -> Drawn:
    """Draws until the compiler takes it: it refuses a patch without effect, and two values at one start."""
    rng = Random(seed)
    while True:
        drawn = _drawn(rng, budget, kind)
        try:
            drawn.program()
        except PatchcError:
            continue
        return drawn


def _drawn(rng: Random, budget: int | None, kind: type[Toy]) -> Drawn:
    graph = network(rng)
    layout = Layout(tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([1, 2]))))
    prompts = data(rng, layout)
    draw = Draw(rng, graph, layout, inside=rng.random() < 0.5)
    draw.probe = draw.any_probe() if rng.random() < 0.3 else None
    cells = tuple(Cell((i,), patches) for i, patches in enumerate(_patches(rng, draw)))
    metrics, tensors = _metrics(rng, draw.probe, layout)
    experiment = Experiment("e", None, "clean", (Dim("i", tuple(range(len(cells)))),), cells, metrics)
    budget = rng.choice([1, 2000, 1 << 30]) if budget is None else budget
    return Drawn(kind(graph, rng.randrange(1000)), prompts, experiment, tensors, budget)


def _patches(rng: Random, draw: Draw) -> list[tuple[Patch, ...]]:
    """Those of each cell: a sweep over nodes, or what is inside them, or edges; or anything at all, some twice."""
    kind, n = rng.random(), rng.randint(2, 5)
    if kind < 0.3:
        return [(_anything_behind(draw, draw.start() if draw.inside else _node(rng, draw)),) for _ in range(n)]
    if kind < 0.6:
        return [(_anything_behind(draw, _node(rng, draw), _node(rng, draw)),) for _ in range(n)]
    some = [draw.cell().patches for _ in range(n)]
    return [*some, rng.choice(some)]


def _anything_behind(draw: Draw, *steps: Path) -> Patch:
    value = draw.rng.choice(VALUES[:2])
    return Patch(Seq((*steps, Star(Step(draw.graph.all)), Step(draw.graph.logits_set))), value)


def _node(rng: Random, draw: Draw) -> Step:
    return Step(1 << rng.randrange(len(draw.graph.nodes) - 1), tokens=draw.tokens(0.6))


def _metrics(rng: Random, probe: Probe | None, layout: Layout) -> tuple[tuple[Metric, ...], dict[str, Tensor]]:
    def tokens() -> tuple[int, ...]:
        return tuple(layout.offsets[i] + rng.randrange(n) for i, n in enumerate(layout.lengths))

    answers = tuple((rng.randrange(VOCAB),) for _ in layout.lengths)
    measure = rng.choice([Measure.LOGIT, Measure.LOGIT, Measure.PROB])
    metrics = [Metric("m", Read(measure, answers, tokens()))]
    if probe is not None:
        metrics.append(Metric("n", _read(probe, tokens(), tokens())))
    inner = probe is not None and probe.site in (Site.Q, Site.K, Site.V, Site.Z)
    generator = torch.Generator().manual_seed(rng.randrange(1000))
    return tuple(metrics), {"t": torch.randn(D_HEAD if inner else D_MODEL, generator=generator, dtype=torch.float64)}


def _read(probe: Probe, tokens: tuple[int, ...], sources: tuple[int, ...]) -> NodeRead:
    match probe.site:
        case Site.SCORES | Site.PATTERN:
            return NodeRead(probe, tokens, tuple(min(pair) for pair in zip(tokens, sources, strict=True)))
        case Site.POST:
            return NodeRead(probe, tokens, neuron=3)
        case _:
            return NodeRead(probe, tokens, key="t")
