"""Every public function of `transformer_lens.patching`, by spec and by patchc's function of the same name."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

import patchc.transformer_lens
from tests.parity.measure import EXAMPLES, TOLERANCE, Row, apart, measure
from tests.parity.subjects import SUBJECTS
from tests.parity.table import markdown
from tests.parity.works import SETTERS, WORKS, Work, pairs, public_names

REFUSED = (
    {
        (function, f"component={component!r}", model): "n_key_value_heads=2 for n_heads=4"
        for function in ("get_act_patch_direct_path", "get_act_patch_direct_path_all_sources")
        for component in "kv"
        for model in SUBJECTS
        if model.startswith("Llama GQA")
    }
    | {
        (function, f"component={component!r}", "Gemma 2"): "per-head attention outputs are normalized or scaled"
        for function in ("get_act_patch_direct_path", "get_act_patch_direct_path_all_sources")
        for component in "qkv"
    }
    | {("generic_activation_patch", "'result'", "native"): "Per-head result computation is unavailable"}
)
"""What TransformerLens refuses, and what it says."""

# By model, so that each is made by few of the processes that share the tests.
ROWS = sorted(pairs(), key=lambda pair: SUBJECTS.index(pair[1]))


@pytest.mark.parametrize(("work", "model"), ROWS, ids=[f"{model}: {work.name}" for work, model in ROWS])
def test_equal(work: Work, model: str) -> None:
    row = measure(work, model)
    said = REFUSED.get((work.function, work.variant, model))
    assert (row.refused is None) == (said is None), row.refused
    assert said is None or said in (row.refused or "")
    for side in row.sides:
        assert side.fault is None
        assert side.difference <= TOLERANCE
        # Two that do nothing agree too.
        assert row.effect is None or side.difference <= row.effect / 100


def test_every_public_name_has_a_row() -> None:
    assert {work.function for work in WORKS} == public_names()
    assert public_names() <= set(patchc.transformer_lens.__all__)


def test_every_sweep_has_a_spec() -> None:
    """The rest of the names are no sweeps."""
    specs = {f"get_act_patch_{path.stem}" for path in EXAMPLES.glob("*.patch")}
    sweeps = {name for name in public_names() if name.startswith("get_act_patch_")} | {"generic_activation_patch"}
    assert {name.replace("get_act_patch_generic", "generic") for name in specs} == sweeps
    assert {work.function for work in WORKS if work.spec} == sweeps


# ---- the measuring itself


def test_what_is_not_equal() -> None:
    one = torch.tensor([1.0, 2.0])
    assert apart(one, one + 0.5) == (0.5, None)
    assert apart(one, torch.tensor([1.0, math.nan]))[0] == math.inf
    assert apart(one, one[:, None])[0] == math.inf
    assert apart((one, one), (one, one + 1)) == (1.0, None)
    assert apart((one, one), one)[0] == math.inf
    assert apart(["layer"], ["pos"])[0] == math.inf
    frame = pd.DataFrame({"layer": [0, 1], "value": [1.0, 2.0]})
    assert apart(frame, frame.assign(value=[1.0, 2.5])) == (0.5, None)
    assert apart(frame, frame.assign(layer=[1, 0]))[0] == math.inf


def test_the_table() -> None:
    rows = [measure(work, "GPT-2") for work in SETTERS]
    lines = markdown(rows).splitlines()
    assert [line.count("|") for line in lines[:-2]] == [9] * (len(rows) + 2)
    assert lines[2].startswith("| `layer_pos_patch_setter` | GPT-2 | yes |")
    assert f"{len(rows)} rows, {len(rows)} of them equal" in lines[-1]


def test_a_row_that_is_not_equal_says_so() -> None:
    work = Work("generic_activation_patch", lambda m, _: torch.tensor(float(m is patchc.transformer_lens)))
    row: Row = measure(work, "GPT-2")
    assert not row.equal
    assert "| no: numbers |" in markdown([row])
