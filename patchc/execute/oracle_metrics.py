"""Metrics computed from whole logits, in double precision, as they are defined; for the hooks backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.ir.experiment import (
    Called,
    Constant,
    Expression,
    Kl,
    Measure,
    Metric,
    Product,
    Quotient,
    Read,
    Sum,
)
from patchc.ir.tokens import Layout

CALLED_SHAPE = RULES.add("hooks-metric", "a Python metric is not there, or gives neither one number nor one a prompt")

Logits = list[Tensor]
"""A run's logits, `[pos, d_vocab]` a prompt."""


@dataclass(frozen=True)
class Metrics:
    """`world` gives the logits of a world's own run; `functions` are the Python metrics by name."""

    layout: Layout
    world: Callable[[str], Logits]
    functions: Mapping[str, Callable[..., Any]]

    def value(self, metric: Metric, logits: Logits) -> float:
        """The mean over prompts, normalised where the metric is."""
        got = self.per_prompt(metric.expression, logits)
        if metric.zero is None or metric.one is None:
            return got.mean().item()
        zero = self.per_prompt(metric.expression, self.world(metric.zero))
        one = self.per_prompt(metric.expression, self.world(metric.one))
        if metric.per_prompt:
            return ((got - zero) / (one - zero)).mean().item()
        return ((got.mean() - zero.mean()) / (one.mean() - zero.mean())).item()

    def per_prompt(self, expression: Expression, logits: Logits) -> Tensor:
        """`[prompt]`, float64."""
        match expression:
            case Constant(number):
                return torch.full((self.layout.n_prompts,), number, dtype=torch.float64)
            case Sum(terms):
                return sum((c * self.per_prompt(e, logits) for c, e in terms), self._zeros())
            case Product(factors):
                return prod((self.per_prompt(e, logits) for e in factors), start=self._zeros() + 1)
            case Quotient(over, under):
                return self.per_prompt(over, logits) / self.per_prompt(under, logits)
            case Called(name):
                return self._called(name, logits)
            case Kl(world, tokens):
                return self._kl(self._rows(self.world(world), tokens), self._rows(logits, tokens))
            case Read(measure, answers, tokens):
                rows = self._rows(logits, tokens)
                numbers = [read(measure, row, list(ids)) for row, ids in zip(rows, answers, strict=True)]
                return torch.tensor(numbers, dtype=torch.float64)

    def _zeros(self) -> Tensor:
        return torch.zeros(self.layout.n_prompts, dtype=torch.float64)

    def _rows(self, logits: Logits, tokens: tuple[int, ...]) -> Tensor:
        """`[prompt, d_vocab]`, float64, at one token a prompt."""
        rows = [logits[prompt][position] for prompt, position in map(self.layout.place, tokens)]
        return torch.stack(rows).double().cpu()

    def _kl(self, world: Tensor, patched: Tensor) -> Tensor:
        p, q = world.log_softmax(-1), patched.log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)

    def _called(self, name: str, logits: Logits) -> Tensor:
        if name not in self.functions:
            have = ", ".join(self.functions) or "none"
            raise CALLED_SHAPE.error(f"no Python metric {name!r} was given; there are: {have}")
        function = self.functions[name]
        if len(set(self.layout.lengths)) == 1:
            return _each(name, function(torch.stack(logits)), self.layout.n_prompts)
        return torch.cat([_each(name, function(x[None]), 1) for x in logits])


def _each(name: str, result: Any, n_prompts: int) -> Tensor:
    x = torch.as_tensor(result).detach().double().cpu()
    if x.numel() not in (1, n_prompts) or x.dim() > 1:
        raise CALLED_SHAPE.error(
            f"metric {name!r} gave shape {list(x.shape)}; it must give one number, or one a prompt"
        )
    return x.flatten().expand(n_prompts)


def read(measure: Measure, logits: Tensor, answers: list[int]) -> float:
    """A number from the logits `[d_vocab]` of one token: a set's prob is the sum, its logprob that sum's log,
    its logit the mean, its rank that of its best member."""
    logprob = logits.log_softmax(-1)[answers].logsumexp(0)
    match measure:
        case Measure.LOGIT:
            return logits[answers].mean().item()
        case Measure.LOGPROB:
            return logprob.item()
        case Measure.LOSS:
            return -logprob.item()
        case Measure.PROB:
            return logits.softmax(-1)[answers].sum().item()
        case Measure.RANK:
            return float((logits > logits[answers].max()).sum().item())
        case Measure.CORRECT:
            return float(int(logits.argmax()) in answers)
