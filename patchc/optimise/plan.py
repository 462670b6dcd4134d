"""A program as numbers and remarks: what will run, what it costs, and which optimisation applied or why it could not.

Nothing runs for it. How a plan is printed is `report.plans`' matter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from patchc.ir.dag import Dag
from patchc.ir.experiment import Probe
from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.ops import (
    Const,
    Core,
    Entries,
    HeadZ,
    Neurons,
    Out,
    PostNorm,
    Projected,
    Run,
    StoredZ,
    Tokenwise,
    VariantId,
)
from patchc.ir.paths import Site
from patchc.ir.program import Program, Rates
from patchc.ir.tokens import Layout
from patchc.optimise.contract import Remark
from patchc.optimise.course import Courses
from patchc.optimise.memory import Live, plain_run_bytes, readout_bytes
from patchc.optimise.passes import remarks
from patchc.optimise.work import Counter as WorkCounter
from patchc.optimise.work import Work


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs of multiplications with weights and of attention, and bytes at the fullest moment beside the model."""

    passes: int
    plain_runs: int
    unembedding: int
    unfused: int
    """A forward pass a cell, each a lean one: the metrics' columns at their positions only."""
    bytes: int
    copied: int
    """Bytes of weights held a second time beside the model's, from loading on."""

    @property
    def flops(self) -> int:
        """Of the whole run."""
        return self.passes + self.plain_runs + self.unembedding


@dataclass(frozen=True, slots=True)
class Plan:
    """What an experiment will run; counts are over all passes."""

    experiment: str
    run: str
    dims: tuple[tuple[str, int], ...]
    metrics: tuple[str, ...]
    n_cells: int
    n_passes: int
    no_effect: int
    worlds: tuple[str, ...]
    variants: dict[str, int]
    """How many variants of each class of node there are, in words."""
    rows: dict[str, int]
    """Token rows that each block computes."""
    plain_rows: int
    """Token rows that a block computes in one plain run: a cell run alone costs this at every block."""
    columns: int | None
    measured_tokens: int
    cost: Cost
    remarks: tuple[Remark, ...]
    read_inside: dict[str, int]
    """How many tokens metrics read at each place in the model."""


def plan(program: Program, rates: Rates) -> Plan:
    """Describe a program."""
    dag = program.dag
    rows: Counter[int] = Counter()
    for work in program.passes:
        rows.update(dict(enumerate(work.rows)))
    return Plan(
        program.experiment.name,
        program.experiment.run,
        tuple((d.name, len(d.coords)) for d in program.experiment.dims),
        tuple(m.name for m in program.experiment.metrics),
        len(program.roots),
        program.n_passes,
        len(program.no_effect),
        program.worlds,
        _classes(dag),
        {block_name(dag, i): rows[i] for i in sorted(rows) if rows[i]},
        program.prompts.layout.n_tokens,
        None if program.columns is None else len(program.columns),
        program.measured.bit_count(),
        _cost(program, rates),
        remarks(program),
        {place_name(dag.graph, e.probe): e.tokens.bit_count() for e in program.ends if e.probe is not None},
    )


def place_name(graph: ResidualGraph, probe: Probe) -> str:
    """A place that a metric reads, as a spec writes it."""
    if probe.site is Site.STREAM:
        return graph.stream_name(probe.rank)
    node = graph.members(probe.nodes)[0]
    if probe.site is Site.ATTN_OUT:
        return f"attn_out[{node.layer}]"
    return node.name if probe.site is Site.OUT else f"{node.name}.{probe.site}"


def block_name(dag: Dag, index: int) -> str:
    block = dag.graph.blocks[index]
    return f"attention {block.layer}" if block.kind is BlockKind.ATTENTION else f"mlp {block.layer}"


# ---- variants by class of node


def _classes(dag: Dag) -> dict[str, int]:
    found: Counter[str] = Counter(_class_of(dag, i) for i in range(1, len(dag.ops)))
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _class_of(dag: Dag, i: VariantId) -> str:
    match dag.ops[i]:
        case Const(block):
            return {
                BlockKind.ATTENTION: "heads, stored values",
                BlockKind.MLP: "MLPs, stored values",
                BlockKind.EMBED: "embeddings, stored values",
            }[dag.graph.blocks[block].kind]
        case Core() as core if core.is_base(0, 1, 2):
            return "attention, scores or patterns set"
        case Core():
            return "attention, computed again"
        case Projected() | HeadZ() | StoredZ() | Entries():
            return "insides of heads, read by metrics"
        case Neurons():
            return "neurons, read by metrics"
        case Out():
            return "heads, written again"
        case PostNorm():
            return "attention outputs, normalised again"
        case Tokenwise(_, 0):
            return "neurons, stored values"
        case Tokenwise():
            return "MLPs, computed again"
        case Run():
            return "rest of the model, run as it is"
        case _:
            return "streams and their sums"


# ---- cost


def _cost(program: Program, rates: Rates) -> Cost:
    element, schedule = program.element, program.schedule
    courses = Courses(program.dag)
    counter, live = WorkCounter(courses, program.base, schedule), Live(courses, element, schedule)
    done, peak = Work(), 0
    for work in program.passes:
        reads = program.reads(work.cells)
        done.add(counter.of_reads(reads))
        peak = max(peak, live.peak(reads))
    graph, prompts = program.dag.graph, program.prompts
    columns = graph.d_vocab if program.columns is None else len(program.columns)
    logits = program.measured.bit_count() * columns
    layouts = [program.layout_of(world) for world in program.worlds]
    plain = {layout: _plain_run(program, layout).flops(rates) for layout in {*layouts, prompts.layout}}
    tokens = sum(layout.n_tokens for layout in layouts)
    cells = sum(len(work.cells) for work in program.passes)
    return Cost(
        done.flops(rates),
        sum(plain[layout] for layout in layouts),
        (cells + len(program.aligned)) * logits * rates.logit,
        len(program.roots) * (plain[prompts.layout] + logits * rates.logit),
        plain_run_bytes(graph, tokens, element, rates.prepared)
        + max(peak, readout_bytes(cells * program.measured.bit_count(), columns, element)),
        rates.copied,
    )


def _plain_run(program: Program, layout: Layout) -> Work:
    """What a world's own run computes."""
    return WorkCounter(Courses(Dag(program.dag.graph, layout)), program.base).plain()
