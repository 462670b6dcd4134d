"""Compiled == hooks for values that are no world's own, and for what metrics read inside a run, prompt by prompt."""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor

from patchc.api import Model
from patchc.execute.hooks import Oracle
from patchc.execute.sweep import Sweep
from patchc.ir.experiment import (
    Cell,
    Continuation,
    Dim,
    Experiment,
    FromWorld,
    Itself,
    Mean,
    Measure,
    Metric,
    ModelChoice,
    Moved,
    NodeRead,
    Noise,
    Patch,
    Probe,
    Product,
    Prompts,
    Read,
    Sum,
    Value,
    World,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Alt, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.model.load import LoadedModel
from patchc.pipeline import to_program
from tests.models import D_VOCAB, loaded_model

TOLERANCE = 1e-4
KINDS = ["gpt2-sdpa", "native-rms-rotary", "neox-parallel", "gemma2"]


def worlds(rng: Random, layout: Layout) -> tuple[World, ...]:
    def ids(rows: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.randrange(D_VOCAB) for _ in range(n)) for n in rows)

    study = tuple(World(name, ids(layout.lengths)) for name in ("clean", "corrupt"))
    elsewhere = Layout((6, 5))
    return (*study, World("file", ids(elsewhere.lengths), elsewhere))


def followed(rng: Random) -> Prompts:
    """Two prompts, twice: 3 and 4 tokens, followed by the answers' tokens but their last."""
    layout = Layout((5, 5, 4, 4))
    clean, corrupt, file = worlds(rng, layout)

    def alike(world: World) -> World:
        first, second = world.ids[:2]
        third, fourth = (
            (*first[:3], *world.ids[2][3:]),
            (*second[:4], *world.ids[3][4:]),
        )
        return World(world.name, (first, second, third, fourth))

    return Prompts(layout, (alike(clean), alike(corrupt), file), copies=2, own=(3, 4, 3, 4))


def sites(g: ResidualGraph) -> dict[str, Step]:
    head, layer = g.members(g.heads)[1], g.blocks[g.members(g.heads)[1].block].nodes
    found = {
        "embed": Step(1),
        "out": Step(1 << head.id),
        "z": Step(layer & g.heads, site=Site.Z),
        **{site.value: Step(1 << head.id, site=site) for site in (Site.Q, Site.K, Site.V)},
        "attn_out": Step(layer, site=Site.ATTN_OUT),
        "stream": Step(g.below(2), site=Site.STREAM, rank=2),
        "pattern": Step(layer & g.heads, site=Site.PATTERN, tokens=0b1110, sources=0b110),
    }
    if g.mlps:
        mlp = g.members(g.mlps)[0]
        found |= {"mlp": Step(1 << mlp.id), "in": Step(1 << mlp.id, site=Site.IN)}
        found["post"] = Step(1 << mlp.id, site=Site.POST, neurons=0b101)
    return found


def values(prompts: Prompts, site: str) -> list[Value]:
    n, rows = prompts.layout.n_tokens, prompts.layout.n_prompts
    moved = tuple((t * 3 + 1) % n for t in range(n))
    sources = [
        Moved(FromWorld("corrupt"), moved),
        Moved(Mean("corrupt"), moved),
        Mean("corrupt"),
        Mean("corrupt", over_positions=True),
        Mean("corrupt", groups=tuple(i % 2 for i in range(rows))),
        Mean("file"),
        Mean("file", over_positions=True),
    ]
    if site == "pattern":  # rows keep their positions: only within prompts of one length
        sources = [Mean("corrupt"), Mean("corrupt", groups=tuple(i % 2 for i in range(rows)))]
    noisy = [((1.0, Itself()), (0.5, Noise(0.3, 7)))]
    if site != "pattern":
        noisy.append(((1.0, FromWorld("corrupt")), (2.0, Noise(0.4, 7, relative=True))))
    return [*(Value(((1.0, s),)) for s in sources), *(Value(terms) for terms in noisy)]


def experiment(cells: list[Patch], metrics: tuple[Metric, ...]) -> Experiment:
    numbered = tuple(Cell((i,), (patch,)) for i, patch in enumerate(cells))
    return Experiment("e", None, "clean", (Dim("cell", tuple(range(len(cells)))),), numbered, metrics)


