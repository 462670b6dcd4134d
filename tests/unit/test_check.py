"""What a check lets pass: rounding, of any model and in any type of number, and no wrong number, however small."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import patchc
from patchc import pipeline
from patchc.api import Compiled
from patchc.execute import check as checking
from patchc.execute.check import Checker
from patchc.execute.sweep import Outcome
from patchc.ir.check import Check
from tests.models import MODELS

IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4, 8], [5, 6, 7, 8, 3]],
    "corrupt": [[1, 9, 3, 4, 7], [5, 6, 10, 8, 3]],
    "answer": [11, 12],
    "wrong": [13, 14],
}
SPEC = """
metric diff = logit(answer) - logit(wrong)
metric part = diff from clean to corrupt
metric nats = logprob(answer)
metric share = prob(answer)
metric away = kl(clean)
metric ratio = logit(answer) / logprob(wrong)
experiment heads { for h in head run clean patch node h with corrupt measure diff, part, nats, share, away, ratio }
"""
RANKS = """
experiment ranks { for h in head run clean patch node h with corrupt measure rank(answer) as place, correct(wrong) }
"""
SMALL = "metric diff = logit(answer) - logit(wrong)\n" + (
    "experiment e { for h in head run clean patch node h with clean + 0.001 * noise(std=1, seed=2) measure diff }"
)
HALF = (torch.bfloat16, torch.float16)


@cache
def compiled(kind: str, dtype: torch.dtype, spec: str = SPEC) -> Compiled:
    return patchc.load(MODELS[kind]().to(dtype)).compile(spec, IDS)


CHECKERS: dict[int, Checker] = {}


def checker(c: Compiled) -> Checker:
    """One for each of the compiled specs, which last as long as the tests."""
    return CHECKERS.setdefault(id(c), new_checker(c))


def new_checker(c: Compiled) -> Checker:
    return Checker(c.model.loaded.eager, c.model.graph, c.study.prompts, c.given.tensors, c.given.metrics)


def outcome(c: Compiled) -> Outcome:
    return pipeline.execute(c.programs[0], c.model.loaded, c.given, c._runs)


def checked(c: Compiled, found: Outcome, using: Checker | None = None) -> Check:
    return (using or checker(c)).check(c.study.experiments[0], found, None)


def moved(found: Outcome, metric: str, cell: int, by: float) -> Outcome:
    """An outcome with one wrong number."""
    numbers = found.numbers[metric]
    mean = numbers.mean.clone()
    mean[cell] += by
    return replace(found, numbers={**found.numbers, metric: replace(numbers, mean=mean)})


def refuses(c: Compiled, found: Outcome, using: Checker | None = None) -> bool:
    try:
        checked(c, found, using)
    except patchc.PatchcError as error:
        return [d.code for d in error.diagnostics] == ["check-failed"]
    return False


RIGHT = [
    *(("llama-sdpa", dtype) for dtype in (torch.float32, torch.float64, *HALF)),
    *(("gpt2-sdpa", dtype) for dtype in (torch.float32, *HALF)),
    ("native-rms-rotary", torch.bfloat16),
    ("neox-parallel", torch.float16),
]


@pytest.mark.parametrize(("kind", "dtype"), RIGHT, ids=str)
def test_right_numbers_pass_with_room_to_spare(kind: str, dtype: torch.dtype) -> None:
    c = compiled(kind, dtype)
    check = checked(c, outcome(c))
    assert check.cells == 8
    assert check.max_abs_diff <= check.tolerance
    assert check.share < 0.8
    if dtype in HALF:
        assert check.reference == "float32"
        assert check.own_diff is not None
        assert check.max_abs_diff <= 3 * check.own_diff  # about as good as a plain pass of the model
    else:
        assert check.reference is None
        assert check.tolerance <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("metric", ["diff", "part", "nats", "share", "away", "ratio"])
def test_a_wrong_number_fails_by_its_own_scale(metric: str, dtype: torch.dtype) -> None:
    """Off by three percent of the largest effect (in half precision by all of it) is wrong, whatever its size."""
    c = compiled("llama-sdpa", dtype)
    found = outcome(c)
    mean = found.numbers[metric].mean
    effect = float((mean - found.unpatched[metric]["clean"].mean).abs().max())
    part = 0.03 if dtype is torch.float32 else 1.0
    assert refuses(c, moved(found, metric, 3, part * max(effect, 1e-3)))


def test_ranks_may_change_only_where_logits_are_close() -> None:
    c = patchc.load(MODELS["llama-sdpa"]().to(torch.bfloat16)).compile(RANKS, IDS)
    found = outcome(c)
    using = new_checker(c)
    assert checked(c, found, using).share <= 1
    assert refuses(c, moved(found, "place", 0, 10.0), using)


def test_a_small_effect_has_to_be_right_too() -> None:
    c = compiled("llama-sdpa", torch.float32, SMALL)
    found = outcome(c)
    check = checked(c, found)
    assert check.largest_effect < 2e-2
    assert check.tolerance < 2e-5
    strongest = int((found.numbers["diff"].mean - found.unpatched["diff"]["clean"].mean).abs().argmax())
    assert refuses(c, moved(found, "diff", strongest, 1e-4))


def test_no_number_is_no_right_number() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        c = compiled("gpt2-sdpa", dtype)
        assert refuses(c, moved(outcome(c), "diff", 0, float("nan")))


# ---- models on which rounding does much


def sharp() -> nn.Module:
    """Attention scores in the hundreds and large logits: the last bits of the stream decide much."""
    module = MODELS["gpt2-sdpa"]()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "c_attn.weight" in name or "ln_f.weight" in name:
                parameter.mul_(40)
    return module


def test_where_single_precision_is_too_coarse_double_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    c = patchc.load(sharp()).compile(SPEC, IDS)
    found = outcome(c)
    using = new_checker(c)
    check = checked(c, found, using)
    assert "wider" in vars(using), "double precision was not asked"
    monkeypatch.setattr(checking, "WIDER", {})  # nor would single precision do
    assert refuses(c, found, new_checker(c))
    monkeypatch.undo()
    assert check.share <= 1
    assert refuses(c, moved(found, "diff", 2, 100 * check.tolerance))


def test_without_room_for_a_wider_copy_roundings_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "free_memory", lambda _: 0)
    for dtype in (torch.float32, torch.bfloat16):
        c = compiled("llama-sdpa", dtype)
        found = outcome(c)
        using = new_checker(c)
        assert checked(c, found, using).reference is None
        assert using.wider is None
        assert refuses(c, moved(found, "diff", 1, 3e-4 if dtype is torch.float32 else 3.0), using)


def test_half_precision_without_hooks_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch lacks an operation in half precision, single precision is still there."""

    def fails(self: Checker) -> Any:
        raise RuntimeError('"some_cpu" not implemented for Half')

    monkeypatch.setattr(Checker, "own", property(fails))
    c = compiled("gpt2-sdpa", torch.float16)
    check = checked(c, outcome(c), new_checker(c))
    assert (check.reference, check.own_diff) == ("float32", None)
    assert check.max_abs_diff <= check.tolerance


