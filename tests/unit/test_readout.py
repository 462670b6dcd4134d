"""Every kind of metric, against the same number taken directly from the eager model's logits.

The patch replaces `input` wholly, so that the patched run is the run of `other`, prompt by prompt. In float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import patchc
from patchc.api import Model
from patchc.report import Result
from tests.models import gpt2, llama, logits_of

WORLDS = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]],
    "corrupt": [[1, 2, 30, 4], [5, 6, 7, 31, 9, 10], [32, 12], [13, 33, 15, 16]],
    "other": [[1, 40, 3, 4], [41, 6, 7, 8, 9, 10], [11, 42], [13, 14, 43, 44]],
}
ANSWER = [[20], [21, 22, 23], [24], [25, 26]]
WRONG = [[27], [28], [29], [21]]
PLACE = [1, 4, 0, 2]
DATA: dict[str, Any] = {**WORLDS, "answer": ANSWER, "wrong": [w[0] for w in WRONG], "place": PLACE}
TOLERANCE = 1e-9


@cache
def model() -> Model:
    return patchc.load(gpt2().double())


@cache
def single() -> Model:
    """The same in float32."""
    return patchc.load(gpt2())


def run(*measured: str, metrics: str = "", which: Model | None = None, world: str = "other", **data: Any) -> Result:
    spec = f"{metrics} experiment e {{ run clean patch node input with {world} measure {', '.join(measured)} }}"
    compiled = (which or model()).compile(spec, {**DATA, **data})
    return compiled.run(progress=False)["e"]


def last(world: str, which: Model | None = None) -> list[Tensor]:
    """The eager logits `[d_vocab]` after each prompt."""
    return at(world, [-1] * 4, which)


def at(world: str, places: list[int], which: Model | None = None) -> list[Tensor]:
    eager = (which or model()).loaded.eager
    return [logits_of(eager, torch.tensor([ids]))[0, p].double() for ids, p in zip(WORLDS[world], places, strict=True)]


def direct(kind: str, logits: Tensor, answers: list[int]) -> float:
    """The definition, in float64."""
    probs = logits.exp() / logits.exp().sum()
    best = max(float(logits[a]) for a in answers)
    match kind:
        case "logit":
            return sum(float(logits[a]) for a in answers) / len(answers)
        case "prob":
            return sum(float(probs[a]) for a in answers)
        case "logprob":
            return float(sum(probs[a] for a in answers).log())  # type: ignore[union-attr]
        case "loss":
            return -float(sum(probs[a] for a in answers).log())  # type: ignore[union-attr]
        case "rank":
            return float(sum(float(x) > best for x in logits))
        case "correct":
            return float(int(logits.argmax()) in answers)
        case _:
            raise AssertionError(kind)


def each(kind: str, world: str, answers: list[list[int]], places: list[int] | None = None) -> Tensor:
    logits = last(world) if places is None else at(world, places)
    return torch.tensor([direct(kind, x, a) for x, a in zip(logits, answers, strict=True)], dtype=torch.float64)


def assert_is(result: Result, name: str, want: Tensor) -> None:
    """Mean over prompts and standard error."""
    assert float(result.values[name]) == pytest.approx(float(want.mean()), abs=TOLERANCE)
    assert float(result.stderr[name]) == pytest.approx(float(want.std() / len(want) ** 0.5), abs=TOLERANCE)


KINDS = ["logit", "prob", "logprob", "rank", "correct", "loss"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_an_answer_set(kind: str) -> None:
    result = run(f"{kind}(answer) as x")
    assert result.n == 4
    assert_is(result, "x", each(kind, "other", ANSWER))
    for world in ("clean", "other"):
        assert result.baselines["x"][world] == pytest.approx(float(each(kind, world, ANSWER).mean()), abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_at_a_position_of_each_prompt(kind: str) -> None:
    assert_is(run(f"{kind}(wrong) @ place as x"), "x", each(kind, "other", WRONG, PLACE))


def test_kinds_together_and_alone_give_the_same() -> None:
    """Alone, a logit needs its answers' columns only; beside a probability, all of them."""
    together = run(*(f"{kind}(answer) as {kind}_" for kind in KINDS), "kl(clean) as far")
    for kind in KINDS:
        alone = run(f"{kind}(answer) as x")
        assert float(alone.values["x"]) == pytest.approx(float(together.values[f"{kind}_"]), abs=TOLERANCE)


def test_correct_counts_the_best_token_of_each_prompt() -> None:
    best = [int(x.argmax()) for x in last("other")]
    second = [int(x.topk(2).indices[1]) for x in last("other")]
    result = run("correct", "rank(answer) as r", answer=[best[0], best[1], second[2], [second[3], best[3]]])
    assert float(result.values["correct"]) == 0.75
    assert float(result.values["r"]) == 0.25
    assert float(result.stderr["correct"]) == pytest.approx(0.25)


