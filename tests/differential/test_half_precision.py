"""Models in half precision: sweeps and graphs are as near to single precision as the model's own passes are."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import patchc
from patchc import pipeline
from patchc.api import Compiled
from patchc.execute.hooks import Oracle
from patchc.ir.experiment import ModelChoice
from tests.models import MODELS

IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4, 8], [5, 6, 7, 8, 3], [9, 8, 7, 6, 5], [20, 30, 40, 10, 0]],
    "corrupt": [[1, 9, 3, 4, 7], [5, 6, 10, 8, 3], [9, 8, 2, 6, 5], [21, 30, 40, 10, 0]],
    "answer": [11, 12, 15, 16],
}
SPEC = """
metric nats = logprob(answer)
experiment heads { for h in head run clean patch node h with corrupt measure nats }
experiment given { for l in layers run clean patch node mlp[l] with tensor("x") measure nats }
experiment pattern { for h in head run clean patch node h.pattern with mean(corrupt) measure nats }
"""
HALF = [torch.bfloat16, torch.float16]
KINDS = ["gpt2-eager", "llama-sdpa"]


@cache
def compiled(kind: str, dtype: torch.dtype) -> Compiled:
    x = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return patchc.load(MODELS[kind]().to(dtype)).compile(SPEC, IDS, tensors={"x": x})


def rms(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


@cache
def hooked(kind: str, dtype: torch.dtype) -> tuple[Oracle, Oracle]:
    """Hooks in single and in half precision."""
    c = compiled(kind, dtype)
    eager, graph, tensors = c.model.loaded.eager, c.model.graph, c.given.tensors
    return (
        Oracle(eager, graph, c.study.prompts, tensors=tensors, dtype=torch.float32),
        Oracle(eager, graph, c.study.prompts, tensors=tensors),
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_is_as_good_as_passes_of_the_model(kind: str, dtype: torch.dtype) -> None:
    c = compiled(kind, dtype)
    exact, own = hooked(kind, dtype)
    for program in c.programs:
        experiment = program.experiment
        got = pipeline.execute(program, c.model.loaded, c.given, {}).numbers["nats"].per_prompt
        assert got.dtype is torch.float64
        want = exact.measure(experiment, experiment.cells)["nats"]
        plain = own.measure(experiment, experiment.cells)["nats"]
        assert rms(got - want) <= 2 * rms(plain - want) + torch.finfo(dtype).eps / 8, experiment.name
        assert rms(got - want) > 0  # it is in half precision


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_is_as_good_as_passes_of_the_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    c = compiled(kind, dtype)
    exact, own = hooked(kind, dtype)
    experiment, cell = c.study.experiments[0], 3
    masks = torch.zeros(len(experiment.cells), dtype=dtype)
    masks[cell] = 1
    ids = [torch.tensor(IDS[world]) for world in ("clean", "corrupt")]
    got = c.graphs["heads"](*ids, masks)[0].flatten(0, 1)
    assert got.dtype is dtype
    want, plain = (torch.cat(o.logits(experiment, experiment.cells[cell])) for o in (exact, own))
    assert rms(got - want) <= 2 * rms(plain - want)
    c.save(tmp_path / "graph", "heads")
    again = patchc.load_graph(tmp_path / "graph", c.model)(*ids, masks)[0].flatten(0, 1)
    assert torch.equal(again, got)


def test_a_spec_says_so() -> None:
    """The statement is all that changes: loading, sweeps and the check follow."""
    spec = 'model "induction-2l" dtype=bfloat16\ndata { clean "a b c a" corrupt "a b d a" answer " b" }\n'
    spec += "experiment e { for h in head run clean patch node h with corrupt measure logit(answer) }"
    choice = ModelChoice("induction-2l", (("dtype", "bfloat16"),))
    check = patchc.load(choice).compile(spec).run(check=True, progress=False)["e"].check
    assert check is not None
    assert check.to_json()["reference"] == "float32"
    assert check.to_json()["hooks_diff"] > 0
