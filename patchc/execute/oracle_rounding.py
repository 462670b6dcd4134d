"""How far rounding may move a metric: an error in what is read of a run, passed on through the metric's arithmetic.

To first order, and from the hooks backend's numbers alone; what is made of it is for `execute.check`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.execute.oracle_metrics import Metrics, Run
from patchc.ir.experiment import (
    Called,
    Constant,
    Continuation,
    Expression,
    Kl,
    Measure,
    Metric,
    NodeRead,
    Product,
    Quotient,
    Read,
    Sum,
)


@dataclass(frozen=True)
class Rounding:
    """What a metric may change by when every number that is read of a run is off by `eps` of the largest beside it: of
    a token's logits, or of what a node has there. Such an error comes with any order of a model's sums."""

    metrics: Metrics
    eps: float

    def of(self, metric: Metric, run: Run) -> Tensor:
        """`[prompt]`, float64, in the metric's own unit, before it is normalised; the ends' errors are counted in."""
        own = self._error(metric.expression, run)
        if metric.zero is None or metric.one is None:
            return own
        value = self.metrics.numbers(metric, run).abs()
        # (x - zero) / (one - zero) moves with zero by 1 - value, and with one by value.
        return own * (1 + value + (1 - value).abs())

    def _error(self, expression: Expression, run: Run) -> Tensor:
        """`[prompt]`."""
        match expression:
            case Constant():
                return self._value(expression, run) * 0
            case Sum(terms):
                return torch.stack([abs(c) * self._error(e, run) for c, e in terms]).sum(0)
            case Product(factors):
                return self._of_product(factors, run)
            case Quotient(over, under):
                x, y = self._value(over, run), self._value(under, run)
                return (self._error(over, run) + (x / y).abs() * self._error(under, run)) / y.abs()
            case Called():
                return 2 * self._logit(run, tuple(range(len(run.logits)))).max().expand(self.metrics.prompts.n)
            case Kl(_, tokens):
                logit = self._logit(run, tokens)
                # An error d of the log-probabilities counts by how much p and q differ: at most sqrt(2 KL) (Pinsker).
                return 2 * logit * ((2 * self._value(expression, run).clamp_min(0)).sqrt() + logit)
            case Read():
                return self._of_read(expression, run)
            case Continuation(_, tokens):
                return torch.stack([2 * self._logit(run, at).sum() for at in tokens])
            case NodeRead():
                return self._of_node(expression, run)

    def _value(self, expression: Expression, run: Run) -> Tensor:
        return self.metrics.per_prompt(expression, run)

    def _of_product(self, factors: tuple[Expression, ...], run: Run) -> Tensor:
        values = torch.stack([self._value(e, run).abs() for e in factors])
        errors = [self._error(e, run) for e in factors]
        others = [torch.cat([values[:i], values[i + 1 :]]).prod(0) for i in range(len(factors))]
        return torch.stack([e * rest for e, rest in zip(errors, others, strict=True)]).sum(0)

    def _logit(self, run: Run, tokens: tuple[int, ...]) -> Tensor:
        """The error of logits at some tokens, `[token]`."""
        return self.eps * run.logits[list(tokens)].double().abs().amax(-1).cpu()

    def _of_read(self, read: Read, run: Run) -> Tensor:
        logit = self._logit(run, read.tokens)
        match read.measure:
            case Measure.LOGIT:
                return logit
            case Measure.LOGPROB | Measure.LOSS:
                return 2 * logit
            case Measure.PROB:
                return 2 * logit * self._value(read, run)
            case Measure.RANK:
                return self._ties(read, run, logit)
            case Measure.CORRECT:
                return self._ties(read, run, logit).clamp_max(1)

    def _ties(self, read: Read, run: Run, logit: Tensor) -> Tensor:
        """How many logits stand so close to the answer's best that they may change places with it, `[prompt]`."""
        rows = run.logits[list(read.tokens)].double().cpu()
        best = torch.stack([row[list(a)].max() for row, a in zip(rows, read.answers, strict=True)])
        close = ((rows - best[:, None]).abs() <= 2 * logit[:, None]).sum(-1)
        own = torch.tensor([len(a) for a in read.answers])
        return (close - own).clamp_min(0).double()

    def _of_node(self, node: NodeRead, run: Run) -> Tensor:
        rows = run.read(node.probe)[list(node.tokens)].double().abs().cpu()
        largest = rows.masked_fill(rows.isinf(), 0).amax(-1)
        norm = 1.0 if node.key is None else float(self.metrics.tensors[node.key].double().norm())
        return self.eps * norm * largest
