"""Only GPT-2's spelt-out GELU becomes one operation, and it computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from patchc.model.export import export
from patchc.model.fuse import fuse_gelu
from patchc.model.nodes import A
from tests.models import gpt2, logits_of


def operations(graph: fx.Graph) -> list[Any]:
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_gpt2s_activation_is_one_operation() -> None:
    module = gpt2()
    exported = export(module)
    assert operations(exported.module.graph).count(A.gelu.default) == 2
    assert A.tanh.default not in operations(exported.module.graph)
    ids = torch.arange(10).reshape(2, 5)
    assert torch.allclose(exported.module(ids)[0], logits_of(module, ids), atol=2e-6)


def test_lower_precision_keeps_the_models_own_rounding() -> None:
    module = gpt2().to(torch.bfloat16)
    exported = export(module)
    assert A.tanh.default in operations(exported.module.graph)
    ids = torch.arange(10).reshape(2, 5)
    assert torch.equal(exported.module(ids)[0], logits_of(module, ids))


def spelt_out(x: Tensor, half: float = 0.5, cube: float = 0.044715, power: float = 3.0, one: float = 1.0) -> Tensor:
    inner = torch.mul(torch.add(x, torch.mul(torch.pow(x, power), cube)), 0.7978845608028654)
    return torch.mul(torch.mul(x, half), torch.add(torch.tanh(inner), one))


@pytest.mark.parametrize(
    ("changed", "fused"),
    [({}, True), ({"half": 0.6}, False), ({"cube": 0.05}, False), ({"power": 2.0}, False), ({"one": 2.0}, False)],
)
def test_what_only_looks_like_it_is_left_alone(changed: dict[str, float], fused: bool) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x = torch.linspace(-3, 3, 50)
    module = make_fx(lambda t: spelt_out(t, **changed), tracing_mode="fake")(x)
    before = module(x)
    fuse_gelu(module.graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    assert (A.gelu.default in operations(module.graph)) == fused
    assert torch.allclose(module(x), before, atol=1e-6)
