"""Tensors with a row a token, `[prompt, pos, d]`: the same numbers in sweeps, hooks and graphs, and what is refused."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import patchc
from patchc.api import Model
from tests.models import gpt2, llama

N, POS = 2, 4
IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "corrupt": [[1, 9, 3, 4], [5, 6, 10, 8]],
    "answer": [11, 12],
    "wrong": [13, 14],
}
DIFF = "metric diff = logit(answer) - logit(wrong)\n"
MODELS = {"gpt2": gpt2, "llama": llama}
TARGETS = (
    "node mlp[0]",
    "node mlp[1] @ 3",
    "node head[0, 1] @ 1..3",
    "node resid_pre[1] @ 3",
    "node attn_out[1] @ 3",
    "node mlp[1].in",
    "node head[1, 2].q @ 3",
    "node kv[1, 0].k",
    "node head[0, 3].v @ 1",
    "node mlp[1].post",
    "node head[1, 0].pattern",
    "node head[1, 0].scores[3]",
    "node head[0, 2].pattern[3, 1]",
    "edge head[0, 1] -> head[1, 0].q",
    "path mlp[0] -> logits",
)


@cache
def loaded(kind: str) -> Model:
    """A random model without a tokenizer, traced once."""
    return patchc.load(MODELS[kind]("eager"))


def rows(width: int, n: int = N, pos: int = POS) -> Tensor:
    return torch.randn(n, pos, width, generator=torch.Generator().manual_seed(3))


def width(model: Model, target: str) -> int:
    if ".pattern" in target or ".scores" in target:
        return POS
    if ".post" in target:
        return model.graph.d_mlp
    return model.graph.d_head if re.search(r"\.[qkv]\b", target) and "edge" not in target else model.graph.d_model


def spec(target: str, value: str = 'self + 0.5 * tensor("x")') -> str:
    return f"{DIFF}experiment e {{ run clean patch {target} with {value} measure diff }}"


CASES = [("llama", target) for target in TARGETS] + [("gpt2", target) for target in TARGETS[4::3]]
"""GPT-2 has an attention bias."""


@pytest.mark.parametrize(("kind", "target"), CASES)
def test_sweeps_hooks_and_graphs_agree(kind: str, target: str) -> None:
    model = loaded(kind)
    compiled = model.compile(spec(target), IDS, tensors={"x": rows(width(model, target))})
    result = compiled.run(check="all", progress=False, write=False, per_prompt=True)["e"]
    first = model.compile(spec(target), IDS, tensors={"x": rows(width(model, target))[:1].expand(N, -1, -1)})
    other = first.run(progress=False, write=False, per_prompt=True)["e"]
    # Prompts see rows of their own: with the first's rows for both, only the second's number changes.
    assert result.values["diff"][0] == pytest.approx(other.values["diff"][0], abs=1e-6)
    assert abs(result.values["diff"][1] - other.values["diff"][1]) > 1e-5
    worlds = [torch.tensor(IDS[w]) for w in compiled.graph.worlds]
    logits, _ = compiled.graph(*worlds, torch.ones(()))
    last = logits[:, -1]
    each = torch.arange(N)
    want = last[each, IDS["answer"]] - last[each, IDS["wrong"]]
    torch.testing.assert_close(torch.as_tensor(result.values["diff"]), want.double(), atol=1e-5, rtol=0)


def test_a_row_a_token_is_the_world_it_was_read_from() -> None:
    model = loaded("gpt2")
    reading = "experiment e { run clean patch node mlp[0] with corrupt measure f }"
    kept: list[Tensor] = []
    hook = model.loaded.eager.transformer.h[0].mlp.register_forward_hook(lambda *a: kept.append(a[2].detach()))  # type: ignore[union-attr]
    with torch.no_grad():
        model.loaded.eager(torch.tensor(IDS["corrupt"]))
    hook.remove()

    def f(x: Tensor) -> Tensor:
        return x[:, -1, 3]

    own = model.compile(reading, IDS, metrics={"f": f}).run(progress=False)["e"]
    rows_of = 'experiment e { run clean patch node mlp[0] with tensor("x") measure f }'
    given = model.compile(rows_of, IDS, {"x": kept[0]}, {"f": f}).run(progress=False)["e"]
    assert given.values["f"] == pytest.approx(own.values["f"], abs=1e-6)


def refused(target: str, tensor: Tensor, data: Any = IDS, metric: str = DIFF) -> str:
    text = f'{metric}experiment e {{ run clean patch {target} with tensor("x") measure diff }}'
    with pytest.raises(patchc.PatchcError) as caught:
        loaded("gpt2").compile(text, data, tensors={"x": tensor})
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code in ("tensor-shape", "value-site")
    return diagnostic.message


def test_other_shapes_are_refused() -> None:
    assert "what it replaces has [2, 4, 32]" in refused("node mlp[0]", rows(32, pos=3))
    assert "what it replaces has [2, 4, 32]" in refused("node mlp[0]", rows(31))
    assert "what it replaces has [2, 4, 4]" in refused("node head[0, 1].pattern", rows(5))
    assert "[prompt, pos, d]" in refused("node mlp[0]", torch.ones(8, 32))


def test_prompts_of_several_lengths_have_no_such_tensor() -> None:
    uneven = {"clean": [[1, 2, 3], [4, 5]], "corrupt": [[1, 9, 3], [9, 5]], "answer": [3, 4], "wrong": [5, 6]}
    assert "the prompts differ in length" in refused("node mlp[0]", rows(32), uneven)
