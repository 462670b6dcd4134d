"""Numbers a prompt from the command line, through a whole run."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.commands import Run, spec

SPEC = """
model "ioi-tiny"
data {
  clean   "When Mary and John went to the shop, John gave a bag to"
  corrupt "When Mary and John went to the shop, Mary gave a bag to"
  answer " Mary" wrong " John"
}
data {
  clean   "When Tom and Anna went to the shop, Anna gave a bag to"
  corrupt "When Tom and Anna went to the shop, Tom gave a bag to"
  answer " Tom" wrong " Anna"
}
metric diff = logit(answer) - logit(wrong)
experiment heads {
  for h in head
  run corrupt
  patch node h with clean
  measure diff, diff from corrupt to clean as recovered
  expect recovered at head[3, 1] > 0.1
}
"""


def test_per_prompt_adds_a_dim_whose_mean_is_the_plain_result(run: Run) -> None:
    plain = run("run", "--format", "json", spec(SPEC)).json["experiments"]["heads"]
    ran = run("run", "--format", "json", "--per-prompt", spec(SPEC))
    assert ran.exit == 0  # the expectation still speaks of means
    each = ran.json["experiments"]["heads"]
    assert each["dims"] == ["layer", "head", "prompt"]
    assert each["coords"]["prompt"] == [0, 1]
    assert (plain["n"], each["n"]) == (2, 1)
    for metric in ("diff", "recovered"):
        got = np.array(each["metrics"][metric])
        np.testing.assert_allclose(got.mean(-1), plain["metrics"][metric], atol=1e-9)
        assert np.ptp(got, axis=-1).max() > 1e-3
        assert {x for row in each["stderr"][metric] for cell in row for x in cell} == {None}


def test_the_terminal_says_so(run: Run) -> None:
    assert "each of 2 prompts" in run("run", "--quiet", "--per-prompt", spec(SPEC)).out


@pytest.mark.parametrize("argument", ["--per-prompt"])
def test_one_prompt_is_a_dim_of_one(run: Run, argument: str) -> None:
    one = SPEC.replace(SPEC[SPEC.index("data {", 60) : SPEC.index("metric")], "")
    each = run("run", "--format", "json", argument, spec(one)).json["experiments"]["heads"]
    assert each["coords"]["prompt"] == [0]
