"""The hooks backend against whole runs, hooks written by hand, and node functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchc.diagnostics import PatchcError
from patchc.execute.hook_points import At, Point
from patchc.execute.hook_proof import driver_for
from patchc.execute.hooks import Oracle
from patchc.ir.experiment import (
    FromWorld,
    Given,
    Itself,
    Patch,
    Value,
)
from patchc.ir.graph import Kind
from patchc.ir.paths import Seq, Site, Step
from tests.unit.oracle_models import (
    CORRUPT,
    D_HEAD,
    DRIVERS,
    MODELS,
    Fixture,
    cell,
    experiment,
    gpt2,
    head,
    largest_difference,
    native,
    prompts,
    to_logits,
)
from tests.unit.oracle_unrolling import Plain


@pytest.fixture(scope="module", params=DRIVERS, ids="-".join)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(*request.param)


# ---- against whole runs


def test_no_patch_gives_the_base_run(fixture: Fixture) -> None:
    assert largest_difference(fixture.logits(), fixture.plain("clean")) < 2e-6


def test_a_path_that_no_start_can_take_gives_the_base_run(fixture: Fixture) -> None:
    graph = fixture.graph
    backwards = Seq((Step(head(graph, 1, 0)), Step(head(graph, 0, 0)), Step(graph.logits_set)))
    assert largest_difference(fixture.logits(Patch(backwards, CORRUPT)), fixture.logits()) == 0.0


@pytest.mark.parametrize("spelling", ["input", "complement", "stream", "final stream"])
def test_every_path_patched_gives_the_other_run(fixture: Fixture, spelling: str) -> None:
    graph = fixture.graph
    patch = {
        "input": Patch(to_logits(graph, Step(graph.input)), CORRUPT),
        "complement": Patch(Seq((Step(0), Step(graph.logits_set))), CORRUPT, complement=True),
        "stream": Patch(to_logits(graph, Step(graph.below(2), site=Site.STREAM, rank=2)), CORRUPT),
        "final stream": Patch(to_logits(graph, Step(graph.all, site=Site.STREAM, rank=graph.top)), CORRUPT),
    }[spelling]
    assert largest_difference(fixture.logits(patch), fixture.plain("corrupt")) < 5e-6
    assert largest_difference(fixture.logits(), fixture.plain("corrupt")) > 0.1


# ---- against hooks written by hand


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def kept(model: nn.Module, ids: Tensor, module: nn.Module, before: bool = False) -> Tensor:
    """What a module takes (or gives) in a run."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: Any, *out: Any) -> None:
        seen.append((args[0] if before else out[0]).clone())

    with torch.no_grad(), hooked(module, hook, before):
        model(ids)
    return seen[0]


