"""The hooks backend's metrics against their definitions."""

from __future__ import annotations

import pytest
import torch

from patchc.diagnostics import PatchcError
from patchc.ir.experiment import (
    Called,
    Constant,
    Kl,
    Measure,
    Metric,
    Patch,
    Product,
    Quotient,
    Read,
    Sum,
)
from patchc.ir.paths import Step
from tests.unit.oracle_models import (
    CORRUPT,
    Fixture,
    cell,
    experiment,
    head,
    prompts,
    to_logits,
)


def test_metrics_are_their_definitions() -> None:
    data = prompts(4, 6, 6)
    ends = tuple(data.layout.token(i, -1) for i in range(3))
    answers = ((1, 2), (3,), (4,))
    reads = {measure: Read(measure, answers, ends) for measure in Measure}
    expressions = {str(m): e for m, e in reads.items()} | {
        "kl": Kl("corrupt", ends),
        "sum": Sum(((2.0, reads[Measure.LOGIT]), (-1.0, Constant(3.0)))),
        "product": Product((reads[Measure.PROB], reads[Measure.LOSS])),
        "quotient": Quotient(reads[Measure.PROB], reads[Measure.LOSS]),
        "called": Called("largest"),
    }
    metrics = [Metric(name, e) for name, e in expressions.items()]
    f = Fixture("native", data=data, metrics={"largest": lambda logits: logits[:, -1].amax(-1)})
    got = f.oracle.measure(experiment(*metrics), [cell(), cell()])
    clean = torch.stack([x[-1] for x in f.plain("clean")]).double()
    corrupt = torch.stack([x[-1] for x in f.plain("corrupt")]).double()
    p, q = corrupt.softmax(-1), clean.softmax(-1)
    prob = torch.stack([q[i, list(a)].sum() for i, a in enumerate(answers)])
    logit = torch.stack([clean[i, list(a)].mean() for i, a in enumerate(answers)])
    best = [clean[i, list(a)].max() for i, a in enumerate(answers)]
    want = {
        "logit": logit.mean(), "prob": prob.mean(), "logprob": prob.log().mean(), "loss": -prob.log().mean(),
        "rank": sum((clean[i] > b).sum() for i, b in enumerate(best)) / 3,
        "correct": sum(float(int(clean[i].argmax()) in a) for i, a in enumerate(answers)) / 3,
        "kl": (p * (p / q).log()).sum(-1).mean(), "sum": (2 * logit - 3).mean(),
        "product": -(prob * prob.log()).mean(), "quotient": -(prob / prob.log()).mean(),
        "called": clean.amax(-1).mean(),
    }  # fmt: skip
    assert got.keys() == want.keys()
    for name, number in want.items():
        assert got[name].dtype == torch.float64
        assert got[name].shape == (2, 3)
        assert got[name].mean(1).tolist() == pytest.approx([float(number)] * 2, abs=2e-6), name


def test_normalised_metrics_are_0_and_1_at_their_worlds() -> None:
    f = Fixture("native", data=prompts(4, 6))
    ends = tuple(f.data.layout.token(i, -1) for i in range(2))
    logit = Read(Measure.LOGIT, ((1,), (2,)), ends)
    metrics = [
        Metric("of means", logit, "clean", "corrupt"),
        Metric("of ratios", logit, "clean", "corrupt", True),
    ]
    whole = Patch(to_logits(f.graph, Step(f.graph.input)), CORRUPT)
    part = Patch(to_logits(f.graph, Step(head(f.graph, 0, 0))), CORRUPT)
    done: list[int] = []
    got = f.oracle.measure(experiment(*metrics), [cell(), cell(whole), cell(part)], done.append)
    assert done == [1, 2, 3]
    for numbers in got.values():
        assert numbers[:2].mean(1).tolist() == pytest.approx([0, 1], abs=1e-6)
    at_end = [
        torch.stack([x[-1, i + 1] for i, x in enumerate(run)]).double()
        for run in (f.plain("clean"), f.logits(part), f.plain("corrupt"))
    ]
    zero, x, one = at_end
    assert got["of means"][2].mean().item() == pytest.approx(
        ((x.mean() - zero.mean()) / (one.mean() - zero.mean())).item(), abs=1e-5
    )
    assert got["of ratios"][2].tolist() == pytest.approx(((x - zero) / (one - zero)).tolist(), abs=1e-5)


def test_a_python_metric_of_a_wrong_shape_is_an_error() -> None:
    f = Fixture("native", metrics={"all": lambda logits: logits})
    with pytest.raises(PatchcError, match="one number, or one a prompt"):
        f.oracle.measure(experiment(Metric("m", Called("all"))), [cell()])
