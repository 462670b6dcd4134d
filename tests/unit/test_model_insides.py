"""Scores inside attention cores and neurons inside MLPs: put together again they are the node; models of which they
cannot be had are refused when they are needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchc.diagnostics import PatchcError
from patchc.ir.graph import Kind
from patchc.ir.tokens import Layout
from patchc.model.load import LoadedModel, load
from tests.composed import packed_embedding, packed_qkv
from tests.models import TRACED, jittered, llama, loaded_model
from tests.unit.test_model_refusals import Attention

CLOSE = 5e-6
HIDDEN = float("-inf")
D = 32


@pytest.fixture(scope="module", params=sorted(TRACED))
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param)


def prompt(n: int) -> list[int]:
    return torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("layer", [0, 1])
def test_scores_softmax_to_what_values_are_mixed_by(loaded: LoadedModel, layer: int) -> None:
    pieces, n = loaded.pieces, 8
    tables, at = pieces.tables(Layout((n,))), torch.arange(n)[None]
    q, k, v = (x[None] for x in packed_qkv(pieces, layer, packed_embedding(pieces, [prompt(n)]), tables))
    scores = pieces.scores(layer, q, k, at, n, tables)
    hidden = torch.ones(n, n).triu(1).bool()
    kinds: Any = getattr(getattr(loaded.eager, "config", None), "layer_types", None)
    if kinds and kinds[layer] == "sliding_attention":
        hidden |= torch.ones(n, n).tril(-4).bool()
    assert torch.equal(scores[0, 0] == HIDDEN, hidden)
    z = torch.einsum("chqk,ckhd->cqhd", scores.softmax(-1), v)
    assert torch.allclose(z, pieces.attend(layer, q, k, v, at, n, tables), atol=CLOSE)
    some = torch.tensor([[5, 2]])
    part = pieces.scores(layer, q[:, some[0]][:, :, [3, 1]], k[:, :6, [3, 1]], some, n, tables, [3, 1])
    assert torch.allclose(part, scores[:, [3, 1]][:, :, some[0], :6], atol=CLOSE)


def test_neurons_add_up_to_the_mlp(loaded: LoadedModel) -> None:
    pieces, graph = loaded.pieces, loaded.graph
    if not graph.mlps:
        assert graph.d_mlp == 0
        with pytest.raises(ValueError, match="layer 0 has no MLP"):
            pieces.mlp_post(0, torch.zeros(1, D))
        return
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(0))
    post = pieces.mlp_post(1, x)
    assert post.shape == (6, graph.d_mlp)
    assert torch.allclose(pieces.mlp_down(1, post), pieces.mlp(1, x), atol=CLOSE)
    assert pieces.neurons_add_up(1) != graph.blocks[1].post_norm
    if not pieces.neurons_add_up(1):
        with pytest.raises(ValueError, match="not the sum"):
            pieces.neurons(1, post, range(graph.d_mlp))
        return
    bias = pieces.mlp_down(1, torch.zeros_like(post))
    parts = [pieces.neurons(1, post[:, some], some) for some in ([3, 1], [0, 2, *range(4, graph.d_mlp)])]
    assert torch.allclose(parts[0] + parts[1] + bias, pieces.mlp(1, x), atol=CLOSE)
    assert parts[0].abs().max() > 1e-2


def test_neurons_are_what_the_activation_makes() -> None:
    """Of a gated MLP the product of gate and up-projection."""
    module = llama()
    pieces, mlp = load(module).pieces, module.model.layers[1].mlp  # type: ignore[union-attr]
    x = torch.randn(5, D)
    y = module.model.layers[1].post_attention_layernorm(x)  # type: ignore[union-attr]
    want = F.silu(mlp.gate_proj(y)) * mlp.up_proj(y)
    assert torch.allclose(pieces.mlp_post(1, x), want, atol=CLOSE)


def test_scores_of_one_model_do_not_depend_on_how_it_attends() -> None:
    pieces = [load(llama(kind)).pieces for kind in ("sdpa", "eager")]
    tables, at = pieces[0].tables(Layout((6,))), torch.arange(6)[None]
    q, k, _ = (x[None] for x in packed_qkv(pieces[0], 1, packed_embedding(pieces[0], [prompt(6)]), tables))
    one, other = (p.scores(1, q, k, at, 6, p.tables(Layout((6,)))) for p in pieces)
    assert torch.equal(one == HIDDEN, other == HIDDEN)
    assert torch.allclose(one.softmax(-1), other.softmax(-1), atol=CLOSE)


def test_a_sliding_window_hides_what_is_too_far_back() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    more = {"intermediate_size": 64, "vocab_size": 50, "max_position_embeddings": 64, "sliding_window": 3}
    pieces = load(jittered(MistralForCausalLM(MistralConfig(**sizes, **more)))).pieces
    tables, n = pieces.tables(Layout((7,))), 7
    q, k, _ = (x[None] for x in packed_qkv(pieces, 0, packed_embedding(pieces, [prompt(n)]), tables))
    shown = pieces.scores(0, q, k, torch.arange(n)[None], n, tables)[0, 0] > HIDDEN
    assert torch.equal(shown, torch.ones(n, n).tril().triu(-2).bool())


class Odd(nn.Module):
    """A decoder whose nodes can be run, though not taken apart as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.unembed = nn.Embedding(50, D), nn.Linear(D, 50)
        self.ln, self.ln2, self.after = nn.LayerNorm(D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.fc, self.proj = Attention(kind), nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def mlp(self, x: Tensor) -> Tensor:
        out = self.proj(F.gelu(self.fc(x)))
        match self.kind:
            case "norm after the MLP":
                return self.after(out)
            case "scaled MLP":
                return out * 0.5
            case "gate behind the MLP":
                return out * torch.sigmoid(x[..., :1])
            case _:
                return out

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = self.ln(x)
        x = x + self.attn(y, y, None)[0]
        return self.unembed(x + self.mlp(self.ln2(x)))


def test_an_mlp_without_an_output_matrix_has_no_neurons() -> None:
    loaded = load(jittered(Odd("gate behind the MLP")))
    assert loaded.graph.d_mlp == 0
    assert loaded.graph.node(Kind.MLP, 0) is not None
    x = torch.zeros(2, D)
    assert bool(loaded.pieces.mlp(0, x).isfinite().all())
    calls: list[Callable[[], Tensor]] = [
        lambda: loaded.pieces.mlp_post(0, x),
        lambda: loaded.pieces.mlp_down(0, x),
        lambda: loaded.pieces.neurons(0, x, [0]),
    ]
    for call in calls:
        with pytest.raises(PatchcError) as caught:
            call()
        (fault,) = caught.value.diagnostics
        assert (fault.code, fault.exit) == ("no-inside", 3)
        assert "`mlp[0]`" in fault.message


def test_neurons_before_a_norm_do_not_add_up() -> None:
    pieces, x = load(jittered(Odd("norm after the MLP"))).pieces, torch.randn(4, D)
    assert torch.allclose(pieces.mlp_down(0, pieces.mlp_post(0, x)), pieces.mlp(0, x), atol=CLOSE)
    assert not pieces.neurons_add_up(0)


def test_a_factor_behind_the_output_matrix_is_part_of_it() -> None:
    pieces = load(jittered(Odd("scaled MLP"))).pieces
    x = torch.randn(4, D)
    post, every = pieces.mlp_post(0, x), list(range(2 * D))
    bias = pieces.mlp_down(0, torch.zeros_like(post))
    assert torch.allclose(pieces.neurons(0, post, every) + bias, pieces.mlp(0, x), atol=CLOSE)


def test_scores_that_are_not_the_cores_are_refused_when_needed() -> None:
    from patchc.model.prove import prove_insides

    pieces = load(llama()).pieces
    region = pieces._attention[1].scores  # type: ignore[attr-defined]
    for node in region.module.graph.nodes:
        if node.target is torch.ops.aten.mul.Tensor:
            node.args = (node.args[0], 0.5)
    region.module.recompile()
    prove_insides(pieces)
    assert set(pieces.not_apart) == {("scores", 1)}
    q = torch.zeros(1, 3, 4, 8)
    tables, at = pieces.tables(Layout((3,))), torch.arange(3)[None]
    pieces.scores(0, q, q, at, 3, tables)
    with pytest.raises(PatchcError) as caught:
        pieces.scores(1, q, q, at, 3, tables)
    assert caught.value.diagnostics[0].code == "no-inside"
    assert "`head[1, *]`" in caught.value.diagnostics[0].message
    pieces.attend(1, q, q, q, at, 3, tables)