@torch.no_grad()
def test_a_node_patch_is_a_forward_hook() -> None:
    f = Fixture("gpt2", data=prompts(6))
    clean, corrupt = (torch.tensor(f.data.world(w).ids) for w in ("clean", "corrupt"))
    model: Any = f.model
    projection = model.transformer.h[0].attn.c_proj
    donor = kept(model, corrupt, projection, before=True)

    def replace(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[:, 2:4, D_HEAD : 2 * D_HEAD] = donor[:, 2:4, D_HEAD : 2 * D_HEAD]
        return (z,)

    with hooked(projection, replace, before=True):
        want = model(clean).logits[0]
    step = Step(head(f.graph, 0, 1), tokens=0b1100)
    before = f.oracle.passes
    got = f.logits(Patch(to_logits(f.graph, step), CORRUPT))
    assert f.oracle.passes == before + 3  # both worlds' own runs, and this cell
    assert largest_difference(got, [want]) < 2e-6
    assert largest_difference(got, f.plain("clean")) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_a_stream_patch_at_one_position_is_a_forward_hook(rank: int) -> None:
    f = Fixture("gpt2", data=prompts(6))
    clean, corrupt = (torch.tensor(f.data.world(w).ids) for w in ("clean", "corrupt"))
    model: Any = f.model
    blocks = model.transformer.h
    # The stream between attention and MLP is what ln_2 reads and the MLP's output is added to: set by hand
    # below.
    places = {1: blocks[0], 3: blocks[1], 5: model.transformer.ln_f}
    if rank in places:
        module = places[rank]
        donor = kept(model, corrupt, module, before=True)

        def at_2(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            x[:, 2] = donor[:, 2]
            return (x, *args[1:])

        with hooked(module, at_2, before=True):
            want = model(clean).logits[0]
    else:
        block = blocks[rank // 2 - 1]
        donor = kept(model, corrupt, block.ln_2, before=True)
        base = kept(model, clean, block.ln_2, before=True)

        def add_at_2(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, 2] += (donor - base)[:, 2]
            return out

        with hooked(block.attn.c_proj, add_at_2):
            want = model(clean).logits[0]
    step = Step(f.graph.below(rank), site=Site.STREAM, rank=rank, tokens=0b100)
    got = f.logits(Patch(to_logits(f.graph, step), CORRUPT))
    assert largest_difference(got, [want]) < 3e-6
    assert largest_difference(got, f.plain("clean")) > 1e-3


@torch.no_grad()
def test_zeroed_attention_output_loses_its_bias() -> None:
    f = Fixture("gpt2", data=prompts(6))
    model: Any = f.model
    with hooked(model.transformer.h[1].attn.c_proj, lambda _, __, out: torch.zeros_like(out)):
        want = model(torch.tensor(f.data.world("clean").ids)).logits[0]
    block = f.graph.blocks[3]
    got = f.logits(Patch(to_logits(f.graph, Step(block.nodes, site=Site.ATTN_OUT)), Value(())))
    assert largest_difference(got, [want]) < 2e-6


# ---- against the node functions


@torch.no_grad()
@pytest.mark.parametrize("port", [0, 1, 2])
def test_an_edge_patch_is_a_head_with_another_q_k_or_v(fixture: Fixture, port: int) -> None:
    f, graph = fixture.functions, fixture.graph
    a, b = graph.node(Kind.HEAD, 0, 1), graph.node(Kind.HEAD, 1, 2)
    assert a is not None
    assert b is not None
    clean, corrupt = (Plain(f, fixture.data.world(w).ids) for w in ("clean", "corrupt"))
    qkv = list(clean.qkv[b])
    qkv[port] = f.project(b, port, clean.stream(b.rank) + corrupt.out[a] - clean.out[a])
    stream = clean.stream(b.rank + 1) + f.write(b, f.z(b, *qkv)) - clean.out[b]
    mlp = graph.node(Kind.MLP, 1)
    want = f.unembed(stream + f.mlp(mlp, stream) if mlp else stream)
    got = fixture.logits(Patch(to_logits(graph, Step(1 << a.id), Step(1 << b.id, ports=1 << port)), CORRUPT))
    assert largest_difference(got, list(want.split(fixture.data.layout.lengths))) < 5e-6
    assert largest_difference(got, fixture.logits()) > 1e-4


@torch.no_grad()
def test_a_given_output_of_a_head_is_what_it_adds_to_the_stream() -> None:
    vector = torch.linspace(-1, 1, 4 * D_HEAD)
    f = Fixture("native", tensors={"v": vector})
    node = f.graph.node(Kind.HEAD, 1, 3)
    assert node is not None
    plain = Plain(f.functions, f.data.world("clean").ids)
    half = Value(((1.0, Given("v")), (0.5, Itself())))
    stream = sum(plain.out.values()) - 0.5 * plain.out[node] + vector
    want = f.functions.unembed(stream)
    got = f.logits(Patch(to_logits(f.graph, Step(1 << node.id)), half))
    assert largest_difference(got, list(want.split(f.data.layout.lengths))) < 5e-6


# ---- values that meet


@torch.no_grad()
def test_of_two_starts_on_one_path_the_one_nearest_the_logits_wins() -> None:
    f = Fixture("native")
    low, high = head(f.graph, 0, 0), head(f.graph, 1, 2)
    noise = Patch(to_logits(f.graph, Step(low)), Value(()))
    restore = Patch(to_logits(f.graph, Step(f.graph.heads & ~low)), Value(((1.0, FromWorld("clean")),)))
    direct = Patch(Seq((Step(low), Step(f.graph.logits_set))), Value(()))
    assert largest_difference(f.logits(noise, restore), f.logits(direct)) < 2e-6
    assert largest_difference(f.logits(noise), f.logits(direct)) > 1e-4
    assert high & restore.path.parts[0].nodes


def test_one_start_with_two_values_is_an_error() -> None:
    f = Fixture("native")
    step = to_logits(f.graph, Step(head(f.graph, 0, 0)))
    with pytest.raises(PatchcError, match="hooks-two-values") as error:
        f.logits(Patch(step, CORRUPT), Patch(step, Value(())))
    assert "head[0, 0]" in error.value.diagnostics[0].message
    assert largest_difference(f.logits(Patch(step, CORRUPT), Patch(step, CORRUPT)), f.logits(Patch(step, CORRUPT))) == 0


def test_a_start_may_have_two_values_at_different_tokens() -> None:
    f = Fixture("native", data=prompts(4))
    early, late = (to_logits(f.graph, Step(head(f.graph, 0, 0), tokens=t)) for t in (0b0011, 0b1100))
    both = f.logits(Patch(early, CORRUPT), Patch(late, Value(())))
    assert largest_difference(both, f.logits(Patch(early, CORRUPT))) > 1e-4
    assert largest_difference([both[0][:2]], [f.logits(Patch(early, CORRUPT))[0][:2]]) < 2e-6


@pytest.mark.parametrize(("tensors", "message"), [({}, "no tensor 'v'"), ({"v": torch.zeros(3)}, r"must be \[32\]")])
def test_a_tensor_that_does_not_fit_is_an_error(tensors: dict[str, Tensor], message: str) -> None:
    f = Fixture("native", tensors=tensors)
    given = Value(((1.0, Given("v")),))
    with pytest.raises(PatchcError, match=message):
        f.logits(Patch(to_logits(f.graph, Step(head(f.graph, 0, 0))), given))


# ---- what it leaves alone


@pytest.mark.parametrize(("kind", "driver"), DRIVERS)
def test_the_model_is_left_as_it_was(kind: str, driver: str) -> None:
    def state(model: nn.Module) -> list[Any]:
        modules = [
            (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]
        return [modules, {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}]

    model, graph = MODELS[kind](4)
    model.train()
    before, weights = state(model), {name: x.clone() for name, x in model.state_dict().items()}
    config = str(getattr(model, "config", None))
    oracle = Oracle(model, graph, prompts(4), driver=driver)
    oracle.logits(experiment(), cell(Patch(to_logits(graph, Step(graph.heads, ports=1)), Value(()))))
    assert state(model) == before
    assert str(getattr(model, "config", None)) == config
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_a_model_that_nothing_can_hook_is_refused_by_name() -> None:
    _, graph = gpt2()
    with pytest.raises(PatchcError, match="cannot hook a Sequential") as error:
        Oracle(nn.Sequential(nn.Embedding(50, 32)), graph, prompts(4))
    assert error.value.exit == 3


@pytest.mark.parametrize("point", [Point(At.RESID_MID, 0), Point(At.Z, 7)])
def test_a_point_that_no_module_shows_is_refused_and_not_dropped(point: Point) -> None:
    model, graph = gpt2()
    driver, ids = driver_for(model, graph, "forward_hooks"), torch.tensor([[1, 2, 3]])
    assert driver.lacks(point)
    with pytest.raises(PatchcError, match=f"hooks-point.*{point.at} of layer {point.layer} cannot be hooked"):
        driver.run(ids, {}, [point])
    if point.at is not At.RESID_MID:  # an edit of that is made on either side
        with pytest.raises(PatchcError, match="hooks-point"):
            driver.run(ids, {point: lambda x: x * 0}, [Point(At.LOGITS)])


def test_a_graph_of_another_model_is_refused() -> None:
    model, _ = gpt2()
    _, other = native()
    with pytest.raises(PatchcError, match="hooks-differ"):
        Oracle(model, other, prompts(4))
