"""Starts inside nodes, on every kind of model, against identities that need no second implementation of the backend."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from patchc.diagnostics import PatchcError
from patchc.execute.hooks import Oracle
from patchc.execute.noise import token_noise
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Moved, Noise, Patch, Probe, Prompts, Source, Value
from patchc.ir.graph import BlockKind, Kind, Node, ResidualGraph
from patchc.ir.paths import Site, Step
from tests.models import MODELS
from tests.unit.oracle_models import (
    CORRUPT,
    DRIVERS,
    Fixture,
    cell,
    experiment,
    graph_of,
    largest_difference,
    prompts,
    to_logits,
)

TOLERANCE = 5e-6
SELF = Value(((1.0, Itself()),))


GRAPHS: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"has_pos_embed": False, "has_attn_bias": False, "n_kv_heads": 2},
    "native-ln": {},
    "native-rms-rotary": {"has_pos_embed": False, "n_kv_heads": 2},
    "native-attn-only": {"has_mlp": False},
    "neox-parallel": {"has_pos_embed": False, "parallel": True},
    "gemma2": {"has_pos_embed": False, "has_attn_bias": False, "n_kv_heads": 2, "post_norm": True},
    "gemma3": {"has_pos_embed": False, "has_attn_bias": False, "n_kv_heads": 2, "post_norm": True},
}
"""What the graphs of the kinds of models have of their own."""


class Model:
    """A model of `tests.models` under the backend."""

    def __init__(self, kind: str, data: Prompts, driver: str = "auto", **given: Any):
        self.graph: ResidualGraph = graph_of(kind, 4, **GRAPHS[kind.removesuffix("-sdpa").removesuffix("-eager")])
        self.data = data
        self.oracle = Oracle(MODELS[kind](), self.graph, data, driver=driver, **given)

    def logits(self, *patches: Patch) -> list[Tensor]:
        return self.oracle.logits(experiment(), cell(*patches))

    def start(self, nodes: int, site: Site, value: Value | Source, **step: int) -> Patch:
        whole = value if isinstance(value, Value) else Value(((1.0, value),))
        return Patch(to_logits(self.graph, Step(nodes, site=site, **step)), whole)

    def read(self, probe: Probe, *patches: Patch) -> Tensor:
        return self.oracle.read(experiment(), cell(*patches), probe)

    def head(self, layer: int = 1, number: int = 1) -> Node:
        node = self.graph.node(Kind.HEAD, layer, number)
        assert node is not None
        return node

    def heads(self, layer: int) -> int:
        block = self.graph.layer_block(BlockKind.ATTENTION, layer)
        assert block is not None
        return block.nodes & self.graph.heads


@cache
def model_of(kind: str) -> Model:
    return Model(kind, prompts(5, 4, 5), tensors={"one": torch.tensor([1.0]), "three": torch.tensor([3.0])})


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return model_of(request.param)


@pytest.mark.parametrize("site", [Site.SCORES, Site.PATTERN])
def test_what_would_be_there_changes_nothing(model: Model, site: Site) -> None:
    assert largest_difference(model.logits(model.start(model.graph.heads, site, SELF)), model.logits()) < TOLERANCE


def test_the_other_worlds_pattern_is_its_scores(model: Model) -> None:
    """One layer's scores make its pattern, and nothing above it knows by which of the two it was set."""
    by_scores, by_pattern = (
        model.logits(model.start(model.heads(1), site, CORRUPT)) for site in (Site.SCORES, Site.PATTERN)
    )
    assert largest_difference(by_scores, by_pattern) < TOLERANCE
    assert largest_difference(by_scores, model.logits()) > 1e-3


def test_queries_and_keys_make_the_scores(model: Model) -> None:
    """q and k of another world together are that world's scores, rotated or not."""
    by_scores = model.logits(model.start(model.heads(1), Site.SCORES, CORRUPT))
    both = [model.start(model.heads(1), site, CORRUPT) for site in (Site.Q, Site.K)]
    assert largest_difference(model.logits(*both), by_scores) < TOLERANCE


def test_pattern_and_values_make_z(model: Model) -> None:
    by_z = model.logits(model.start(model.heads(1), Site.Z, CORRUPT))
    both = [model.start(model.heads(1), site, CORRUPT) for site in (Site.PATTERN, Site.V)]
    assert largest_difference(model.logits(*both), by_z) < TOLERANCE


def test_a_blocked_entry_leaves_the_rest_of_its_row_in_proportion(model: Model) -> None:
    node, layout = model.head(), model.data.layout
    asks, looked_at = layout.at(3), layout.at(1)
    patch = model.start(1 << node.id, Site.SCORES, Blocked(), tokens=asks, sources=looked_at)
    probe = Probe(1 << node.id, Site.PATTERN)
    want = model.read(probe)
    for token in layout.numbers(asks):
        want[token, 1] = 0.0
        want[token] /= want[token].sum()
    ends = Patch(Step(1 << node.id, site=Site.SCORES, tokens=asks, sources=looked_at), patch.value)
    assert (model.read(probe, ends) - want).abs().max() < TOLERANCE
    assert largest_difference(model.logits(patch), model.logits()) > 1e-4


