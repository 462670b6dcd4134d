"""Values of certain prompts in a compiled graph: the numbers of the sweep, on traced models."""

from __future__ import annotations

from random import Random

import pytest
import torch

from patchc.codegen.emit import compiled_graph
from patchc.codegen.saved import load_saved, save_graph
from patchc.diagnostics import PatchcError
from patchc.execute.base import run_world
from patchc.execute.hooks import Oracle
from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.dag import Dag
from patchc.ir.experiment import (
    Blocked,
    Cell,
    Dim,
    Experiment,
    FromWorld,
    Itself,
    Mean,
    Moved,
    Noise,
    Patch,
    Prompts,
    Value,
    World,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.lower.fold import Fold
from patchc.lower.masked import lower_masked
from patchc.model.load import LoadedModel
from tests.models import D_VOCAB, loaded_model

TOLERANCE = 1e-4


def steps(g: ResidualGraph) -> list[Step]:
    some = g.members(g.heads)[1]
    return [
        Step(g.members(g.input)[0].id + 1),
        Step(1 << some.id),
        Step(g.heads & g.blocks[some.block].nodes, site=Site.Z, tokens=0b11010),
        Step(1 << some.id, site=Site.Q),
        Step(0b1100 << g.blocks[some.block].first, site=Site.K),
        Step(1 << some.id, site=Site.V),
        Step(g.blocks[some.block].nodes, site=Site.ATTN_OUT),
        Step(g.below(2), site=Site.STREAM, rank=2),
        *(Step(1 << n.id) for n in g.members(g.mlps)[:1]),
    ]


def prompts(own: tuple[int, ...] = (), lengths: tuple[int, ...] = (3, 3, 3)) -> Prompts:
    rng = Random(5)

    def world(name: str, layout: Layout | None = None) -> World:
        rows = (layout or Layout(lengths)).lengths
        return World(name, tuple(tuple(rng.randrange(D_VOCAB) for _ in range(n)) for n in rows), layout)

    return Prompts(Layout(lengths), (world("clean"), world("corrupt"), world("file", Layout((4, 3)))), own=own)


def one(source: Mean | Moved | Noise) -> Value:
    return Value(((1.0, source),))


MOVED = (4, 2, 0, 8, 3, 3, 1, 1, 5)
VALUES = [
    one(Moved(FromWorld("corrupt"), MOVED)),
    one(Mean("corrupt", groups=(0, 1, 0))),
    one(Moved(Mean("corrupt", groups=(0, 1, 0)), MOVED)),
    one(Mean("file")),
    one(Mean("file", over_positions=True)),
    one(Moved(Mean("file"), MOVED)),
    Value(((1.0, Itself()), (0.5, Noise(0.3, 1)))),
    Value(((0.5, Noise(2.0, 1, relative=True)), (0.5, FromWorld("corrupt")))),
]


def experiment(m: LoadedModel, values: list[Value]) -> Experiment:
    tail = (Star(Step(m.graph.all)), Step(m.graph.logits_set))
    patches = [Patch(Seq((step, *tail)), value) for step in steps(m.graph) for value in values]
    cells = tuple(Cell((i,), (patch,)) for i, patch in enumerate(patches))
    return Experiment("drawn", None, "clean", (Dim("cell", tuple(range(len(cells)))),), cells, ())


@pytest.mark.parametrize("own", [(), (2, 3, 2)], ids=["prompts", "followed"])
@pytest.mark.parametrize("kind", ["gpt2-sdpa", "native-rms-rotary"])
def test_graph_equals_sweep(kind: str, own: tuple[int, ...]) -> None:
    m, data = loaded_model(kind), prompts(own)
    e = experiment(m, VALUES)
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), {})
    dag = Dag(m.graph, data.layout)
    fold = Fold(dag, data, "clean")
    roots = [fold.cell(cell.patches).root for cell in e.cells]
    layouts = {w: w.layout or data.layout for w in data.worlds}
    runs = {w.name: run_world(m.pieces, w, n, m.pieces.tables(n)) for w, n in layouts.items()}
    ids = [torch.tensor(w.ids) for w in data.worlds[:2]]
    with torch.no_grad():
        stored = Stored(m.pieces, data, "clean", runs, {})
        swept = Walk(dag, m.pieces, m.pieces.tables(data.layout), stored, data.layout.all).streams(roots)
        base = runs["clean"].stream[-1]
        for i, expected in enumerate(swept):
            masks = torch.zeros(len(e.cells))
            masks[i] = 1.0
            got = graph(*ids, masks)[1]["stream"].flatten(0, 1)
            assert (got - expected).abs().max() < TOLERANCE, e.cells[i]
            assert (expected - base).abs().max() > 10 * TOLERANCE, e.cells[i]


