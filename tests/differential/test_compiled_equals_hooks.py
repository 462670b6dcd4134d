"""Compiled == hooks on traced models of every supported kind: random node, edge, path and complement patches.

The hooks backend shares nothing with the compiler but the data that describe an experiment.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

import pytest
import torch
from torch import Tensor

from patchc.codegen.emit import compiled_graph
from patchc.execute.base import PlainRun, run_world
from patchc.execute.hooks import Oracle
from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.dag import Dag
from patchc.ir.experiment import Cell, Dim, Experiment, FromWorld, Given, Itself, Mean, Patch, Prompts, Value, World
from patchc.ir.paths import Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.lower.fold import Fold
from patchc.lower.masked import lower_masked
from patchc.model.load import LoadedModel, load
from tests import drawn
from tests.drawn import Draw
from tests.models import D_VOCAB, MODELS, loaded_model

TOLERANCE = 1e-4
CASES = 5
KINDS = list(MODELS)
"""Random cells of Gemma 2 pass the same norms."""
VALUES = (
    *drawn.VALUES,
    Value(((1.0, Mean("corrupt")),)),
    Value(((0.5, Mean("other", over_positions=True)), (0.5, Itself()))),
)


def prompts(rng: Random, lengths: tuple[int, ...]) -> Prompts:
    def ids() -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.randrange(D_VOCAB) for _ in range(n)) for n in lengths)

    clean, other = ids(), ids()
    corrupt = tuple(tuple(t if rng.random() < 0.4 else rng.randrange(D_VOCAB) for t in row) for row in clean)
    return Prompts(Layout(lengths), (World("clean", clean), World("corrupt", corrupt), World("other", other)))


def experiment(cells: list[Cell]) -> Experiment:
    numbered = tuple(Cell((i,), c.patches) for i, c in enumerate(cells))
    return Experiment("drawn", None, "clean", (Dim("cell", tuple(range(len(cells)))),), numbered, ())


def plain_runs(m: LoadedModel, data: Prompts) -> dict[str, PlainRun]:
    tables = m.pieces.tables(data.layout)
    return {w.name: run_world(m.pieces, w, data.layout, tables) for w in data.worlds}


def streams(m: LoadedModel, data: Prompts, e: Experiment, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """The final stream `[token, d_model]` of each cell, all in one pass."""
    dag = Dag(m.graph, data.layout)
    fold = Fold(dag, data, e.run)
    roots = [fold.cell(c.patches).root for c in e.cells]
    stored = Stored(m.pieces, data, e.run, plain_runs(m, data), tensors or {})
    walk = Walk(dag, m.pieces, m.pieces.tables(data.layout), stored, data.layout.all)
    return walk.streams(roots)


def compiled(m: LoadedModel, data: Prompts, e: Experiment, tensors: Mapping[str, Tensor] | None = None) -> list[Tensor]:
    """The logits `[token, d_vocab]` of each cell."""
    return [m.pieces.unembed(x) for x in streams(m, data, e, tensors)]


def left(m: LoadedModel, stream: Tensor) -> Tensor:
    """The tokens that are compared: all, but with norms after attention those at which something is left in the final
    stream, because elsewhere two norms make rounding large."""
    has_norms = any(b.post_norm for b in m.graph.blocks)
    return stream.norm(dim=-1) > (0.01 if has_norms else -1.0)


@torch.no_grad()
def must_agree(m: LoadedModel, data: Prompts, e: Experiment) -> None:
    """Both backends give the same logits, and some of the cells change them."""
    oracle, largest = Oracle(m.eager, m.graph, data), 0.0
    base = m.pieces.unembed(plain_runs(m, data)["clean"].stream[-1])
    for cell, stream in zip(e.cells, streams(m, data, e), strict=True):
        expected, got = torch.cat(oracle.logits(e, cell)), m.pieces.unembed(stream)
        assert torch.allclose(got[left(m, stream)], expected[left(m, stream)], rtol=0, atol=TOLERANCE), cell
        largest = max(largest, float((expected - base).abs().max()))
    assert largest > 100 * TOLERANCE  # two backends that do nothing agree too


def accepted(m: LoadedModel, data: Prompts, rng: Random, n: int) -> list[Cell]:
    """Random cells without a start of two values."""
    out: list[Cell] = []
    while len(out) < n:
        cell = Draw(rng, m.graph, data.layout, VALUES).cell()
        if not Fold(Dag(m.graph, data.layout), data, "clean").cell(cell.patches).faults:
            out.append(cell)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(5,), (4, 6)], ids=["one prompt", "two lengths"])
def test_random_cells(kind: str, lengths: tuple[int, ...]) -> None:
    rng = Random(f"{kind} {lengths}")
    m, data = loaded_model(kind), prompts(rng, lengths)
    e = experiment(accepted(m, data, rng, CASES))
    must_agree(m, data, e)


@pytest.mark.parametrize("kind", KINDS)
def test_graph_equals_sweep(kind: str) -> None:
    """One differentiable graph: a mask of one cell is that cell, no mask is the plain model, halves blend."""
    rng = Random(f"graph {kind}")
    m, data = loaded_model(kind), prompts(rng, (5, 5))
    corrupt = Value(((1.0, FromWorld("corrupt")),))
    tail = (Star(Step(m.graph.all)), Step(m.graph.logits_set))
    nodes = [Cell((), (Patch(Seq((Step(1 << n.id), *tail)), corrupt),)) for n in m.graph.members(m.graph.heads)]
    e = experiment(nodes + accepted(m, data, rng, 4))
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt", "other"), {})
    ids = [torch.tensor(w.ids) for w in data.worlds]
    with torch.no_grad():
        for i, stream in enumerate(streams(m, data, e)):
            masks = torch.zeros(len(e.cells))
            masks[i] = 1.0
            gap = graph(*ids, masks)[0].flatten(0, 1) - m.pieces.unembed(stream)
            assert torch.allclose(gap[left(m, stream)], torch.zeros(()), atol=TOLERANCE)
        out = m.eager(ids[0])
        plain = out if isinstance(out, Tensor) else out.logits
        assert (graph(*ids, torch.zeros(len(e.cells)))[0] - plain).abs().max() < TOLERANCE


SITES = {
    "head": lambda g: Step(1 << g.members(g.heads)[1].id),
    "embed": lambda g: Step(1),
    "attn_out": lambda g: Step(g.blocks[1].nodes, site=Site.ATTN_OUT),
    "stream": lambda g: Step(g.below(2), site=Site.STREAM, rank=2),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-sdpa", "native-attn-only", "gemma2"])
def test_means_and_tensors(kind: str, site: str) -> None:
    """The same numbers from the sweep, the graph and the hooks, for values that are no world's; biases included."""
    rng = Random(f"{kind} {site}")
    m, data = loaded_model(kind), prompts(rng, (5, 5))
    tensors = {"x": torch.randn(m.graph.d_model, generator=torch.Generator().manual_seed(0))}
    values = [
        Value(((1.0, Mean("corrupt")),)),
        Value(((1.0, Given("x")),)),
        Value(((0.5, Given("x")), (0.5, Itself()))),
        Value(((1.0, Itself()), (2.0, Given("x")))),
        Value(((0.5, Itself()),)),
    ]
    tail = (Star(Step(m.graph.all)), Step(m.graph.logits_set))
    e = experiment([Cell((), (Patch(Seq((SITES[site](m.graph), *tail)), v),)) for v in values])
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), tensors)
    oracle = Oracle(m.eager, m.graph, data, tensors=tensors)
    with torch.no_grad():
        for i, (cell, got) in enumerate(zip(e.cells, compiled(m, data, e, tensors), strict=True)):
            masks = torch.zeros(len(values))
            masks[i] = 1.0
            expected = torch.cat(oracle.logits(e, cell))
            assert (got - expected).abs().max() < TOLERANCE, values[i]
            out = graph(*(torch.tensor(w.ids) for w in data.worlds[:2]), masks)[0]
            assert (out.flatten(0, 1) - expected).abs().max() < TOLERANCE, values[i]


def test_mask_gradient_is_the_finite_difference() -> None:
    rng = Random(3)
    module = MODELS["gpt2-sdpa"]().double()
    m, data = load(module), prompts(rng, (4,))
    tail = (Star(Step(m.graph.all)), Step(m.graph.logits_set))
    corrupt = Value(((1.0, FromWorld("corrupt")),))
    e = experiment([Cell((), (Patch(Seq((Step(1 << n.id), *tail)), corrupt),)) for n in m.graph.members(m.graph.heads)])
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), {})
    ids = [torch.tensor(w.ids) for w in data.worlds[:2]]

    def metric(masks: Tensor) -> Tensor:
        return graph(*ids, masks)[0][0, -1, 7]

    masks = torch.rand(len(e.cells), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(metric(masks), masks)
    step = 1e-5 * torch.eye(len(e.cells), dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack([(metric(masks + s) - metric(masks - s)) / 2e-5 for s in step])
    assert (gradient - differences).abs().max() < 1e-6
    assert gradient.abs().max() > 1e-3