def swept(m: LoadedModel, data: Prompts, e: Experiment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`[cell, prompt]` of each metric."""
    program = to_program(e, data, m, 1 << 30)
    outcome = Sweep(program, m.pieces, m.pieces.tables(data.layout), {}, tensors).run()
    return {name: numbers.per_prompt for name, numbers in outcome.numbers.items()}


def compare(m: LoadedModel, data: Prompts, e: Experiment, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    got = swept(m, data, e, tensors)
    want = Oracle(m.eager, m.graph, data, tensors=tensors).measure(e, e.cells)
    for name, numbers in want.items():
        assert got[name].shape == numbers.shape == (len(e.cells), data.n)
        gaps = (got[name] - numbers).abs().amax(-1)
        assert gaps.max() < TOLERANCE, (name, e.cells[int(gaps.argmax())])
    return want


def logit(data: Prompts) -> Metric:
    last = tuple(data.layout.offsets[i] + data.own_lengths[i] - 1 for i in range(data.n))
    return Metric("logit", Read(Measure.LOGIT, tuple((7,) for _ in last), last))


def continuation(data: Prompts, rng: Random) -> Metric:
    """Of the first copies and of the second; their difference."""
    parts: list[tuple[float, Continuation]] = []
    for copy, sign in ((0, 1.0), (1, -1.0)):
        rows = range(copy * data.n, (copy + 1) * data.n)
        tokens = tuple(
            tuple(range(data.layout.offsets[r] + data.own_lengths[r] - 1, data.layout.offsets[r + 1])) for r in rows
        )
        answers = tuple(tuple(rng.randrange(D_VOCAB) for _ in some) for some in tokens)
        parts.append((sign, Continuation(answers, tokens)))
    return Metric("further", Sum(tuple(parts)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("data", ["prompts", "followed"])
def test_values(kind: str, data: str) -> None:
    rng = Random(f"{kind} {data}")
    m, layout = loaded_model(kind), Layout((5, 5, 4))
    prompts = followed(rng) if data == "followed" else Prompts(layout, worlds(rng, layout))
    tail = (Star(Step(m.graph.all)), Step(m.graph.logits_set))
    patches = [
        Patch(Seq((step, *tail)), value) for site, step in sites(m.graph).items() for value in values(prompts, site)
    ]
    metrics = (logit(prompts), continuation(prompts, rng)) if data == "followed" else (logit(prompts),)
    want = compare(m, prompts, experiment(patches, metrics), {})
    assert want["logit"].std(0).min() > 100 * TOLERANCE


def probes(g: ResidualGraph) -> list[Probe]:
    head, mlps = g.members(g.heads)[-1], g.members(g.mlps)
    found = [Probe(1 << head.id, site) for site in (Site.OUT, Site.Z, Site.Q, Site.K, Site.V, Site.PATTERN)]
    found += [Probe(1 << head.id, Site.SCORES), Probe(g.blocks[head.block].nodes, Site.ATTN_OUT)]
    found += [Probe(g.below(r), Site.STREAM, r) for r in (1, g.top)]
    return found + [Probe(1 << mlps[-1].id, site) for site in (Site.OUT, Site.IN, Site.POST) if mlps]


def node_read(probe: Probe, data: Prompts, tensors: dict[str, Tensor], g: ResidualGraph) -> NodeRead:
    last = tuple(data.layout.offsets[i] + data.own_lengths[i] - 1 for i in range(data.n))
    if probe.site in (Site.PATTERN, Site.SCORES):
        return NodeRead(probe, last, sources=tuple(t - 1 for t in last))
    if probe.site is Site.POST:
        return NodeRead(probe, last, neuron=3)
    width = g.d_head if probe.site in (Site.Q, Site.K, Site.V, Site.Z) else g.d_model
    tensors[f"x{width}"] = torch.randn(width, generator=torch.Generator().manual_seed(width))
    return NodeRead(probe, last, key=f"x{width}")


def to_everything(g: ResidualGraph, found: list[Probe], start: Step, value: Value) -> Patch:
    ends = [Step(p.nodes, site=Site.STREAM if p.rank >= 0 else Site.OUT, rank=p.rank) for p in found]
    read = (
        [start] if any(p.nodes == start.nodes and p.site is start.site and p.rank == start.rank for p in found) else []
    )
    path = Seq((start, Star(Step(g.all)), Alt((Step(g.logits_set), *ends))))
    return Patch(Alt((path, *read)), value)


@pytest.mark.parametrize("kind", KINDS)
def test_probes(kind: str) -> None:
    """Every place beside the logits, in one experiment; values that enter at every site, read there themselves too."""
    rng, tensors = Random(kind), {}
    m, layout = loaded_model(kind), Layout((5, 4, 5))
    data = Prompts(layout, worlds(rng, layout))
    found = probes(m.graph)
    leaves = {f"{p.site}{p.nodes}": node_read(p, data, tensors, m.graph) for p in found}
    metrics = [Metric(name, leaf) for name, leaf in leaves.items()]
    first = next(iter(leaves.values()))
    metrics.append(Metric("both", Product((first, logit(data).expression))))
    metrics.append(Metric("between", first, zero="corrupt", one="clean"))
    corrupt = Value(((1.0, FromWorld("corrupt")),))
    starts = [*sites(m.graph).values(), *(Step(p.nodes, site=p.site, rank=p.rank) for p in found)]
    patches = [to_everything(m.graph, found, start, corrupt) for start in starts]
    want = compare(m, data, experiment(patches, tuple(metrics)), tensors)
    for name, numbers in want.items():
        assert numbers.std(0).max() > 10 * TOLERANCE, name


@pytest.mark.parametrize("read", ["resid_pre[1]", "resid_mid[1]", "resid_post[0]"])
def test_a_stream_that_is_read_where_a_value_with_self_enters(read: str) -> None:
    """Once, not twice: the value enters the very stream that is read."""
    m = Model(loaded_model("gpt2-sdpa"), ModelChoice("gpt2"))
    metric = f'measure dot({read} @ -1, tensor("w")) as d'
    spec = f"experiment e {{ run clean patch node {read} @ -1 with 2 * self + noise(std=1) {metric} }}"
    data = {"clean": [[1, 2, 3, 4]], "answer": [5]}
    results = m.compile(spec, data=data, tensors={"w": torch.ones(m.graph.d_model)}).run(check="all", progress=False)
    assert results["e"].check is not None
    assert results["e"].check.largest_effect > 1e-2