def test_a_head_that_may_look_at_nothing_gives_nothing(model: Model) -> None:
    node = model.head()
    blocked = model.start(1 << node.id, Site.SCORES, Blocked())
    no_pattern = model.start(1 << node.id, Site.PATTERN, Value(()))
    zero = model.start(1 << node.id, Site.OUT, Value(()))
    assert largest_difference(model.logits(blocked), model.logits(zero)) < TOLERANCE
    assert largest_difference(model.logits(no_pattern), model.logits(zero)) < TOLERANCE
    assert all(bool(x.isfinite().all()) for x in model.logits(blocked))


def test_what_is_hidden_stays_hidden(model: Model) -> None:
    """A row moved to an earlier token looks no further than that token does; nor does noise."""
    node, layout = model.head(), model.data.layout
    last = tuple(layout.token(layout.place(t)[0], -1) for t in range(layout.n_tokens))
    moved = Moved(FromWorld("clean"), last)
    before = model.read(Probe(1 << node.id, Site.PATTERN))
    for source in (moved, Noise(1.0, 0)):
        start = Step(1 << node.id, site=Site.PATTERN)
        after = model.read(Probe(1 << node.id, Site.PATTERN), Patch(start, Value(((1.0, source),))))
        assert not bool(after[before == 0].any())
        assert (after - before).abs().max() > 1e-2
    assert (model.read(Probe(1 << node.id, Site.PATTERN), Patch(start, Value(((1.0, moved),))))[0, 0]) == pytest.approx(
        before[last[0], 0].item()
    )


def test_a_pattern_at_one_token_changes_that_row_alone(model: Model) -> None:
    node, layout = model.head(), model.data.layout
    step = Step(1 << node.id, site=Site.PATTERN, tokens=layout.at(2), sources=layout.at(0) | layout.at(1))
    probe = Probe(1 << node.id, Site.Z)
    changed = (model.read(probe, Patch(step, Value(()))) - model.read(probe)).abs().amax(1) > 1e-6
    assert changed.tolist() == [position == 2 for _, position in map(layout.place, range(layout.n_tokens))]


def test_the_pattern_is_set_after_the_scores_and_before_the_output(model: Model) -> None:
    node = 1 << model.head().id
    blocked, pattern, out = (
        model.start(node, site, value)
        for site, value in ((Site.SCORES, Blocked()), (Site.PATTERN, CORRUPT), (Site.OUT, Value(())))
    )
    assert largest_difference(model.logits(blocked, pattern), model.logits(pattern)) < TOLERANCE
    assert largest_difference(model.logits(pattern, out), model.logits(out)) == 0.0
    assert largest_difference(model.logits(pattern), model.logits(out)) > 1e-4


# ---- MLPs


WITH_MLP = [kind for kind in MODELS if kind != "native-attn-only"]


@pytest.mark.parametrize("kind", WITH_MLP)
def test_all_neurons_are_the_output_and_so_is_the_input(kind: str) -> None:
    model = model_of(kind)
    mlps = model.graph.mlps
    by_out = model.logits(model.start(mlps, Site.OUT, CORRUPT))
    assert largest_difference(model.logits(model.start(mlps, Site.POST, CORRUPT)), by_out) < TOLERANCE
    assert largest_difference(model.logits(model.start(mlps, Site.IN, CORRUPT)), by_out) < TOLERANCE
    assert largest_difference(by_out, model.logits()) > 1e-3
    some, rest = 0b1011, -1 & ~0b1011
    two = [model.start(mlps, Site.POST, CORRUPT, neurons=neurons) for neurons in (some, rest)]
    assert largest_difference(model.logits(*two), by_out) < TOLERANCE
    assert largest_difference(model.logits(two[0]), by_out) > 1e-4


@pytest.mark.parametrize("kind", [kind for kind in WITH_MLP if not kind.startswith("gemma")])
def test_a_neuron_writes_its_row_of_the_output_matrix(kind: str) -> None:
    """The last MLP, written as a difference of outputs: linear in the neuron, where no norm follows."""
    model = model_of(kind)
    mlp = model.graph.node(Kind.MLP, model.graph.n_layers - 1)
    assert mlp is not None
    probe = Probe(1 << mlp.id)

    def at(value: Value) -> Tensor:
        return model.read(probe, Patch(Step(1 << mlp.id, site=Site.POST, neurons=1 << 7), value))

    zero, one, three = at(Value(())), at(Value(((1.0, Given("one")),))), at(Value(((1.0, Given("three")),)))
    row = (one - zero)[0]
    assert row.abs().max() > 1e-3
    assert ((three - zero) - 3 * row).abs().max() < TOLERANCE
    activation = model.read(Probe(1 << mlp.id, Site.POST))[:, 7]
    assert (model.read(probe) - zero - activation[:, None] * row).abs().max() < TOLERANCE


