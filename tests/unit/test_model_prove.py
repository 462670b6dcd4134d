"""The proof notices pieces that are not the model's: each fault is put in by hand, and named where it
lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchc.diagnostics import PatchcError
from patchc.model.prove import count_layers, is_causal, prove
from tests.models import loaded_model

Fault = Callable[[Any], Any]


class Faulty:
    """Pieces of which one function is replaced."""

    def __init__(self, pieces: Any, **changed: Any) -> None:
        self._pieces, self._changed = pieces, changed

    def __getattr__(self, name: str) -> Any:
        return self._changed[name] if name in self._changed else getattr(self._pieces, name)


def swapped_heads(p: Any) -> Any:
    def write(layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        return p.write(layer, z.flip(-2) if layer == 1 else z, heads)

    return Faulty(p, write=write)


def other_kv_head(p: Any) -> Any:
    return Faulty(p, kv_head=lambda head: 1 - p.kv_head(head))


def no_attention_bias(p: Any) -> Any:
    return Faulty(p, attn_bias=lambda layer: None)


def no_rotary(p: Any) -> Any:
    return Faulty(p, prepare=lambda layer, port, r, tokens, tables: r)


def shifted_positions(p: Any) -> Any:
    def prepare(layer: int, port: int, r: Tensor, tokens: Tensor, tables: Any) -> Tensor:
        return p.prepare(layer, port, r, tokens.roll(1) if port == 1 else tokens, tables)

    return Faulty(p, prepare=prepare)


def no_norm(p: Any) -> Any:
    return Faulty(p, norm=lambda layer, port, x: x if layer else p.norm(layer, port, x))


def identity_mlp(p: Any) -> Any:
    return Faulty(p, mlp=lambda layer, x: p.mlp(layer, x) if layer == 0 else x)


def embeddings_in_the_other_order(p: Any) -> Any:
    return Faulty(p, embed=lambda ids: p.embed(ids).flip(0))


def mixing_mlp(p: Any) -> Any:
    return Faulty(p, mlp=lambda layer, x: p.mlp(layer, x) + 1e-6 * x.cumsum(0))


def half_of_the_logits(p: Any) -> Any:
    return Faulty(p, unembed=lambda x, columns=None: p.unembed(x, columns) * torch.linspace(1, 1.01, 50))


FAULTS: list[tuple[str, Fault, str]] = [
    ("gpt2-sdpa", swapped_heads, r"attention 1 \(`transformer\.h\.1\.attn\.c_proj`\)"),
    ("gpt2-eager", no_attention_bias, "attention 0"),
    ("gpt2-sdpa", embeddings_in_the_other_order, r"`transformer\.wte`"),
    ("gpt2-sdpa", no_norm, "attention 1"),
    ("gpt2-sdpa", identity_mlp, r"MLP 1 \(`transformer\.h\.1\.mlp"),
    ("gpt2-sdpa", half_of_the_logits, "logits"),
    ("native-ln", mixing_mlp, "MLP 0 .* mixes positions"),
    ("llama-sdpa", other_kv_head, "attention 0"),
    ("llama-eager", no_rotary, "attention 0"),
    ("native-rms-rotary", shifted_positions, "attention 0"),
]


@pytest.mark.parametrize(("kind", "fault", "where"), FAULTS, ids=[f"{f.__name__}-{k}" for k, f, _ in FAULTS])
def test_a_fault_is_found_where_it_lies(kind: str, fault: Fault, where: str) -> None:
    loaded = loaded_model(kind)
    prove(loaded.pieces, loaded.eager, 2)
    with pytest.raises(PatchcError, match=where):
        prove(fault(loaded.pieces), loaded.eager, 2)


def test_layers_are_counted() -> None:
    pieces = loaded_model("gpt2-sdpa").pieces
    count_layers(pieces, None)
    with pytest.raises(PatchcError, match="config says 3 layers, but 2"):
        count_layers(pieces, 3)
    s = pieces.structure
    less = SimpleNamespace(**{**vars(s), "layers": s.layers[:1]})
    with pytest.raises(PatchcError, match="2 attention cores, but 1"):
        count_layers(Faulty(pieces, structure=less), None)  # type: ignore[arg-type]


def test_one_layer_that_looks_ahead_is_enough() -> None:
    p = loaded_model("gpt2-sdpa").pieces

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        z = p.attend(layer, q, k, v, *rest)
        return z + 1e-5 * v.sum(1, keepdim=True) if layer == 1 else z

    assert is_causal(p)
    assert not is_causal(Faulty(p, attend=attend))  # type: ignore[arg-type]
