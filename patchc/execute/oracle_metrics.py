"""Metrics from whole logits and activations, in double precision, as they are defined; for the hooks backend."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.ir.experiment import (
    Called,
    Constant,
    Continuation,
    Expression,
    Kl,
    Measure,
    Metric,
    NodeRead,
    Probe,
    Product,
    Prompts,
    Quotient,
    Read,
    Sum,
)

CALLED_SHAPE = RULES.add("hooks-metric", "a Python metric is not there, or gives neither one number nor one a prompt")
READ_TENSOR = RULES.add(
    "hooks-read-tensor", "a tensor that a metric names is not there, or has not the width of what is read"
)


class Run(Protocol):
    """What metrics read of a run."""

    @property
    def logits(self) -> Tensor:
        """`[token, d_vocab]`."""
        ...

    def read(self, probe: Probe) -> Tensor:
        """What stands at a probe, `[token, width]`."""
        ...


@dataclass(frozen=True)
class Metrics:
    """`world` gives a world's own run; `tensors` and `functions` are those that metrics name."""

    prompts: Prompts
    world: Callable[[str], Run]
    tensors: Mapping[str, Tensor]
    functions: Mapping[str, Callable[..., Any]]

    def numbers(self, metric: Metric, run: Run) -> Tensor:
        """`[prompt]`, float64, normalised where the metric is; their mean is the metric's number."""
        got = self.per_prompt(metric.expression, run)
        if metric.zero is None or metric.one is None:
            return got
        zero = self.per_prompt(metric.expression, self.world(metric.zero))
        one = self.per_prompt(metric.expression, self.world(metric.one))
        if metric.per_prompt:
            return (got - zero) / (one - zero)
        return (got - zero.mean()) / (one.mean() - zero.mean())

    def per_prompt(self, expression: Expression, run: Run) -> Tensor:
        """`[prompt]`, float64."""
        match expression:
            case Constant(number):
                return torch.full((self.prompts.n,), number, dtype=torch.float64)
            case Sum(terms):
                return sum((c * self.per_prompt(e, run) for c, e in terms), self._zeros())
            case Product(factors):
                return prod((self.per_prompt(e, run) for e in factors), start=self._zeros() + 1)
            case Quotient(over, under):
                return self.per_prompt(over, run) / self.per_prompt(under, run)
            case Called(name):
                return self._called(name, run.logits)
            case Kl(world, tokens):
                return _kl(_rows(self.world(world).logits, tokens), _rows(run.logits, tokens))
            case Read(measure, answers, tokens):
                rows = _rows(run.logits, tokens)
                return _numbers(read(measure, row, list(ids)) for row, ids in zip(rows, answers, strict=True))
            case Continuation(answers, tokens):
                pairs = zip(answers, tokens, strict=True)
                return _numbers(continuation(_rows(run.logits, at), list(ids)) for ids, at in pairs)
            case NodeRead():
                return self._node(expression, run.read(expression.probe))

    def _zeros(self) -> Tensor:
        return torch.zeros(self.prompts.n, dtype=torch.float64)

    def _node(self, node: NodeRead, x: Tensor) -> Tensor:
        rows = _rows(x, node.tokens)
        if node.sources:
            positions = [self.prompts.layout.place(source)[1] for source in node.sources]
            return rows[range(len(rows)), positions]
        if node.neuron >= 0:
            return rows[:, node.neuron]
        return rows @ self._tensor(node.key, rows.shape[1])

    def _tensor(self, key: str | None, width: int) -> Tensor:
        if key is None or key not in self.tensors:
            raise READ_TENSOR.error(f"no tensor {key!r} was given; there are: {', '.join(self.tensors) or 'none'}")
        x = self.tensors[key].double().cpu()
        if x.shape != (width,):
            raise READ_TENSOR.error(f"tensor {key!r} has shape {list(x.shape)}; here it must be [{width}]")
        return x

    def _called(self, name: str, logits: Tensor) -> Tensor:
        if name not in self.functions:
            have = ", ".join(self.functions) or "none"
            raise CALLED_SHAPE.error(f"no Python metric {name!r} was given; there are: {have}")
        function, n = self.functions[name], self.prompts.n
        # Each prompt once, and without an answer that follows it.
        lengths = self.prompts.own_lengths[:n]
        prompts = [x[:own] for x, own in zip(logits.split(self.prompts.layout.lengths)[:n], lengths, strict=True)]
        if len(set(lengths)) == 1:
            return _each(name, function(torch.stack(prompts)), n)
        return torch.cat([_each(name, function(x[None]), 1) for x in prompts])


def _rows(x: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """`[prompt, width]`, float64, at one token a prompt."""
    return x[list(tokens)].double().cpu()


def _numbers(numbers: Iterable[float]) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.float64)


def _kl(world: Tensor, patched: Tensor) -> Tensor:
    p, q = world.log_softmax(-1), patched.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _each(name: str, result: Any, n_prompts: int) -> Tensor:
    x = torch.as_tensor(result).detach().double().cpu()
    if x.numel() not in (1, n_prompts) or x.dim() > 1:
        raise CALLED_SHAPE.error(
            f"metric {name!r} gave shape {list(x.shape)}; it must give one number, or one a prompt"
        )
    return x.flatten().expand(n_prompts)


def continuation(logits: Tensor, answer: list[int]) -> float:
    """The log-probability of an answer's tokens one after another, from the logits `[token, d_vocab]` that predict
    them."""
    return logits.log_softmax(-1)[range(len(answer)), answer].sum().item()


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