@pytest.mark.parametrize("world", ["clean", "corrupt"])
def test_kl_is_from_the_named_world_to_the_patched_run(world: str) -> None:
    theirs, ours = (torch.stack(last(w)).log_softmax(-1) for w in (world, "other"))
    assert_is(run(f"kl({world}) as x"), "x", (theirs.exp() * (theirs - ours)).sum(-1))


def test_kl_at_a_position() -> None:
    theirs, ours = (torch.stack(at(w, PLACE)).log_softmax(-1) for w in ("corrupt", "other"))
    assert_is(run("kl(corrupt) @ place as x"), "x", (theirs.exp() * (theirs - ours)).sum(-1))


def test_kl_to_oneself_is_zero() -> None:
    result = run("kl(other) as x")
    assert float(result.values["x"]) == pytest.approx(0, abs=1e-6)
    assert result.baselines["x"]["other"] == 0


def test_arithmetic_is_done_prompt_by_prompt() -> None:
    a, b = each("prob", "other", ANSWER), each("prob", "other", WRONG)
    result = run("prob(answer) / (prob(answer) + prob(wrong)) as share", "prob(answer) * prob(wrong) as both",
                 "3 - 2 * prob(answer) as line", "-prob(wrong) / 4 as part")  # fmt: skip
    assert_is(result, "share", a / (a + b))
    assert_is(result, "both", a * b)
    assert_is(result, "line", 3 - 2 * a)
    assert_is(result, "part", -b / 4)


METRICS = """
metric diff = logit(answer) - logit(wrong)
metric ratio_of_means = diff from corrupt to clean
metric mean_of_ratios = diff from corrupt to clean per prompt
"""


def differences(world: str) -> Tensor:
    return each("logit", world, ANSWER) - each("logit", world, WRONG)


def test_normalised_as_the_ratio_of_means() -> None:
    result = run("ratio_of_means", metrics=METRICS)
    zero, one = (float(differences(w).mean()) for w in ("corrupt", "clean"))
    assert_is(result, "ratio_of_means", (differences("other") - zero) / (one - zero))
    assert result.baselines["ratio_of_means"]["corrupt"] == pytest.approx(0, abs=1e-6)
    assert result.baselines["ratio_of_means"]["clean"] == pytest.approx(1, abs=1e-6)


def test_normalised_as_the_mean_of_ratios() -> None:
    result = run("mean_of_ratios", metrics=METRICS)
    zero, one = differences("corrupt"), differences("clean")
    ratios = (differences("other") - zero) / (one - zero)
    assert float(result.values["mean_of_ratios"]) == pytest.approx(float(ratios.mean()), rel=1e-9)
    assert float(result.stderr["mean_of_ratios"]) == pytest.approx(float(ratios.std() / 2), rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_a_check_allows_for_ends_that_are_close(seed: int) -> None:
    """What is divided by little is far off after the division, and no further before it."""
    random = torch.Generator().manual_seed(seed)
    answer, wrong = (torch.randint(25, (4,), generator=random) + k for k in (0, 25))
    spec = f"{METRICS} experiment e {{ run clean patch node input with other measure mean_of_ratios, ratio_of_means }}"
    compiled = single().compile(spec, {**DATA, "answer": answer, "wrong": wrong})
    check = compiled.run(check=True, progress=False)["e"].check
    assert check is not None
    assert check.max_abs_diff < 1e-4


def test_one_prompt_has_no_standard_error() -> None:
    one = {k: v[:1] for k, v in DATA.items()}
    spec = "experiment e { run clean patch node input with other measure logit(answer) as x }"
    result = model().compile(spec, one).run(progress=False)["e"]
    assert (result.n, result.to_json()["stderr"]) == (1, {"x": None})


def test_ends_that_are_equal_cannot_normalise() -> None:
    same = {"corrupt": [ids if i != 1 else [50 - 1, *ids[1:]] for i, ids in enumerate(WORLDS["clean"])]}
    with pytest.raises(patchc.PatchcError) as caught:
        run("mean_of_ratios", metrics=METRICS, **same)
    assert [d.code for d in caught.value.diagnostics] == ["equal-ends"]
    assert caught.value.exit == 3


def test_the_whole_vocabulary_of_another_model() -> None:
    other = patchc.load(llama().double())
    theirs, ours = (torch.stack(last(w, other)).log_softmax(-1) for w in ("clean", "other"))
    assert_is(run("kl(clean) as x", which=other), "x", (theirs.exp() * (theirs - ours)).sum(-1))
