"""No second copy of the weights: parts are views of the model's own tensors, and what is none of them is declared."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from patchc.model.export import export
from patchc.model.pieces import TracedPieces
from patchc.model.rates import rates
from patchc.model.trace import trace
from patchc.optimise.plan import Cost
from patchc.report import plans
from tests.models import TRACED, gpt2, llama, loaded_model, neox
from tests.unit.test_plan import DATA, model


def storages(values: Any) -> dict[int, int]:
    """The bytes of every storage among some objects."""
    found = (v.untyped_storage() for v in values if type(v) in (Tensor, torch.nn.Parameter) and not v.is_meta)
    return {s.data_ptr(): s.nbytes() for s in found}


def made_by(structure: Any) -> tuple[TracedPieces, int]:
    """Pieces, and how many bytes of tensors there are more than before."""
    gc.collect()
    before = storages(gc.get_objects())
    pieces = TracedPieces(structure, structure.graph("", 0, causal=True))
    gc.collect()
    return pieces, sum(n for where, n in storages(gc.get_objects()).items() if where not in before)


@pytest.mark.parametrize("build", [gpt2, llama, neox])
def test_pieces_hold_what_they_say(build: Any) -> None:
    pieces, more = made_by(trace(export(build())))
    assert more == sum(pieces.copied.values()) == 0


@pytest.mark.parametrize("kind", TRACED)
def test_nothing_is_copied_of_any_kind(kind: str) -> None:
    assert loaded_model(kind).pieces.copied == {}


def test_what_no_view_serves_is_declared() -> None:
    """Output weights that the model turns inside out on every call: each part of it is a tensor of its own."""
    module: Any = gpt2()
    plain = module.transformer.h[1].attn.c_proj

    class Turned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = plain.weight, plain.bias

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, (self.weight * 2.0).t(), self.bias)

    module.transformer.h[1].attn.c_proj = Turned()
    pieces, more = made_by(trace(export(module.eval())))
    assert pieces.copied == {"transformer.h.1.attn.c_proj": 32 * 32 * 4}
    assert more == rates(pieces).copied == 32 * 32 * 4


def test_the_plan_says_it() -> None:
    spec = "experiment e { run clean patch node head[0, 0] with corrupt measure logit(answer) as a }"
    (planned,) = model("gpt2-sdpa").compile(spec, DATA).plan()
    assert planned.cost.copied == 0
    assert "no weights are copied" in plans.plan_text(planned)
    cost: Cost = replace(planned.cost, copied=3 << 20)
    assert "3 MiB of weights copied" in plans.plan_text(replace(planned, cost=cost))
