"""From final streams to metrics: logits where they are read, a number a prompt, float64.

What is reported of these numbers is for `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.execute.indices import rows
from patchc.execute.statistics import Ends, Numbers, numbers
from patchc.ir.experiment import (
    Called,
    Constant,
    Expression,
    Kl,
    Measure,
    Metric,
    Product,
    Prompts,
    Quotient,
    Read,
    Sum,
)
from patchc.ir.tokens import Tokens
from patchc.model.pieces import Pieces
from patchc.optimise.reads import leaves

METRIC_FAILED = RULES.add("metric-failed", "a Python metric raised an error", exit=3)
METRIC_SHAPE = RULES.add("metric-shape", "a Python metric gave numbers of another shape than one a prompt", exit=3)

MetricFunction = Callable[[Tensor], Tensor]
UNEMBED_ROWS = 480


@dataclass
class Readout:
    """Evaluates an experiment's metrics on final streams `[measured token, d_model]`. `world_streams` are the plain
    runs' whole final streams."""

    pieces: Pieces
    prompts: Prompts
    measured: Tokens
    columns: tuple[int, ...] | None
    functions: Mapping[str, MetricFunction]
    world_streams: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        self.places = {int(t): i for i, t in enumerate(rows(self.measured))}
        self.column_of = {c: i for i, c in enumerate(self.columns or ())}
        self._log_probs: dict[str, Tensor] = {}
        self._of_all_prompts: set[str] = set()
        """Functions that give one number for all prompts together: there is no error of their mean."""

    # ---- logits
    def logits(self, streams: Tensor) -> Tensor:
        """`[cell, measured token, d_model]` to `[cell, measured token, column or d_vocab]`, float64."""
        cells, n, width = streams.shape
        columns = None if self.columns is None else torch.tensor(self.columns, device=streams.device)
        parts = [self.pieces.unembed(x, columns) for x in streams.reshape(-1, width).split(UNEMBED_ROWS)]
        return torch.cat(parts).double().view(cells, n, -1)

    def of_world(self, world: str) -> Tensor:
        """A plain run's final stream at the measured tokens, as one cell."""
        return self.world_streams[world][rows(self.measured)][None]

    # ---- numbers
    def per_prompt(self, expression: Expression, logits: Tensor) -> Tensor:
        """`[cell, prompt]`."""
        match expression:
            case Read():
                return self._read(expression, logits)
            case Kl(world, tokens):
                return self._kl(world, tokens, logits)
            case Called(name):
                return self._called(name, logits)
            case Constant(number):
                return torch.full((len(logits), self.prompts.layout.n_prompts), number, dtype=torch.float64)
            case Sum(terms):
                return sum(
                    (f * self.per_prompt(e, logits) for f, e in terms[1:]),
                    terms[0][0] * self.per_prompt(terms[0][1], logits),
                )
            case Product(factors):
                out = self.per_prompt(factors[0], logits)
                for factor in factors[1:]:
                    out = out * self.per_prompt(factor, logits)
                return out
            case Quotient(over, under):
                return self.per_prompt(over, logits) / self.per_prompt(under, logits)

    def _read(self, read: Read, logits: Tensor) -> Tensor:
        at = [self.places[t] for t in read.tokens]
        here = logits[:, at]
        if read.measure is Measure.LOGIT:
            chosen = [
                [self.column_of.get(a, a) if self.columns is not None else a for a in answers]
                for answers in read.answers
            ]
            return torch.stack([here[:, i, c].mean(-1) for i, c in enumerate(chosen)], -1).cpu()
        logprobs = here.log_softmax(-1)
        picked = torch.stack([logprobs[:, i, list(a)].logsumexp(-1) for i, a in enumerate(read.answers)], -1)
        match read.measure:
            case Measure.LOGPROB:
                out = picked
            case Measure.LOSS:
                out = -picked
            case Measure.PROB:
                out = picked.exp()
            case Measure.RANK | Measure.CORRECT:
                best = torch.stack([here[:, i, list(a)].amax(-1) for i, a in enumerate(read.answers)], -1)
                rank = (here > best[..., None]).sum(-1).double() + here.sum(-1) * 0  # NaN where a logit is not finite
                out = rank if read.measure is Measure.RANK else (rank == 0).double()
        return out.cpu()

    def _kl(self, world: str, tokens: tuple[int, ...], logits: Tensor) -> Tensor:
        if world not in self._log_probs:
            self._log_probs[world] = self.logits(self.of_world(world))[0].log_softmax(-1)
        at = [self.places[t] for t in tokens]
        theirs = self._log_probs[world][at]
        return (theirs.exp() * (theirs - logits[:, at].log_softmax(-1))).sum(-1).cpu()

    def _called(self, name: str, logits: Tensor) -> Tensor:
        layout = self.prompts.layout
        out: list[Tensor] = []
        for cell in logits.to(self.pieces.dtype):
            value = self._result_of(name, cell.view(layout.n_prompts, layout.lengths[0], -1))
            if value.numel() not in (1, layout.n_prompts):
                raise METRIC_SHAPE.error(
                    f"`{name}` gave numbers of shape {list(value.shape)}; a metric gives one number,"
                    f" or one a prompt: [{layout.n_prompts}]"
                )
            if value.numel() < layout.n_prompts:
                self._of_all_prompts.add(name)
            out.append(value.reshape(-1).expand(layout.n_prompts))
        return torch.stack(out).detach().cpu()

    def _result_of(self, name: str, logits: Tensor) -> Tensor:
        try:
            return torch.as_tensor(self.functions[name](logits)).double()
        except Exception as error:
            raise METRIC_FAILED.error(f"the Python metric `{name}` failed: {type(error).__name__}: {error}") from error

    # ---- means
    def numbers(self, metric: Metric, values: Tensor) -> Numbers:
        """What is reported of `values` `[cell, prompt]`."""
        return numbers(metric, values, self.ends(metric), self._is_together(metric))

    def ends(self, metric: Metric) -> Ends | None:
        """The metric in the two worlds between which it is normalised, if it is."""
        if metric.zero is None or metric.one is None:
            return None
        zero, one = (self._unpatched(metric, world) for world in (metric.zero, metric.one))
        return Ends(zero[0], one[0])

    def _unpatched(self, metric: Metric, world: str) -> Tensor:
        """`[1, prompt]`: the metric in a plain run."""
        return self.per_prompt(metric.expression, self.logits(self.of_world(world)))

    def _is_together(self, metric: Metric) -> bool:
        """Whether a part of the metric is one number for all prompts."""
        return any(isinstance(x, Called) and x.name in self._of_all_prompts for x in leaves(metric.expression))
