"""The pieces as GraphModules: the same numbers, the user's own parameters, and nothing but ATen operations
inside."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor

from patchc.ir.graph import BlockKind, Kind
from patchc.model.load import LoadedModel
from tests.models import D_VOCAB, TRACED, loaded_model, logits_of


@pytest.fixture(scope="module", params=sorted(TRACED))
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param)


def run_modules(loaded: LoadedModel, ids: Tensor) -> Tensor:
    """Logits by the modules alone."""
    pieces, graph = loaded.pieces, loaded.graph
    statics = pieces.modules["statics"](ids)

    def call(name: str, *args: Tensor) -> Tensor:
        return pieces.modules[name](*args, *(statics[i] for i in pieces.static_args[name]))

    shared = [pieces.kv_head(h) for h in range(graph.n_heads)]
    x = call("embed", ids)
    if graph.of(Kind.POS_EMBED):
        x = x + call("pos_embed", ids)
    for layer in range(graph.n_layers):
        read = [call(norm, x) if (norm := pieces.norm_module(layer, port)) else x for port in range(3)]
        q, k, v = (call(f"layer{layer}_{port}", y) for port, y in zip("qkv", read, strict=True))
        for port, y, whole in zip("qkv", read, (q, k[:, :, shared], v[:, :, shared]), strict=True):
            by_head = call(f"layer{layer}_{port}_by_head", y.expand(graph.n_heads, *y.shape))
            assert torch.allclose(by_head, whole, atol=5e-6)
        z = call(f"layer{layer}_attend", q, k[:, :, shared], v[:, :, shared])
        heads = call(f"layer{layer}_write", z)
        assert heads.shape == (*ids.shape, graph.n_heads, graph.d_model)
        some = pieces.write_module(layer, [2, 0])(z[:, :, [2, 0]])
        assert torch.allclose(some, heads[:, :, [2, 0]], atol=5e-6)
        written = heads.sum(2)
        if graph.node(Kind.ATTN_BIAS, layer) is not None:
            written = written + call(f"layer{layer}_attn_bias")
        assert torch.allclose(call(f"layer{layer}_attn", z), written, atol=5e-6)
        normed = graph.layer_block(BlockKind.ATTENTION, layer).post_norm
        assert normed == (f"layer{layer}_post_norm" in pieces.modules)
        written = call(f"layer{layer}_post_norm", written) if normed else written
        after = x + written
        parallel = len({b.rank for b in graph.blocks if b.layer == layer}) == 1
        mlp = graph.node(Kind.MLP, layer) is not None
        x = after + call(f"layer{layer}_mlp", x if parallel else after) if mlp else after
    return call("unembed", x)


@pytest.mark.parametrize("shape", [(1, 1), (3, 6), (2, 13)])
def test_modules_are_the_model(loaded: LoadedModel, shape: tuple[int, int]) -> None:
    ids = torch.randint(0, D_VOCAB, shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(run_modules(loaded, ids), logits_of(loaded.eager, ids), atol=5e-6)


def test_parameters_are_the_users_own(loaded: LoadedModel) -> None:
    own = {id(p) for p in loaded.eager.parameters()}
    inside = {id(p) for module in loaded.pieces.modules.values() for p in module.parameters()}
    assert inside == own


def test_only_aten_operations_stand_in_them(loaded: LoadedModel) -> None:
    for module in loaded.pieces.modules.values():
        for node in module.graph.nodes:
            assert node.op in ("placeholder", "get_attr", "call_function", "output")
            if node.op == "call_function":
                assert isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
            if node.op == "get_attr":
                assert str(node.target).isidentifier()


def test_gradients_reach_the_users_parameters(loaded: LoadedModel) -> None:
    logits = run_modules(loaded, torch.tensor([[1, 2, 3, 4]]))
    gradients = torch.autograd.grad(logits.square().sum(), list(loaded.eager.parameters()), allow_unused=True)
    assert all(g is not None and g.abs().max() > 0 for g in gradients)
