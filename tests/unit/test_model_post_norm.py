"""Models that normalise what a block writes: each part against what plain hooks see in the model itself."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchc.execute.hook_points import At, Driver, Point, points_of
from patchc.execute.hook_proof import driver_for
from patchc.ir.graph import BlockKind
from patchc.ir.tokens import Layout
from patchc.model.load import LoadedModel, load
from patchc.model.prove import Prover
from tests.models import D_VOCAB, TRACED, loaded_model, logits_of

CLOSE = 5e-6
KINDS = ["gemma2", "gemma3-sdpa", "olmo2"]
SHAPES = [(2, 7), (1, 5), (3, 9)]


@pytest.fixture(scope="module", params=KINDS)
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param)


def ids_of(shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, D_VOCAB, shape, generator=torch.Generator().manual_seed(3))


@contextmanager
def seen(loaded: LoadedModel, ids: Tensor) -> Generator[dict[Point, Tensor]]:
    """What a pass of the model has at each point, by hooks on its own modules."""
    body: Any = loaded.eager.model  # type: ignore[union-attr]
    got: dict[Point, Tensor] = {}
    handles: list[Any] = []

    def keep(point: Point, module: nn.Module, given: bool = False, d_head: int = 0) -> None:
        def hook(_: Any, args: Any, out: Any) -> None:
            x = args[0] if given else out
            got[point] = x.detach().clone().unflatten(-1, (-1, d_head)) if d_head else x.detach().clone()

        handles.append(module.register_forward_hook(hook))

    d = loaded.graph.d_head
    keep(Point(At.EMBED), body.embed_tokens)
    keep(Point(At.FINAL_IN), body.norm, given=True)
    for i, layer in enumerate(body.layers):
        attn = layer.self_attn
        over_heads = hasattr(attn, "q_norm") and attn.q_norm.weight.numel() > d
        keep(Point(At.Q, i), attn.q_norm if over_heads else attn.q_proj, d_head=d)
        keep(Point(At.K, i), attn.k_norm if over_heads else attn.k_proj, d_head=d)
        keep(Point(At.V, i), attn.v_proj, d_head=d)
        keep(Point(At.Z, i), attn.o_proj, given=True, d_head=d)
        keep(Point(At.HEADS_OUT, i), attn.o_proj)
        keep(Point(At.ATTN_OUT, i), layer.post_attention_layernorm)
        keep(Point(At.MLP_IN, i), getattr(layer, "pre_feedforward_layernorm", layer.mlp), given=True)
        keep(Point(At.POST, i), layer.mlp.down_proj, given=True)
        keep(Point(At.NEURONS_OUT, i), layer.mlp)
        keep(Point(At.MLP_OUT, i), layer.post_feedforward_layernorm)
        handles.append(
            layer.register_forward_pre_hook(lambda _, args, i=i: got.update({Point(At.RESID_PRE, i): args[0]}))
        )
    try:
        got[Point(At.LOGITS)] = logits_of(loaded.eager, ids)
        yield got
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_part_is_what_the_model_has_there(loaded: LoadedModel, shape: tuple[int, int]) -> None:
    pieces, graph, ids = loaded.pieces, loaded.graph, ids_of(shape)
    with seen(loaded, ids) as got:
        rows = {point: x.flatten(0, 1) for point, x in got.items()}
    compose = Prover(pieces, loaded.eager)
    stream = pieces.embed(ids).sum(0).flatten(0, 1)
    torch.testing.assert_close(stream, rows[Point(At.EMBED)], atol=CLOSE, rtol=0)
    for layer in range(graph.n_layers):
        at = {point.at: x for point, x in rows.items() if point.layer == layer}
        for port, name in enumerate((At.Q, At.K, At.V)):
            raw = pieces.project(layer, port, pieces.norm(layer, port, stream))
            torch.testing.assert_close(raw, at[name], atol=CLOSE, rtol=0)
        own = torch.stack([pieces.write(layer, at[At.Z][:, [h]], [h]) for h in range(graph.n_heads)])
        o_proj = loaded.eager.model.layers[layer].self_attn.o_proj.weight  # type: ignore[union-attr]
        by_hand = torch.einsum("nhd,hdm->hnm", at[At.Z], o_proj.detach().T.unflatten(0, (-1, graph.d_head)))
        torch.testing.assert_close(own, by_hand, atol=CLOSE, rtol=0)
        written = compose.heads_and_bias(layer, stream, shape)
        torch.testing.assert_close(written, at[At.HEADS_OUT], atol=CLOSE, rtol=0)
        added = pieces.post_norm(layer, at[At.HEADS_OUT])
        torch.testing.assert_close(added, at[At.ATTN_OUT], atol=CLOSE, rtol=0)
        stream = stream + added
        torch.testing.assert_close(stream, at[At.MLP_IN], atol=CLOSE, rtol=0)
        post = pieces.mlp_post(layer, stream)
        torch.testing.assert_close(post, at[At.POST], atol=CLOSE, rtol=0)
        torch.testing.assert_close(pieces.mlp_down(layer, at[At.POST]), at[At.MLP_OUT], atol=CLOSE, rtol=0)
        torch.testing.assert_close(pieces.mlp(layer, stream), at[At.MLP_OUT], atol=CLOSE, rtol=0)
        stream = stream + at[At.MLP_OUT]
    torch.testing.assert_close(stream, rows[Point(At.FINAL_IN)], atol=CLOSE, rtol=0)
    torch.testing.assert_close(pieces.unembed(stream), rows[Point(At.LOGITS)], atol=CLOSE, rtol=0)


def test_a_norm_makes_a_difference_here(loaded: LoadedModel) -> None:
    with seen(loaded, ids_of((2, 7))) as got:
        for layer in range(loaded.graph.n_layers):
            for before, after in ((At.HEADS_OUT, At.ATTN_OUT), (At.NEURONS_OUT, At.MLP_OUT)):
                assert (got[Point(before, layer)] - got[Point(after, layer)]).abs().max() > 0.1


def test_the_graph_says_where_a_norm_follows(loaded: LoadedModel) -> None:
    for block in loaded.graph.blocks:
        assert block.post_norm == (block.kind is BlockKind.ATTENTION)
    assert not any(b.post_norm for b in loaded_model("llama-sdpa").graph.blocks)


@pytest.fixture(scope="module", params=["transformer_lens", "forward_hooks"])
def made(request: pytest.FixtureRequest, loaded: LoadedModel) -> Driver:
    return driver_for(loaded.eager, loaded.graph, request.param)


def test_drivers_see_what_plain_hooks_see(loaded: LoadedModel, made: Driver) -> None:
    ids = ids_of((2, 7))
    assert made.refused == {}
    inside = [Point(at, layer) for layer in range(2) for at in (At.POST, At.NEURONS_OUT)]
    points = [*points_of(loaded.graph), *inside]
    got = made.run(ids, {}, points)
    with seen(loaded, ids) as want:
        assert want.keys() == set(points)
    for point in points:
        torch.testing.assert_close(got[point], want[point], atol=CLOSE, rtol=0)
    for layer in range(2):
        written = want[Point(At.HEADS_OUT, layer)].flatten(0, 1)
        added = want[Point(At.ATTN_OUT, layer)].flatten(0, 1)
        torch.testing.assert_close(made.post_norm(layer, written), added, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("at", [At.Q, At.K, At.HEADS_OUT, At.ATTN_OUT, At.MLP_IN, At.MLP_OUT])
def test_an_edit_is_made_where_it_is_named(loaded: LoadedModel, made: Driver, at: At) -> None:
    """The logits of an edited pass are those of the pieces with the same edit."""
    pieces, point, ids = loaded.pieces, Point(at, 0), ids_of((2, 7))
    generator = torch.Generator().manual_seed(0)
    plain = made.run(ids, {}, [point])[point]
    more = torch.randn(plain.shape, generator=generator)
    got = made.run(ids, {point: lambda x: x + more}, [Point(At.LOGITS)])[Point(At.LOGITS)]
    want = pieces.unembed(_edited_stream(loaded, ids, at, more.flatten(0, 1)))
    torch.testing.assert_close(got.flatten(0, 1), want, atol=CLOSE, rtol=0)
    assert (got - logits_of(loaded.eager, ids)).abs().max() > 1e-3


def _edited_stream(loaded: LoadedModel, ids: Tensor, at: At, more: Tensor) -> Tensor:
    """The final stream where `more` is added at a point of layer 0."""
    pieces, (batch, length) = loaded.pieces, ids.shape
    compose = Prover(pieces, loaded.eager)
    stream = pieces.embed(ids).sum(0).flatten(0, 1)
    tables, tokens = pieces.tables(Layout((length,) * batch)), torch.arange(batch * length)
    raw = [pieces.project(0, port, pieces.norm(0, port, stream)) for port in range(3)]
    raw = [r + more if at == name else r for r, name in zip(raw, (At.Q, At.K, At.V), strict=True)]
    q, k, v = (pieces.prepare(0, p, r, tokens, tables).unflatten(0, (batch, length)) for p, r in enumerate(raw))
    shared = [pieces.kv_head(h) for h in range(loaded.graph.n_heads)]
    where = torch.arange(length).expand(batch, length)
    written = pieces.write(
        0, pieces.attend(0, q, k[:, :, shared], v[:, :, shared], where, length, tables).flatten(0, 1)
    )
    added = pieces.post_norm(0, written + more if at is At.HEADS_OUT else written)
    stream = stream + (added + more if at is At.ATTN_OUT else added)
    out = pieces.mlp(0, stream + more if at is At.MLP_IN else stream)
    stream = stream + (out + more if at is At.MLP_OUT else out)
    stream = stream + compose.attention(1, stream, ids.shape)
    return stream + pieces.mlp(1, stream)


@pytest.mark.filterwarnings("ignore:Olmo2ArchitectureAdapter does not support fold_ln")
@pytest.mark.parametrize(("kind", "processed"), [("gemma3-eager", True), ("olmo2", True)])
def test_a_bridge_is_traced_as_it_computes(kind: str, processed: bool) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module: Any = TRACED[kind]()
    bridge: Any = build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    if processed:
        bridge.enable_compatibility_mode()
    bridged, ids = load(bridge), ids_of((2, 7))
    assert [b.post_norm for b in bridged.graph.blocks] == [False, True, False, True, False]
    stream = Prover(bridged.pieces, bridged.eager)._composed(ids)
    torch.testing.assert_close(bridged.pieces.unembed(stream), bridge(ids).flatten(0, 1), atol=CLOSE, rtol=0)
    assert driver_for(bridged.eager, bridged.graph).run(ids, {}, [Point(At.HEADS_OUT, 1)])