# ---- what stays as it was


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_module_stays_as_it_was(dtype: torch.dtype) -> None:
    module = sharp() if dtype is torch.float32 else MODELS["gpt2-sdpa"]().to(dtype)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    results = patchc.load(module).compile(SPEC, IDS).run(check="all", progress=False, write=False)
    assert results["heads"].check is not None
    after = module.state_dict()
    assert all(torch.equal(x, after[name]) and x.dtype is after[name].dtype for name, x in before.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_json_and_terminal_say_what_was_compared_with() -> None:
    from patchc.report.terminal import _checked

    plain = Check(4, 1e-6, 1e-4, 2.0, 0.1)
    assert plain.to_json() == {"cells": 4, "max_abs_diff": 1e-6, "tolerance": 1e-4, "largest_effect": 2.0}
    assert _checked(plain) == "checked with hooks: 4 cells off by at most 1e-06 (allowed 0.0001, largest effect 2)"
    half = Check(1, 0.01, 0.25, 0.125, 0.1, "float32", 0.03)
    assert half.to_json() | plain.to_json() | {"reference": "float32", "hooks_diff": 0.03} == {
        **half.to_json(),
        **plain.to_json(),
    }
    assert _checked(half) == (
        "checked with hooks in float32: 1 cell off by at most 0.01, hooks in the model's own type by 0.03 "
        "(allowed 0.25, largest effect 0.12, which rounding may hide)"
    )
