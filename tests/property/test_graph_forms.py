"""Compiled graphs with masks for whole models: the same numbers however masks are multiplied, at most so many FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import patchc
from patchc.api import Model
from patchc.codegen.emit import CompiledGraph, compiled_graph
from patchc.diagnostics import PatchcError
from patchc.ir.experiment import (
    Cell,
    Dim,
    Experiment,
    FromWorld,
    Given,
    Itself,
    Mean,
    Noise,
    Patch,
    Prompts,
    Value,
    World,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import EVERYWHERE, Path, Seq, Star, Step
from patchc.ir.tokens import Layout
from patchc.lower import masked
from patchc.lower.every import Every, lower_every
from patchc.lower.masked import MaskedCells, lower_masked
from patchc.model.load import LoadedModel
from tests.models import D_VOCAB, gemma2, gpt2, llama, loaded_model

TOLERANCE = 1e-5
KINDS = ["gpt2-sdpa", "llama-sdpa", "neox-parallel", "native-rms-rotary", "gemma2"]
CORRUPT = Value(((1.0, FromWorld("corrupt")),))
VALUES = [
    CORRUPT,
    Value(()),
    Value(((1.0, Mean("corrupt")),)),
    Value(((0.5, Itself()), (0.5, FromWorld("corrupt")))),
    Value(((1.0, Itself()), (0.5, Noise(0.3, 1)))),
    Value(((1.0, Given("v")),)),
]


def prompts() -> Prompts:
    rng = Random(5)
    rows = [[tuple(rng.randrange(D_VOCAB) for _ in range(4)) for _ in range(2)] for _ in range(2)]
    return Prompts(Layout((4, 4)), (World("clean", tuple(rows[0])), World("corrupt", tuple(rows[1]))))


IDS = [torch.tensor(world.ids) for world in prompts().worlds]


def asking(value: Value = CORRUPT) -> Experiment:
    """An experiment whose value is this one."""
    cell = Cell((), (Patch(Step(1), value),))
    return Experiment("asked", None, "clean", (), (cell,), ())


def graph_of(m: LoadedModel, cells: MaskedCells, form: str) -> CompiledGraph:
    tensors = {"v": torch.linspace(-1, 1, m.graph.d_model)}
    return compiled_graph(cells, m.pieces, ("clean", "corrupt"), tensors, form=form)


def logits(graph: CompiledGraph, masks: Tensor) -> Tensor:
    with torch.no_grad():
        return graph(*IDS, masks)[0]


def drawn(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# ---- forms
@pytest.mark.parametrize(("kind", "by_position"), [*((kind, False) for kind in KINDS), ("llama-sdpa", True)])
@pytest.mark.parametrize("every", [Every.NODE, Every.EDGE])
def test_every_mask_from_the_base_run_to_the_value(kind: str, every: Every, by_position: bool) -> None:
    m = loaded_model(kind)
    cells = lower_every(asking(), prompts(), m.graph, every, by_position)
    n = len(m.graph.writers) if every is Every.NODE else m.graph.n_edges
    assert cells.shape == ((n, 4) if by_position else (n,))
    assert len(set(cells.starts)) == n
    graph = graph_of(m, cells, "cost")
    with torch.no_grad():
        base, other = (m.eager(ids) for ids in IDS)
        base, other = (getattr(x, "logits", x) for x in (base, other))
    assert (logits(graph, torch.zeros(cells.shape)) - base).abs().max() < TOLERANCE
    assert (logits(graph, torch.ones(cells.shape)) - other).abs().max() < TOLERANCE
    assert (base - other).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("every", [Every.NODE, Every.EDGE])
@pytest.mark.parametrize("number", range(len(VALUES)))
def test_forms_are_equal(number: int, every: Every) -> None:
    m, by_position = loaded_model(KINDS[number % len(KINDS)]), number % 3 == 1
    cells = lower_every(asking(VALUES[number]), prompts(), m.graph, every, by_position)
    dense, sparse = (graph_of(m, cells, form) for form in ("dense", "sparse"))
    masks = drawn(cells.shape, number)
    assert (logits(dense, masks) - logits(sparse, masks)).abs().max() < TOLERANCE
    assert (logits(dense, masks) - logits(dense, masks / 2)).abs().max() > 10 * TOLERANCE


# ---- cells
def edge_path(g: ResidualGraph, writer: int, reader: int, ports: int, tokens: int) -> Path:
    tail = (Star(Step(g.all)), Step(g.logits_set)) if reader != g.logits_set else ()
    return Seq((Step(writer, tokens=tokens), Step(reader, ports=ports), *tail))


def edge_cells(g: ResidualGraph, seed: int) -> Experiment:
    """Some edges, a cell each or several together, some at one position, with two values."""
    rng = Random(seed)
    patches: list[Patch] = []
    for _, writer in rng.sample(g.writers, 5):
        rank = g.members(writer)[0].rank
        above = [r for r in g.readers if r.node.rank > rank]
        for reader in rng.sample(above, min(4, len(above))):
            ports = 7 if reader.port is None else 1 << reader.port
            tokens = rng.choice([EVERYWHERE, EVERYWHERE, 0b0100_0100, 0b0000_0010])
            path = edge_path(g, writer, 1 << reader.node.id, ports, tokens)
            patches.append(Patch(path, rng.choice(VALUES[:4])))
    cells = [Cell((i,), (patch,)) for i, patch in enumerate(patches[:-3])]
    cells.append(Cell((len(cells),), tuple(patches[-3:])))
    return Experiment("drawn", None, "clean", (Dim("cell", tuple(range(len(cells)))),), tuple(cells), ())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(2))
def test_edges_built_one_by_one_are_the_folded_ones(kind: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m = loaded_model(kind)
    e = edge_cells(m.graph, seed)
    folded = lower_masked(e, prompts(), m.graph)
    monkeypatch.setattr(masked, "FOLDED", 0)
    monkeypatch.setattr(masked, "MAX_CELLS", 0)
    built = lower_masked(e, prompts(), m.graph)
    masks = drawn(folded.shape, seed)
    expected = logits(graph_of(m, folded, "sparse"), masks)
    for form in ("sparse", "dense", "cost"):
        assert (logits(graph_of(m, built, form), masks) - expected).abs().max() < TOLERANCE
        assert (logits(graph_of(m, folded, form), masks) - expected).abs().max() < TOLERANCE
    assert (logits(graph_of(m, built, "cost"), masks * 0) - expected).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("build", [gpt2, gemma2])
def test_a_mask_of_every_edge_is_that_edge(build: Callable[[], nn.Module]) -> None:
    """Against the sweep, cell by cell, which is itself held against hooks."""
    compiled = small(build).compile(EDGES, TEXTS)
    values = compiled.run(progress=False, check=10)["e"]["diff"]
    graph = small(build).compile(EDGES, TEXTS, masks="edge").graph
    for name in Random(0).sample(graph.starts, 12):
        w, r = name.split(" -> ")
        masks = torch.zeros(graph.mask_shape)
        masks[graph.starts.index(f"{w} -> {r}")] = 1
        found = float(values.sel(w=w, r=r))
        assert diff(graph, masks).item() == pytest.approx(found, abs=1e-5)


# ---- gradients
TEXTS = {"clean": [[1, 2, 3, 4], [5, 6, 7, 8]], "corrupt": [[1, 9, 3, 4], [5, 6, 10, 8]]}
TEXTS |= {"answer": [11, 12], "wrong": [13, 14]}  # type: ignore[dict-item]
DIFF = "metric diff = logit(answer) - logit(wrong)\n"
ONE = f"{DIFF}experiment e {{ run clean patch edge head[0, 1] -> mlp[1] with corrupt measure diff }}"
EDGES = f"""{DIFF}
experiment e {{ for w in writers, r in readers run clean patch edge w -> r with corrupt measure diff }}"""


@cache
def small(build: Callable[[], nn.Module] = gpt2) -> Model:
    return patchc.load(build())


def diff(graph: CompiledGraph, masks: Tensor) -> Tensor:
    ids = [torch.tensor(TEXTS[world]) for world in graph.worlds]
    last, rows = graph(*ids, masks)[0][:, -1], torch.arange(2)
    return (last[rows, [11, 12]] - last[rows, [13, 14]]).mean()


@pytest.mark.parametrize("at", [0.0, 0.6])
def test_gradients_of_every_edge_are_slopes(at: float) -> None:
    graph = small().compile(ONE, TEXTS, masks="edge").graph.double()
    masks = torch.full(graph.mask_shape, at, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(diff(graph, masks), masks)
    assert bool(gradient.isfinite().all())
    assert (gradient != 0).float().mean() > 0.8
    with torch.no_grad():
        for i in range(0, gradient.numel(), 7):
            step = torch.zeros_like(masks)
            step[i] = 1e-4
            slope = (diff(graph, masks + step) - diff(graph, masks - step)) / 2e-4
            assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)
    small.cache_clear()  # the module's own weights were made double


def test_gradients_pass_a_norm_after_attention() -> None:
    """Which this model computes in single precision, whatever it is asked for: steps are large, and slopes less
    exact."""
    graph = small(gemma2).compile(ONE, TEXTS, masks="edge").graph
    masks = torch.full(graph.mask_shape, 0.6, requires_grad=True)
    (gradient,) = torch.autograd.grad(diff(graph, masks), masks)
    with torch.no_grad():
        for i in range(0, gradient.numel(), 11):
            step = torch.zeros_like(masks)
            step[i] = 0.02
            slope = (diff(graph, masks + step) - diff(graph, masks - step)) / 0.04
            assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-2, abs=1e-4)
    assert gradient.abs().max() > 1e-2


# ---- what a graph costs
def flops(model: Model, **options: object) -> float:
    """FLOPs of a graph over those of the eager forward."""
    graph = model.compile(ONE, TEXTS, **options).graph  # type: ignore[arg-type]
    ids = [torch.tensor(TEXTS[world]) for world in graph.worlds]
    with torch.no_grad(), FlopCounterMode(display=False) as ours:
        graph(*ids, torch.ones(graph.mask_shape))
    with torch.no_grad(), FlopCounterMode(display=False) as eager:
        model.loaded.eager(ids[0])
    return ours.get_total_flops() / eager.get_total_flops()


@cache
def deep() -> Model:
    return patchc.load(gpt2(n_layer=4, n_embd=64, vocab_size=400))


def test_nothing_patched_costs_a_forward_pass() -> None:
    assert flops(deep(), masks="none") <= 1.05
    assert flops(patchc.load(llama()), masks="none") <= 1.05


def test_one_edge_costs_what_it_reads() -> None:
    """The other world below the edge, the base run up to it, and the run from there."""
    assert flops(deep()) <= 1.3


def test_captures_cost_only_those_who_ask() -> None:
    assert flops(deep(), captures=True) > flops(deep())


@pytest.mark.parametrize(("masks", "most"), [("node", 1.95), ("edge", 2.5)])
def test_masks_everywhere_cost_two_runs_and_their_product(masks: str, most: float) -> None:
    assert flops(deep(), masks=masks) <= most


def test_weights_are_the_models_own() -> None:
    graph = small().compile(ONE, TEXTS, masks="edge").graph
    own = {t.untyped_storage().data_ptr() for t in small().loaded.eager.parameters()}
    assert {t.untyped_storage().data_ptr() for t in graph.parameters()} <= own
    assert sum(t.numel() for t in graph.buffers() if t.untyped_storage().data_ptr() not in own) < 4000


# ---- files and mistakes
@pytest.mark.parametrize("masks", ["none", "node", "edge by position"])
def test_masks_for_a_model_can_be_saved(masks: str, tmp_path) -> None:
    compiled = small().compile(ONE, TEXTS, masks=masks)  # type: ignore[arg-type]
    graph, loaded = compiled.graph, patchc.load_graph(compiled.save(tmp_path), small())
    assert (loaded.starts, loaded.form, loaded.mask_shape) == (graph.starts, graph.form, graph.mask_shape)
    ids = [torch.tensor(TEXTS[world]) for world in graph.worlds]
    with torch.no_grad():
        assert torch.equal(loaded(*ids, drawn(graph.mask_shape))[0], graph(*ids, drawn(graph.mask_shape))[0])


def test_masks_of_one_run_need_one_value() -> None:
    two = "experiment e { run clean patch node mlp[0] with zero patch node mlp[1] with corrupt measure loss }"
    with pytest.raises(PatchcError) as caught:
        _ = small().compile(two, TEXTS, masks="edge").graph
    assert caught.value.diagnostics[0].code == "masks-need-one-value"


@pytest.mark.parametrize("form", ["cell", "edge", "edge by position"])
def test_masks_of_another_shape_are_refused(form: str) -> None:
    graph = small().compile(ONE, TEXTS, masks=form).graph  # type: ignore[arg-type]
    ids = [torch.tensor(TEXTS[world]) for world in graph.worlds]
    right = torch.zeros(graph.mask_shape)
    graph(*ids, right)
    for wrong in (torch.zeros(2, *graph.mask_shape), torch.zeros(7), right.bool(), 1.0):
        with pytest.raises(PatchcError) as caught:
            graph(*ids, wrong)
        assert caught.value.diagnostics[0].code == "bad-masks"
