"""Plans without weights: the numbers of plans with them, from a config and the prompts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import patchc
from patchc.api import Model
from patchc.ir.experiment import ModelChoice
from patchc.model.rates import rates
from patchc.resources import builtin_models
from tests.models import loaded_model
from tests.unit.commands import Run
from tests.unit.test_outline import saved_config
from tests.unit.test_plan import DATA, SPEC

CAUSES = "no module is loaded: `patchc.load` fails"


@contextmanager
def no_weights() -> Iterator[None]:
    """Whatever reads weights, or proves what was traced with them, fails."""
    from patchc import api
    from patchc.model import load

    with pytest.MonkeyPatch.context() as patched:
        for place, name in ((load, "load_file"), (load, "_hf"), (load, "_proved"), (api, "load_model")):
            patched.setattr(place, name, lambda *_, **__: pytest.fail(CAUSES))
        yield


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-sdpa", "native-rms-rotary", "neox-parallel"])
def test_the_plan_is_that_of_the_loaded_model(kind: str, tmp_path: Path) -> None:
    folder = saved_config(loaded_model(kind).eager, tmp_path / "model")
    loaded = Model(loaded_model(kind), ModelChoice(kind))
    for memory in (1 << 30, 1 << 14):
        with no_weights():
            found = patchc.plan(SPEC, folder, DATA, memory=memory)
        assert found == loaded.compile(SPEC, DATA, memory=memory).plan()
    assert str(found) == str(loaded.compile(SPEC, DATA, memory=memory).plan())


@pytest.mark.parametrize("name", builtin_models())
def test_what_the_built_in_models_cost(name: str) -> None:
    from patchc.model.outline import outline

    loaded = patchc.load(name)
    found = outline(name)
    assert (found.rates, found.element) == (rates(loaded.loaded.pieces), loaded.loaded.element)


def test_a_dtype_halves_the_bytes_of_a_number(tmp_path: Path) -> None:
    folder = saved_config(loaded_model("gpt2-sdpa").eager, tmp_path / "model")
    whole, half = (patchc.plan(SPEC, folder, DATA, dtype=d, memory=1 << 30) for d in ("float32", "bfloat16"))
    assert [p.cost.flops for p in whole] == [p.cost.flops for p in half]
    assert all(b.cost.bytes < a.cost.bytes for a, b in zip(whole, half, strict=True))


def test_the_command_reads_no_weights(run: Run, tmp_path: Path) -> None:
    saved_config(loaded_model("llama-sdpa").eager, tmp_path / "tiny")
    rows = [{"clean": [1, 2, 3], "corrupt": [1, 4, 3], "answer": 5}]
    Path("data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = 'model "tiny" dtype=float16 device="cuda"\ndata "data.jsonl"\n'
    text += "experiment e { for h in head run clean patch node h with corrupt measure logit(answer) as a }"
    Path("e.patch").write_text(text)
    with no_weights():
        ran = run("plan", "e.patch", "--format", "json")
    assert ran.exit == 0, ran.err
    (found,) = json.loads(ran.out)["plans"]
    (planned,) = patchc.plan(Path("e.patch"))
    assert (found["n_cells"], found["cost"]["flops"]) == (8, planned.cost.flops)


def test_measuring_needs_the_weights(run: Run, tmp_path: Path) -> None:
    saved_config(loaded_model("llama-sdpa").eager, tmp_path / "tiny")
    Path("d.jsonl").write_text(json.dumps({"clean": [1, 2], "corrupt": [1, 3], "answer": 4}))
    text = 'model "tiny"\ndata "d.jsonl"\n'
    text += "experiment e { run clean patch node head[0, 0] with corrupt measure logit(answer) as a }"
    Path("e.patch").write_text(text)
    ran = run("plan", "e.patch", "--analyze")
    assert (ran.exit, "model-weights" in ran.err) == (3, True)
