"""What is reported of numbers a prompt: normalised means, standard errors, bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from patchc.execute.statistics import Ends, bootstrap, numbers
from patchc.ir.experiment import Constant, Interval, Metric

CELLS, PROMPTS = 5, 7


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ends(seed: int = 1) -> Ends:
    return Ends(drawn(seed, PROMPTS), drawn(seed, PROMPTS) + 3 + drawn(seed + 1, PROMPTS) / 2)


def metric(**more: object) -> Metric:
    return Metric("m", Constant(0.0), **more)  # type: ignore[arg-type]


def test_a_ratio_of_means_is_the_mean_of_what_is_shown_a_prompt() -> None:
    values, e = drawn(0, CELLS, PROMPTS), ends()
    found = numbers(metric(), values, e)
    want = (values.mean(-1) - e.zero.mean()) / (e.one.mean() - e.zero.mean())
    torch.testing.assert_close(found.mean, want)
    torch.testing.assert_close(found.per_prompt.mean(-1), want)


@pytest.mark.parametrize("per_prompt", [False, True])
def test_the_ends_are_0_and_1_exactly(per_prompt: bool) -> None:
    e = ends()
    found = numbers(metric(per_prompt=per_prompt), torch.stack([e.zero, e.one]), e)
    assert found.mean.tolist() == [0.0, 1.0]


def test_a_mean_of_ratios() -> None:
    values, e = drawn(0, CELLS, PROMPTS), ends()
    found = numbers(metric(per_prompt=True), values, e)
    torch.testing.assert_close(found.mean, ((values - e.zero) / (e.one - e.zero)).mean(-1))


def test_one_prompt_has_no_error_and_no_interval() -> None:
    found = numbers(metric(interval=Interval(0.9)), drawn(0, CELLS, 1), None)
    assert bool(found.stderr.isnan().all())
    assert found.low is None


@pytest.mark.parametrize("kind", ["plain", "ratio of means", "mean of ratios"])
def test_an_interval_is_the_percentiles_of_the_metric_over_drawn_prompts(kind: str) -> None:
    values, e = drawn(0, CELLS, PROMPTS), ends()
    interval = Interval(0.8, seed=3, resamples=400)
    low, high = bootstrap(interval, values, None if kind == "plain" else e, kind == "mean of ratios")
    generator = np.random.default_rng(3)
    draws = []
    for chosen in generator.integers(PROMPTS, size=(400, PROMPTS)):
        x, zero, one = values[:, chosen], e.zero[chosen], e.one[chosen]
        match kind:
            case "plain":
                draws.append(x.mean(-1))
            case "ratio of means":
                draws.append((x.mean(-1) - zero.mean()) / (one.mean() - zero.mean()))
            case _:
                draws.append(((x - zero) / (one - zero)).mean(-1))
    want = np.quantile(torch.stack(draws).numpy(), [0.1, 0.9], axis=0)
    np.testing.assert_allclose(low.numpy(), want[0])
    np.testing.assert_allclose(high.numpy(), want[1])


def test_an_interval_depends_on_its_seed_and_on_no_other_cell() -> None:
    values = drawn(0, CELLS, PROMPTS)
    whole = bootstrap(Interval(0.9, 1), values, None, False)
    alone = bootstrap(Interval(0.9, 1), values[2:3], None, False)
    other = bootstrap(Interval(0.9, 2), values, None, False)
    torch.testing.assert_close(whole[0][2:3], alone[0])
    assert not torch.equal(whole[0], other[0])


def test_an_interval_holds_the_mean_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        x = drawn(seed, 1, 40)
        low, high = bootstrap(Interval(0.9, seed, 500), x, None, False)
        held += bool(low <= 0 <= high)
    assert 0.82 <= held / 200 <= 0.96
