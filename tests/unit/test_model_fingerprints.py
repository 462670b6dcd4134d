"""Fingerprints of weights: any change of any of them shows, however it was made; and which weights are no numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchc.diagnostics import PatchcError
from patchc.model.state import content_fingerprint, refuse_non_finite
from tests.models import gpt2


def mlp(module: Any) -> Any:
    return module.transformer.h[0].mlp


def last_bit(weight: Tensor) -> None:
    weight.view(torch.int32).flatten()[-1] ^= 1


def swap_rows(weight: Tensor) -> None:
    weight[[3, 7]] = weight[[7, 3]].clone()


def swap_parameters(module: Any) -> None:
    a, b = (layer.mlp.c_fc for layer in module.transformer.h)
    a.weight, b.weight = b.weight, a.weight


def swap_contents(module: Any) -> None:
    a, b = (layer.mlp.c_fc.weight.data for layer in module.transformer.h)
    kept = a.clone()
    a.copy_(b)
    b.copy_(kept)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a bit, through data": lambda m: last_bit(mlp(m).c_fc.weight.data),
    "in place": lambda m: mlp(m).c_fc.bias.data.mul_(2),
    "copied over": lambda m: mlp(m).c_fc.weight.data.copy_(torch.zeros(32, 128)),
    "two entries moved": lambda m: swap_rows(mlp(m).c_fc.bias.data),
    "two rows swapped": lambda m: swap_rows(mlp(m).c_fc.weight.data),
    "columns turned round": lambda m: mlp(m).c_fc.weight.data.copy_(mlp(m).c_fc.weight.data.flip(1)),
    "two parameters swapped": swap_parameters,
    "two contents swapped": swap_contents,
    "one sum for another": lambda m: mlp(m).c_fc.bias.data[:2].add_(torch.tensor([0.5, -0.5])),
    "zero's sign": lambda m: mlp(m).c_fc.bias.data[:1].copy_(torch.tensor([-0.0])),
    "through numpy": lambda m: mlp(m).c_fc.weight.detach().numpy().__setitem__((0, 0), 7.0),
    "another shape": lambda m: setattr(mlp(m).c_fc, "weight", nn.Parameter(mlp(m).c_fc.weight.data.reshape(128, 32))),
    "another dtype": lambda m: setattr(
        mlp(m).c_fc, "bias", nn.Parameter(mlp(m).c_fc.bias.data.view(torch.int32), False)
    ),
    "a buffer": lambda m: m.register_buffer("more", torch.zeros(())),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_shows(change: str) -> None:
    module: Any = gpt2()
    with torch.no_grad():
        mlp(module).c_fc.bias[0] = 0.0
    before = content_fingerprint(module)
    assert content_fingerprint(module) == before
    CHANGES[change](module)
    assert content_fingerprint(module) != before


def test_the_same_content_elsewhere_is_the_same() -> None:
    module: Any = gpt2()
    before = content_fingerprint(module)
    mlp(module).c_fc.weight.data = mlp(module).c_fc.weight.data.t().contiguous().t()  # other strides
    assert content_fingerprint(module) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(dtype: torch.dtype, number: float) -> None:
    module = nn.Linear(300, 7).to(dtype)
    module.register_buffer("mask", torch.full((2, 2), -float("inf")))
    refuse_non_finite(module)
    module.weight.data[5, 211] = number
    with pytest.raises(PatchcError, match="weight `weight` holds NaN or infinity"):
        refuse_non_finite(module)


def test_buffers_may_hold_infinity_and_not_nan() -> None:
    module = nn.Linear(3, 3)
    module.register_buffer("table", torch.tensor([1.0, float("nan"), float("inf")]))
    module.register_buffer("empty", torch.zeros(0))
    with pytest.raises(PatchcError, match="buffer `table` holds NaN"):
        refuse_non_finite(module)