def test_an_mlps_input_is_no_part_of_the_stream() -> None:
    model = model_of("gpt2-sdpa")
    mlp = model.graph.node(Kind.MLP, 0)
    assert mlp is not None
    start = model.start(1 << mlp.id, Site.IN, CORRUPT)
    below = Probe(model.graph.below(mlp.rank), Site.STREAM, mlp.rank)
    ends = Patch(Step(below.nodes, site=Site.STREAM, rank=below.rank), CORRUPT)
    assert torch.equal(model.read(below, start), model.read(below))
    assert (model.read(below, ends) - model.read(below)).abs().max() > 1e-2


# ---- noise and other tokens


@pytest.mark.parametrize(("site", "kind"), [(Site.OUT, Kind.EMBED), (Site.OUT, Kind.HEAD), (Site.Q, Kind.HEAD)])
def test_noise_is_added_number_by_number(site: Site, kind: Kind) -> None:
    model = model_of("gpt2-sdpa")
    node = next(n for n in model.graph.nodes if n.kind is kind)
    noise, probe = Noise(0.5, 3), Probe(1 << node.id, site)
    name = {Site.OUT: node.name, Site.Q: f"{node.name}.q"}[site]
    base = model.read(probe)
    numbers = torch.from_numpy(token_noise(noise, name, model.data, base.shape[1]))
    for relative in (False, True):
        value = Value(((1.0, Itself()), (1.0, Noise(0.5, 3, relative))))
        got = model.read(probe, Patch(Step(1 << node.id, site=site), value))
        std = 0.5 * (base.double().std(correction=0) if relative else 1.0)
        assert (got - base - std * numbers).abs().max() < TOLERANCE


def test_noise_of_a_prompt_is_its_own() -> None:
    """What other prompts there are, and how long they are, does not matter."""
    few, many = prompts(4), prompts(4, 6, 3)
    few = Prompts(few.layout, tuple(type(w)(w.name, m.ids[:1]) for w, m in zip(few.worlds, many.worlds, strict=True)))
    noisy = Value(((1.0, Itself()), (1.0, Noise(0.5, 3))))
    one, three = (Model("gpt2-sdpa", data) for data in (few, many))
    for site in (Site.OUT, Site.V, Site.PATTERN):
        nodes = 1 << one.head().id
        got, want = (m.logits(m.start(nodes, site, noisy))[0] for m in (three, one))
        assert (got - want).abs().max() < TOLERANCE
        assert (want - one.logits()[0]).abs().max() > 1e-3


def test_another_tokens_value_is_that_value() -> None:
    model = model_of("gpt2-sdpa")
    layout, node = model.data.layout, model.graph.nodes[0]
    tokens = tuple(layout.token(layout.place(t)[0], 0) for t in range(layout.n_tokens))
    got = model.read(Probe(1), Patch(Step(1 << node.id), Value(((1.0, Moved(FromWorld("corrupt"), tokens)),))))
    whole = model.read(Probe(1), Patch(Step(1 << node.id), CORRUPT))
    assert torch.equal(got, whole[list(tokens)])


# ---- what cannot be


@pytest.mark.parametrize(("kind", "driver"), DRIVERS)
def test_both_drivers_show_the_insides(kind: str, driver: str) -> None:
    f = Fixture(kind, driver, data=prompts(5))
    node = next(n for n in f.graph.nodes if n.kind is Kind.HEAD)
    pattern = f.oracle.read(experiment(), cell(), Probe(1 << node.id, Site.PATTERN))
    assert pattern.shape == (5, 5)
    assert (pattern.sum(1) - 1).abs().max() < 1e-6
    assert not bool(pattern.triu(1).any())


def test_a_model_that_hides_its_pattern_is_refused_by_the_cell_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fused attention cannot be replaced, so that only what needs no pattern can be recomputed."""
    monkeypatch.setattr(GPT2LMHeadModel, "set_attn_implementation", lambda *_: None)
    model = Model("gpt2-sdpa", prompts(4), driver="forward_hooks")
    node = 1 << model.head().id
    assert largest_difference(model.logits(model.start(node, Site.OUT, CORRUPT)), model.logits()) > 1e-4
    with pytest.raises(PatchcError, match="inside a fused kernel") as error:
        model.logits(model.start(node, Site.PATTERN, CORRUPT))
    assert error.value.exit == 3


def test_two_values_meet_only_where_both_enter() -> None:
    model = model_of("gpt2-sdpa")
    layout, node = model.data.layout, 1 << model.head().id

    def start(value: Value, tokens: int, sources: int) -> Patch:
        return model.start(node, Site.PATTERN, value, tokens=tokens, sources=sources)

    apart = start(CORRUPT, layout.at(2), layout.at(0)), start(Value(()), layout.at(2), layout.at(1))
    assert largest_difference(model.logits(*apart), model.logits(apart[0])) > 1e-5
    with pytest.raises(PatchcError, match="hooks-two-values"):
        model.logits(apart[0], start(Value(()), layout.at(2) | layout.at(3), layout.at(0)))
