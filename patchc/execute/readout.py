"""From what cells have at the ends of their paths to metrics: logits where they are read, a number a prompt, float64.

What is reported of these numbers is for `statistics`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.execute.indices import CPU, rows
from patchc.execute.patterns import PlainRows
from patchc.execute.places import probe_place
from patchc.execute.read_logits import NOT_HELD, NotHeld, held_logits, result_of
from patchc.execute.statistics import Ends, Numbers, numbers
from patchc.execute.stored import Stored
from patchc.ir.bits import bits
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
from patchc.ir.leaves import leaves
from patchc.ir.ops import PATTERN, SCORES
from patchc.ir.paths import Site
from patchc.ir.program import End
from patchc.model.pieces import Pieces, Tables

METRIC_FAILED = RULES.add("metric-failed", "a Python metric raised an error", exit=3)
METRIC_READS = RULES.add(
    "metric-reads-elsewhere", "a Python metric reads logits in one cell that it does not read in others", exit=3
)
METRIC_SHAPE = RULES.add("metric-shape", "a Python metric gave numbers of another shape than one a prompt", exit=3)

MetricFunction = Callable[[Tensor], Tensor]
UNEMBED_ROWS = 480


@dataclass(frozen=True, slots=True)
class Readings:
    """What was read of some cells, in float64: `logits` `[cell, measured token, column or d_vocab]` (empty where no
    metric reads them), and `nodes[probe]` `[cell, its token, width]`."""

    n_cells: int
    logits: Tensor
    nodes: Mapping[Probe, Tensor]


@dataclass
class Readout:
    """Evaluates an experiment's metrics on what its cells have at the ends `read_at`: for the logits the final stream,
    `[measured token, d_model]`."""

    pieces: Pieces
    prompts: Prompts
    read_at: tuple[End, ...]
    columns: tuple[int, ...] | None
    functions: Mapping[str, MetricFunction]
    stored: Stored
    tables: Tables

    def __post_init__(self) -> None:
        self.row_of = {end.probe: {t: i for i, t in enumerate(bits(end.tokens))} for end in self.read_at}
        self.places = self.row_of.get(None, {})
        self.column_of = {c: i for i, c in enumerate(self.columns or ())}
        self._log_probs: dict[str, Tensor] = {}
        self._of_all_prompts: set[str] = set()
        """Functions that give one number for all prompts together: there is no error of their mean."""

    # ---- what is read
    def readings(self, at_ends: Sequence[Tensor]) -> Readings:
        """From what some cells have at each end, `[cell, token, width]`."""
        found = {end.probe: x for end, x in zip(self.read_at, at_ends, strict=True)}
        final = found.pop(None, None)
        logits = torch.empty(0) if final is None else self._logits(final)
        return Readings(len(at_ends[0]), logits, {p: x.double() for p, x in found.items() if p is not None})

    def _logits(self, streams: Tensor) -> Tensor:
        """`[cell, measured token, d_model]` to `[cell, measured token, column or d_vocab]`, float64."""
        cells, n, width = streams.shape
        columns = None if self.columns is None else torch.tensor(self.columns, device=streams.device)
        parts = [self.pieces.unembed(x, columns) for x in streams.reshape(-1, width).split(UNEMBED_ROWS)]
        return torch.cat(parts).double().view(cells, n, -1)

    def at_end(self, end: End, world: str) -> Tensor:
        """What a plain run has at an end, `[token, width]`."""
        run, probe = self.stored.runs[world], end.probe
        if probe is not None and probe.site in (Site.SCORES, Site.PATTERN):
            return self._entries(probe, world, rows(end.tokens, CPU))
        values = run.stream[-1] if probe is None else probe_place(self.pieces, probe).read(run)
        return values[rows(end.tokens, values.device)]

    def _entries(self, probe: Probe, world: str, at: Tensor) -> Tensor:
        node = self.pieces.graph.members(probe.nodes)[0]
        assert node.layer is not None
        assert node.head is not None
        plain = PlainRows(self.stored, self.tables, node.block, node.layer, node.head)
        port = SCORES if probe.site is Site.SCORES else PATTERN
        return plain.of_world(port, world, at, max(self.prompts.layout.lengths))

    def of_world(self, world: str) -> Readings:
        """A plain run, as one cell."""
        return self.readings([self.at_end(end, world)[None] for end in self.read_at])

    # ---- numbers
    def per_prompt(self, expression: Expression, read: Readings) -> Tensor:
        """`[cell, prompt]`."""
        match expression:
            case Read():
                return self._read(expression, read.logits)
            case Continuation():
                return self._continuation(expression, read.logits)
            case Kl(world, tokens):
                return self._kl(world, tokens, read.logits)
            case NodeRead():
                return self._node(expression, read.nodes[expression.probe])
            case Called():
                return self._called(expression, read.logits)
            case Constant(number):
                return torch.full((read.n_cells, self.prompts.n), number, dtype=torch.float64)
            case Sum(terms):
                return sum(
                    (f * self.per_prompt(e, read) for f, e in terms[1:]),
                    terms[0][0] * self.per_prompt(terms[0][1], read),
                )
            case Product(factors):
                out = self.per_prompt(factors[0], read)
                for factor in factors[1:]:
                    out = out * self.per_prompt(factor, read)
                return out
            case Quotient(over, under):
                return self.per_prompt(over, read) / self.per_prompt(under, read)

    def _node(self, leaf: NodeRead, values: Tensor) -> Tensor:
        """Of `[cell, token, width]` at a probe."""
        here = values[:, [self.row_of[leaf.probe][t] for t in leaf.tokens]]
        if leaf.key is not None:
            out = here @ self.stored.tensors[leaf.key].to(here)
        elif leaf.neuron >= 0:
            out = here[..., leaf.neuron]
        else:
            looked_at = [self.prompts.layout.place(t)[1] for t in leaf.sources]
            out = here[:, range(len(looked_at)), looked_at]
        return out.cpu()

    def _continuation(self, leaf: Continuation, logits: Tensor) -> Tensor:
        out: list[Tensor] = []
        for answer, tokens in zip(leaf.answers, leaf.tokens, strict=True):
            logprobs = logits[:, [self.places[t] for t in tokens]].log_softmax(-1)
            out.append(logprobs[:, range(len(answer)), list(answer)].sum(-1))
        return torch.stack(out, -1).cpu()

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
            self._log_probs[world] = self.of_world(world).logits[0].log_softmax(-1)
        at = [self.places[t] for t in tokens]
        theirs = self._log_probs[world][at]
        return (theirs.exp() * (theirs - logits[:, at].log_softmax(-1))).sum(-1).cpu()

    def _called(self, called: Called, logits: Tensor) -> Tensor:
        n, name = self.prompts.n, called.name
        out: list[Tensor] = []
        for cell in logits.to(self.pieces.dtype):
            value = self._result_of(name, self._given(called, cell))
            if value.numel() not in (1, n):
                raise METRIC_SHAPE.error(
                    f"`{name}` gave numbers of shape {list(value.shape)}; a metric gives one number,"
                    f" or one a prompt: [{n}]"
                )
            if value.numel() < n:
                self._of_all_prompts.add(name)
            out.append(value.reshape(-1).expand(n))
        return torch.stack(out).detach().cpu()

    def _given(self, called: Called, cell: Tensor) -> Tensor:
        """What a Python function is called with, `[prompt, pos, d_vocab]`, of `[measured token, column or d_vocab]`."""
        n, length, tokens = self.prompts.n, self.prompts.own_lengths[0], list(bits(self.prompts.alone))
        if not called.tokens and self.columns is None:
            return cell[[self.places[t] for t in tokens]].view(n, length, -1)
        rows = torch.tensor([self.places.get(t, NOT_HELD) for t in tokens], device=cell.device)
        return held_logits(cell, rows.view(n, length), self.column_of, self.pieces.graph.d_vocab)

    def _result_of(self, name: str, logits: Tensor) -> Tensor:
        try:
            return result_of(self.functions[name], logits).double()
        except NotHeld:
            raise METRIC_READS.error(
                f"the Python metric `{name}` reads logits here that it did not read of logits that are all zero",
                fix="let it read all of them always: `logits = logits.clone()` in its first line",
            ) from None
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
        return self.per_prompt(metric.expression, self.of_world(world))

    def _is_together(self, metric: Metric) -> bool:
        """Whether a part of the metric is one number for all prompts."""
        return any(isinstance(x, Called) and x.name in self._of_all_prompts for x in leaves(metric.expression))
