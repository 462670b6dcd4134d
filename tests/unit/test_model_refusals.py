"""Models that look like pre-norm decoders and are not: each is refused, with the place where it differs.

Several of them would trace with exactly the right logits if their lower layers were taken for an "embedding".
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from patchc.diagnostics import PatchcError
from patchc.model.load import load
from tests.models import D_VOCAB, jittered, llama, native

D, HEADS = 32, 4


class Attention(nn.Module):
    """Causal attention, with the quirk that `kind` names."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.o, self.gate = (nn.Linear(D, D) for _ in range(5))
        self.q_norm = nn.LayerNorm(D)

    def forward(self, x: Tensor, keys: Tensor, first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        batch, length, _ = x.shape
        q, k, v = self.q(x), self.k(keys), self.v(keys)
        if self.kind == "norm over all heads of q":
            q = self.q_norm(q)
        if self.kind == "value residual" and first_v is not None:
            v = v + first_v
        q, k, heads = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in (q, k, v))
        if self.kind == "attention with dropout":
            z = F.scaled_dot_product_attention(q, k, heads, is_causal=True, dropout_p=0.1)
        else:
            z = F.scaled_dot_product_attention(q, k, heads, is_causal=self.kind != "looks ahead")
        z = z.transpose(1, 2).reshape(batch, length, D)
        if self.kind == "output gate":
            z = z * torch.sigmoid(self.gate(x))
        return self.o(z), v


class Block(nn.Module):
    """A transformer block; the plain one is pre-norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.ln1, self.ln2, self.attn = nn.LayerNorm(D), nn.LayerNorm(D), Attention(kind)
        self.fc, self.proj = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.scale, self.vector = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.rand(D))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc(x))
        if self.kind == "tokens mix inside the MLP":
            hidden = hidden + hidden.cumsum(1)
        return self.proj(hidden)

    def forward(self, x: Tensor, x0: Tensor, first_v: Tensor | None) -> tuple[Tensor, Tensor]:
        kind, y = self.kind, self.ln1(x)
        if kind == "tokens mix before q, k and v":
            y = y + F.pad(y, (0, 0, 1, 0))[:, :-1]
        keys = self.ln1(x0) if kind == "keys from another state" else y
        a, v = self.attn(y, keys, first_v)
        match kind:
            case "post-norm stream":
                x = self.ln1(x + a)
                return self.ln2(x + self.mlp(x)), v
            case "scaled stream":
                x = 0.5 * x + a
            case "scaled addition":
                x = torch.add(x, a, alpha=2.0)
            case "subtraction":
                x = x - a
            case "sum of a stack":
                x = torch.stack([x, a]).sum(0)
            case "writer added twice":
                x = x + a + a
            case "a learned scale":
                x = x + self.scale * a
            case "a scale by dimension":
                x = x + self.vector * a
            case "in-place":
                x += a
            case _:
                x = x + a
        if kind == "MLP reads attention alone":
            return x + self.mlp(a), v
        if kind == "MLP reads two states":
            return x + self.mlp(self.ln2(x) + x0), v
        if kind == "two axes":
            flat = x.reshape(-1, D)
            return (flat + self.mlp(self.ln2(flat))).view(x.shape), v
        return x + self.mlp(self.ln2(x)), v


class Model(nn.Module):
    """Two blocks between an embedding and logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.layers = nn.Embedding(D_VOCAB, D), nn.ModuleList(Block(kind) for _ in range(2))
        self.ln, self.head = nn.LayerNorm(D), nn.Linear(D, D_VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = x0 = self.embed(ids)
        v: Tensor | None = None
        for layer in self.layers:
            x, v = layer(x, x0, v)
        if self.kind == "last position only":
            x = x[:, -1:]
        if self.kind == "depends on the data" and ids.sum() > 3:
            x = x * 2
        if self.kind == "stream read twice by the logits":
            return self.head(self.ln(x)) + self.head(self.ln(x0))
        return self.head(self.ln(x))


def model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return jittered(Model(kind))


REFUSED = {
    "post-norm stream": "`layer_norm` in module `layers.1.ln1`",
    "scaled stream": "`mul` in module `layers.1`",
    "scaled addition": "`add` in module `layers.0`",
    "subtraction": "`sub` in module `layers.1`",
    "sum of a stack": "`sum` in module `layers.1`",
    "writer added twice": "added to the stream twice: `linear` in module `layers.0.attn.o`",
    "tokens mix before q, k and v": "`pad` in module `layers.0`",
    "tokens mix inside the MLP": "`cumsum` in module `layers.0`",
    "value residual": "2 linear projections",
    "output gate": "`mul` in module `layers.0.attn`",
    "attention with dropout": "attention with dropout",
    "keys from another state": "`layers.1.attn.k`",
    "MLP reads attention alone": "`layers.0.proj`",
    "MLP reads two states": "2 different states",
    "last position only": "not [batch, pos, vocab]",
    "depends on the data": "torch.export cannot follow",
    "stream read twice by the logits": "`linear` in module `head`",
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_refused_with_the_place(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PatchcError) as caught:
        load(model(kind))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "model-not-understood"
    assert REFUSED[kind] in diagnostic.message
    assert diagnostic.exit == 3
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "kind", ["plain", "a learned scale", "a scale by dimension", "in-place", "norm over all heads of q", "two axes"]
)
def test_traced_although_unusual(kind: str) -> None:
    loaded = load(model(kind))
    assert loaded.graph.causal
    assert [b.size for b in loaded.graph.blocks] == [1, 5, 1, 5, 1]


def test_attention_that_looks_ahead_is_recorded() -> None:
    assert not load(model("looks ahead")).graph.causal
    assert not load(native(attention_dir="bidirectional")).graph.causal


def test_a_layer_count_that_the_config_denies() -> None:
    module: Any = llama()
    module.config.num_hidden_layers = 3
    with pytest.raises(PatchcError, match="config says 3 layers, but 2 write"):
        load(module)


def test_a_norm_of_the_stream_itself_is_refused_where_it_stands() -> None:
    import transformers as hf

    size: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
        "vocab_size": D_VOCAB, "max_position_embeddings": 64, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    module = hf.BertLMHeadModel(hf.BertConfig(**{**size, "pad_token_id": 0}, is_decoder=True))
    with pytest.raises(PatchcError, match="in module `") as caught:
        load(jittered(module))
    assert caught.value.diagnostics[0].code == "model-not-understood"
