"""A plan foretells what a run does: FLOPs as torch counts them, memory roughly, remarks that are true."""

from __future__ import annotations

import json

import pytest

from patchc.api import Model
from patchc.ir.experiment import ModelChoice
from patchc.report.plans import plan_json, plan_text
from tests.models import loaded_model
from tests.unit.commands import MODEL, Run, spec

DATA = {
    "clean": [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2]],
    "corrupt": [[1, 2, 9, 4, 5, 6], [7, 3, 9, 1, 2]],
    "answer": [3, 4],
}
SPEC = """
experiment heads { for h in head run clean patch node h with corrupt measure logit(answer) as a }
experiment ports { for h in head.{q, k, v} run clean patch node h @ -2 with corrupt measure logit(answer) as a }
experiment edges { for w in writers, r in readers run clean patch edge w -> r with zero measure prob(answer) as p }
experiment paths { for s in head[0, *] run clean patch path s -> mlp* -> head[1, 0].k -> any* -> logits with corrupt
  measure logit(answer) as a }
experiment patterns { for h in head run clean patch node h.pattern with corrupt measure logit(answer) as a }
experiment circuit { run clean patch all except circuit(input | head[0, *] | mlp) with corrupt
  measure logit(answer) as a }
"""


def model(kind: str) -> Model:
    return Model(loaded_model(kind), ModelChoice(kind))


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-sdpa", "gemma2"])
def test_planned_flops_are_those_that_torch_counts(kind: str) -> None:
    compiled = model(kind).compile(SPEC, data=DATA)
    for planned, measured in zip(compiled.plan(), compiled.analyse(), strict=True):
        cost = planned.cost
        assert abs(measured.flops - cost.flops) <= 0.01 * cost.flops, planned.experiment
        assert cost.passes > 0


def test_neurons_cost_a_vector_of_the_stream_each() -> None:
    spec = (
        "experiment e { for n in mlp[1].post[*] run clean patch node n @ -1 with corrupt measure logit(answer) as a }"
    )
    (planned,) = model("gpt2-sdpa").compile(spec, data=DATA).plan()
    read = 2 * 11 * 2 * 32 * 128  # neurons of both worlds at all 11 tokens
    assert planned.cost.passes == read + 2 * 2 * 128 * 32  # two operations a number, of two rows of 128 neurons
    assert planned.variants == {"neurons, stored values": 128}


def test_passes_cost_what_each_of_them_computes() -> None:
    one, several = (model("gpt2-sdpa").compile(SPEC, data=DATA, memory=m) for m in (1 << 30, 1 << 14))
    assert several.plan()[0].n_passes > one.plan()[0].n_passes == 1
    for planned, measured in zip(several.plan(), several.analyse(), strict=True):
        assert abs(measured.flops - planned.cost.flops) <= 0.01 * planned.cost.flops


def test_remarks_tell_what_applied_and_what_could_not() -> None:
    heads, _, edges, paths, *_ = model("gpt2-sdpa").compile(SPEC, data=DATA).plan()
    of = [{r.optimisation: r for r in plan.remarks} for plan in (heads, edges, paths)]
    assert of[0]["answer columns"].used
    assert not of[1]["answer columns"].used
    assert "`p` needs all" in of[1]["answer columns"].text
    assert "the plain model" in of[0]["shared streams"].text
    assert of[1]["equal variants"].used
    assert not of[0]["chunks"].used
    assert "one pass" in of[0]["chunks"].text
    assert of[2]["heads"].used


def test_the_tree_has_every_stage_and_json_the_same_numbers() -> None:
    compiled = model("gpt2-sdpa").compile(SPEC, data=DATA)
    plan, measured = compiled.plan()[0], compiled.analyse()[0]
    text = plan_text(plan, measured)
    for word in ("resolve", "lower", "optimise", "execute", "cost", "measured:", "CPU s"):
        assert word in text
    assert "measured:" not in plan_text(plan)
    data = json.loads(json.dumps(plan_json(plan, measured)))
    assert data["cost"]["flops"] == plan.cost.flops
    assert data["measured"]["flops"] == measured.flops
    assert "measured" not in plan_json(plan)


def test_the_command(run: Run) -> None:
    heads = "experiment e { for h in head run clean patch node h with corrupt measure logit(answer) as a }"
    spec_ = spec(MODEL, 'data { clean "a b c d a b c" corrupt "a b c d a e c" answer " d" }', heads)
    assert "├─ optimise" in run("plan", spec_).out
    ran = run("plan", "--analyze", "--format", "json", spec_)
    assert ran.exit == 0
    (found,) = ran.json["plans"]
    assert found["measured"]["flops"] > 0
    assert found["n_cells"] == 4
