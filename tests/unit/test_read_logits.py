"""Python metrics are given the logits that they read, and the same numbers as with all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import patchc
from patchc.execute.read_logits import NotHeld, held_logits, reads_of, result_of
from tests.models import gpt2

N, LENGTH, D_VOCAB = 3, 5, 11
FULL = torch.randn(N, LENGTH, D_VOCAB, generator=torch.Generator().manual_seed(0))
PAIRS = torch.tensor([[1, 2], [3, 4], [5, 6]])
LAST, EVERY = (4, 9, 14), tuple(range(15))

METRICS: dict[str, tuple[Callable[[Tensor], Any], tuple[int, ...], tuple[int, ...] | None]] = {
    "gathered": (lambda x: x[:, -1, :].gather(-1, PAIRS).diff(dim=-1).mean(), LAST, (1, 2, 3, 4, 5, 6)),
    "indexed": (lambda x: x[:, -1][torch.arange(N), PAIRS[:, 0]].mean(), LAST, (1, 3, 5)),
    "indexed at once": (lambda x: x[torch.arange(N), torch.tensor([4, 3, 2]), PAIRS[:, 0]], (4, 8, 12), (1, 3, 5)),
    "two numbers": (lambda x: x[0, -1, 3] - x[0, -1, 5], (4,), (3, 5)),
    "from the end": (lambda x: x[:, -1, -1].mean(), LAST, (10,)),
    "one by one": (lambda x: torch.stack([x[i, -1, a] for i, a in enumerate(PAIRS[:, 0])]), LAST, (1, 3, 5)),
    "along": (lambda x: torch.take_along_dim(x[:, -1], PAIRS, 1).sum(), LAST, (1, 2, 3, 4, 5, 6)),
    "columns": (lambda x: x[..., [2, 4]].mean(), EVERY, (2, 4)),
    "in another dtype": (lambda x: x.double()[:, -1, 4].sum(), LAST, (4,)),
    "rows in a list": (lambda x: x.view(-1, D_VOCAB)[4::5, 2], LAST, (2,)),
    "positions first": (lambda x: x.permute(1, 0, 2)[-1].amax(), LAST, None),
    "probabilities": (lambda x: x[:, -1].softmax(-1)[:, 3], LAST, None),
    "best": (lambda x: (x[:, -1].argmax(-1) == PAIRS[:, 0]).float(), LAST, None),
    "where positive": (lambda x: x[:, -1][x[:, -1] > 0].sum(), LAST, None),
    "loss": (
        lambda x: F.cross_entropy(x[:, :-1].reshape(-1, D_VOCAB), torch.arange(12) % 7),
        tuple(i for i in EVERY if i not in LAST),
        None,
    ),
    "probabilities of all": (lambda x: x.log_softmax(-1)[:, -1, 2], EVERY, None),
    "itself": (lambda x: x[:, 0, :].select(-1, 2), (0, 5, 10), (2,)),
}


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_reads_what_it_reads_and_gets_the_same_numbers(name: str) -> None:
    metric, rows, columns = METRICS[name]
    reads = reads_of(metric, (N, LENGTH, D_VOCAB), FULL.dtype)
    assert reads is not None
    assert (reads.rows, reads.columns) == (rows, columns)
    assert torch.allclose(result_of(metric, held(rows, columns)), torch.as_tensor(metric(FULL)), atol=1e-6)


def held(rows: tuple[int, ...], columns: tuple[int, ...] | None) -> Tensor:
    """Logits of which the others are not there."""
    place = torch.full((N * LENGTH,), -1)
    place[list(rows)] = torch.arange(len(rows))
    some = FULL.view(-1, D_VOCAB)[list(rows)]
    some = some if columns is None else some[:, list(columns)]
    return held_logits(some, place.view(N, LENGTH), {c: i for i, c in enumerate(columns or ())}, D_VOCAB)


def _sets(x: Tensor) -> Tensor:
    x[:, -1, 3] = -9.0
    return x[:, -1].amax()


def _takes_away(x: Tensor) -> Tensor:
    taken = x[:, -1, 3]
    taken -= 5
    return x[:, -1].amax()


def _adds(x: Tensor) -> Tensor:
    return x.add_(1)[0, -1, 2]


WRITING: dict[str, Callable[[Tensor], Any]] = {
    "an entry": _sets,
    "what it was given": _takes_away,
    "all": _adds,
    "as numpy": lambda x: float(x.numpy().sum()),
    "nothing": lambda x: 1.0,
}


@pytest.mark.parametrize("name", WRITING)
def test_a_metric_that_cannot_be_followed_is_given_everything(name: str) -> None:
    assert reads_of(WRITING[name], (N, LENGTH, D_VOCAB), FULL.dtype) is None


def test_what_is_not_held_cannot_be_read() -> None:
    with pytest.raises(NotHeld):
        result_of(lambda x: x[:, 0, 3], held(LAST, (3,)))
    with pytest.raises(NotHeld):
        result_of(lambda x: x[:, -1, 4], held(LAST, (3,)))
    with pytest.raises(NotHeld):
        result_of(lambda x: x[:, -1].amax(), held(LAST, (3,)))
    with pytest.raises(NotHeld):
        result_of(_takes_away, held(LAST, None))


def _catches(x: Tensor) -> Tensor:
    try:
        return x[:, 1 if x[0, -1, 3] else -1, 3].mean()
    except Exception:
        return torch.tensor(0.0)


def test_what_a_metric_catches_is_not_forgotten() -> None:
    reads = reads_of(_catches, (N, LENGTH, D_VOCAB), FULL.dtype)
    assert reads is not None
    with pytest.raises(NotHeld):
        result_of(_catches, held(reads.rows, reads.columns))


OUT_OF_BOUNDS: dict[str, Callable[[Tensor], Any]] = {
    "gathered": lambda x: x[:, -1].gather(-1, PAIRS + D_VOCAB),
    "gathered from the end": lambda x: x[:, -1].gather(-1, -PAIRS),
    "indexed": lambda x: x[torch.arange(N), -1, PAIRS[:, 0] + D_VOCAB],
    "selected": lambda x: x[:, -1].select(-1, D_VOCAB),
}


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_an_id_out_of_bounds_is_left_to_torch(name: str) -> None:
    assert reads_of(OUT_OF_BOUNDS[name], (N, LENGTH, D_VOCAB), FULL.dtype) is None
    with pytest.raises((IndexError, RuntimeError)):
        OUT_OF_BOUNDS[name](FULL)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bool])
def test_a_cast_that_loses_something_is_made(dtype: torch.dtype) -> None:
    def metric(x: Tensor) -> Tensor:
        return x.to(dtype).float()[:, -1, 3]

    assert torch.equal(result_of(metric, held(EVERY, None)), metric(FULL))


SPEC = "experiment e { for h in head  run clean  patch node h with corrupt  measure mine, logit(answer) }"
DATA = {"clean": [[3, 5, 7, 9], [2, 5, 1, 9]], "corrupt": [[3, 6, 7, 9], [2, 4, 1, 9]], "answer": [11, 12]}


def test_a_run_computes_only_what_its_metrics_read() -> None:
    """As many FLOPs as the same metric of the language, and the same numbers."""
    model = patchc.load(gpt2())
    answers = torch.tensor(DATA["answer"])
    metrics = {"mine": lambda logits: logits[:, -1].gather(-1, answers[:, None])[:, 0]}
    compiled = model.compile(SPEC, DATA, metrics=metrics)
    own = model.compile(SPEC.replace("mine, ", ""), DATA)
    assert compiled.plan()[0].cost.flops == own.plan()[0].cost.flops
    result = compiled.run(check="all", progress=False)["e"]
    np.testing.assert_allclose(result["mine"], result["logit(answer)"], atol=1e-6)