def test_a_graph_with_such_values_can_be_saved(tmp_path) -> None:
    m, data = loaded_model("gpt2-sdpa"), prompts((2, 3, 2))
    graph = compiled_graph(lower_masked(experiment(m, VALUES), data, m.graph), m.pieces, ("clean", "corrupt"), {})
    loaded = load_saved(save_graph(graph, tmp_path / "g", m), m)
    ids = [torch.tensor(w.ids) for w in data.worlds[:2]]
    masks = torch.rand(graph.mask_shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(*ids, masks)[0], graph(*ids, masks)[0])


def test_values_of_certain_tokens_need_one_length() -> None:
    m, data = loaded_model("gpt2-sdpa"), prompts(lengths=(3, 2, 4))
    e = experiment(m, VALUES[:1])
    with pytest.raises(PatchcError) as caught:
        compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), {})
    assert caught.value.diagnostics[0].code == "graph-needs-one-length"


OVERLAPS = {
    Site.SCORES: ({"sources": 0b011011011}, {"sources": 0b110110110}, {"sources": 0b111111111}),
    Site.PATTERN: ({"sources": 0b011011011}, {"sources": 0b110110110}, {"sources": 0b111111111}),
    Site.POST: ({"neurons": 0b0111}, {"neurons": 0b1110}, {"neurons": 0b1111}),
}
BLOCKED = Value(((1.0, Blocked()),))
ENTERING = [Value(()), Value(((0.5, Itself()),)), Value(((1.0, FromWorld("corrupt")),))]


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "native-rms-rotary"])
@pytest.mark.parametrize(
    ("site", "value"),
    [*((s, v) for s in OVERLAPS for v in ENTERING), (Site.SCORES, BLOCKED)],
)
def test_starts_of_one_cell_that_overlap_are_set_once(kind: str, site: Site, value: Value) -> None:
    """Two starts that overlap are the start of both their places: at every mask in the graph, and in the hooks."""
    m, data = loaded_model(kind), prompts()
    node = next(n for n in m.graph.members(m.graph.mlps if site is Site.POST else m.graph.heads) if n.layer == 1)

    def patch(part: dict[str, int]) -> Patch:
        step = Step(1 << node.id, site=site, **part)
        return Patch(Seq((step, Star(Step(m.graph.all)), Step(m.graph.logits_set))), value)

    first, second, both = map(patch, OVERLAPS[site])
    cells = (Cell((0,), (first, second)), Cell((1,), (both,)), Cell((2,), (both,)))
    e = Experiment("overlap", None, "clean", (Dim("cell", (0, 1, 2)),), cells, ())
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), {})
    ids = [torch.tensor(w.ids) for w in data.worlds[:2]]

    def stream(*masks: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What the graph gives, and the gradient of its sum with respect to the masks."""
        given = torch.tensor(masks, dtype=torch.float32, requires_grad=True)
        out = graph(*ids, given)[1]["stream"].flatten(0, 1)
        return out.detach(), torch.autograd.grad(out.square().sum(), given)[0]

    expected = torch.cat(Oracle(m.eager, m.graph, data).logits(e, cells[0]))
    assert (m.pieces.unembed(stream(1, 0, 0)[0]) - expected).abs().max() < TOLERANCE
    assert (m.pieces.unembed(stream(0, 0, 0)[0]) - expected).abs().max() > TOLERANCE
    assert torch.allclose(stream(0.3, 0, 0)[0], stream(0, 0.3, 0)[0], atol=TOLERANCE)
    _, gradient = stream(0, 0, 0)
    assert torch.allclose(gradient[0], gradient[1], rtol=1e-3, atol=TOLERANCE)
    if value != BLOCKED:  # masks of different cells add up
        assert torch.allclose(stream(0, 0.5, 0.5)[0], stream(0, 1, 0)[0], atol=TOLERANCE)
        assert torch.allclose(stream(0.5, 0.5, 0)[0], stream(0, 1, 0)[0], atol=TOLERANCE)


def test_a_mean_over_shorter_data_is_that_of_the_sweep() -> None:
    """Positions that no row of the data has are left alone."""
    m, data = loaded_model("gpt2-sdpa"), prompts()
    data = Prompts(data.layout, (*data.worlds[:2], World("file", ((7, 8), (9, 1)), Layout((2, 2)))))
    node = m.graph.members(m.graph.heads)[1]
    step = Step(1 << node.id, tokens=0b010010010)
    patch = Patch(Seq((step, Star(Step(m.graph.all)), Step(m.graph.logits_set))), one(Mean("file")))
    e = Experiment("short", None, "clean", (Dim("cell", (0,)),), (Cell((0,), (patch,)),), ())
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), {})
    expected = torch.cat(Oracle(m.eager, m.graph, data).logits(e, e.cells[0]))
    with torch.no_grad():
        got = graph(*(torch.tensor(w.ids) for w in data.worlds[:2]), torch.ones(1))[1]["stream"].flatten(0, 1)
        assert (m.pieces.unembed(got) - expected).abs().max() < TOLERANCE
