"""The values of patches inside a compiled graph: worlds, means, other tokens' values, tensors and noise.

Worlds, and means over all prompts, follow the graph's inputs, of any batch. Means by group, over prompts that answers
follow, values of other tokens, and noise are of the study's own prompts: with one of these the batch is fixed. A mean
over other data is a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, fx

from patchc.codegen.worlds import Worlds, aten
from patchc.diagnostics import RULES
from patchc.execute.averages import Average, average
from patchc.execute.base import PlainRun, run_world
from patchc.execute.noise import token_noise
from patchc.execute.places import Place
from patchc.ir.bits import bits
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Prompts, Source, Value

ONE_LENGTH = RULES.add("graph-needs-one-length", "a compiled graph names positions, and its prompts differ in length")
NOT_IN_A_GRAPH = RULES.add("not-in-a-graph", "a value that a compiled graph cannot hold; `run` has no such limit")
TINY = 1e-30
"""Less than any share of prompts: what is visible nowhere has mean 0."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One site in the graph: `of` a world, `[b, s, *shape]`, and `read` from a plain run, `[token, *shape]` (None where
    plain runs do not keep it). What equals `hidden` does not count in a mean."""

    shape: tuple[int, ...]
    of: Callable[[str], fx.Node]
    read: Callable[[PlainRun], Tensor] | None
    hidden: float | None = None


@dataclass
class Sources:
    """Writes values into the graph of `worlds`."""

    worlds: Worlds
    prompts: Prompts
    tensors: Mapping[str, Tensor]
    _runs: dict[str, PlainRun] = field(default_factory=dict[str, PlainRun])

    def combination(self, value: Value, site: Seen, own: fx.Node | None) -> fx.Node | None:
        """A value without its noise, `[b, s, *shape]` or what broadcasts to it; None where it is zero."""
        out: fx.Node | None = None
        for factor, source in value.terms:
            if not isinstance(source, Noise):
                term = self._source(source, site, own)
                term = term if factor == 1.0 else self.worlds.call(operator.mul, term, factor)
                out = self.worlds.plus(out, term)
        return out

    def noise(self, value: Value, place: Place, base: Callable[[], fx.Node]) -> fx.Node | None:
        """The noise in a value at a place, `[b, s, width]`; `base` gives what the base run has there."""
        out: fx.Node | None = None
        for factor, source in value.terms:
            if isinstance(source, Noise):
                numbers = torch.from_numpy(token_noise(source, place.name, self.prompts, place.width))
                term = self._constant("noise", self._by_prompt(numbers * source.std * factor))
                if source.relative:
                    term = self.worlds.call(aten.mul.Tensor, term, self._spread(base()))
                out = self.worlds.plus(out, term)
        return out

    def stacked(self, parts: Sequence[fx.Node | None], shape: tuple[int, ...]) -> fx.Node | None:
        """Noise by head, `[b, s, head, d_head]`, with zeros for heads that have none; None where no head has any."""
        if not any(part is not None for part in parts):
            return None
        zero = self._constant("zero", torch.zeros(self.prompts.layout.n_prompts, self.length(), *shape))
        return self.worlds.call(aten.stack.default, [zero if p is None else p for p in parts], 2)

    # ---- one source
    def _source(self, source: Source, site: Seen, own: fx.Node | None) -> fx.Node:
        match source:
            case FromWorld(world):
                return site.of(world)
            case Mean():
                return self._mean(source, site)
            case Moved(inner, tokens):
                return self._moved(inner, tokens, site)
            case Given(key):
                return self._given(self.tensors[key], site)
            case Itself():
                assert own is not None
                return own
            case Noise() | Blocked():
                raise AssertionError(f"{source} is no number of a run")

    def _given(self, tensor: Tensor, site: Seen) -> fx.Node:
        """`[d]`, or of a row a token what every head has: `[b, s, *1, d]`."""
        if tensor.dim() > 1:
            tensor = self._by_prompt(tensor).view(
                self.prompts.layout.n_prompts, self.length(), *[1] * (len(site.shape) - 1), -1
            )
        return self.worlds.buffer("given", tensor)

    def _mean(self, mean: Mean, site: Seen) -> fx.Node:
        if site.hidden is not None:
            return self._mean_of_visible(mean, site, site.hidden)
        if self.prompts.world(mean.world).layout is not None:
            values = self._of_other_data(mean, site)
            return self._constant("mean", values[None, :1] if mean.over_positions else self._by_prompt(values)[:1])
        if mean.groups is None and not self.prompts.own:
            return self.worlds.call(aten.mean.dim, site.of(mean.world), [0, 1] if mean.over_positions else [0], True)
        return self._restored(self._averaged(average(mean, self.prompts), site.of(mean.world)), site)

    def _mean_of_visible(self, mean: Mean, site: Seen, hidden: float) -> fx.Node:
        """The sum of what is visible by how often it is."""

        def shown(world: str, ones: bool) -> fx.Node:
            x = site.of(world)
            numbers = self.worlds.call(aten.ones_like.default, x) if ones else x
            return self.worlds.call(aten.masked_fill.Scalar, numbers, self.worlds.call(aten.eq.Scalar, x, hidden), 0.0)

        total, count = (
            self._mean(mean, replace(site, of=partial(shown, ones=ones), hidden=None)) for ones in (False, True)
        )
        return self.worlds.call(operator.truediv, total, self.worlds.call(aten.clamp_min.default, count, TINY))

    def _of_other_data(self, mean: Mean, site: Seen) -> Tensor:
        """A mean over other data, at every token of the study."""
        if site.read is None:
            raise NOT_IN_A_GRAPH.error("a compiled graph has no mean of other data's attention patterns or scores")
        return average(mean, self.prompts)(site.read(self._run(mean.world)))

    def _averaged(self, how: Average, x: fx.Node) -> fx.Node:
        """Every token's mean, `[token, -1]`."""
        weights = torch.zeros(how.n, self.prompts.layout.n_tokens, dtype=torch.float64)
        weights[list(how.into), list(how.counted)] = 1.0
        means = self._constant("weights", weights / weights.sum(1, keepdim=True))
        sums = self.worlds.call(aten.matmul.default, means, self._by_token(x))
        return self._picked(sums, how.of)

    def _moved(self, source: FromWorld | Mean, tokens: tuple[int, ...], site: Seen) -> fx.Node:
        if site.hidden is not None:
            raise NOT_IN_A_GRAPH.error("a compiled graph has no attention scores of other tokens")
        if isinstance(source, FromWorld):
            rows = self._by_token(site.of(source.world))
        elif self.prompts.world(source.world).layout is not None:
            rows = self._constant("mean", self._of_other_data(source, site).flatten(1))
        else:
            rows = self._averaged(average(source, self.prompts), site.of(source.world))
        return self._restored(self._picked(rows, tokens), site)

    def _spread(self, base: fx.Node) -> fx.Node:
        """The standard deviation of a site's numbers in the base run."""
        rows = self._by_token(base)
        if self.prompts.alone != self.prompts.layout.all:
            rows = self._picked(rows, tuple(bits(self.prompts.alone)))
        return self.worlds.call(aten.sqrt.default, self.worlds.call(aten.var.default, rows, False))

    # ---- tokens of the study
    def length(self) -> int:
        """The one length of the study's prompts."""
        lengths = set(self.prompts.layout.lengths)
        if len(lengths) > 1:
            raise ONE_LENGTH.error("a compiled graph with values of certain tokens needs prompts of one length")
        return lengths.pop()

    def _by_token(self, x: fx.Node) -> fx.Node:
        """`[b, s, ...]` to `[token, -1]`."""
        self.length()
        return self.worlds.call(aten.reshape.default, x, [self.prompts.layout.n_tokens, -1])

    def _restored(self, x: fx.Node, site: Seen) -> fx.Node:
        """`[token, -1]` to `[b, s, *shape]`."""
        return self.worlds.call(aten.reshape.default, x, [self.prompts.layout.n_prompts, self.length(), *site.shape])

    def _picked(self, x: fx.Node, rows: tuple[int, ...]) -> fx.Node:
        index = torch.tensor(rows, device=self.worlds.pieces.device)
        return self.worlds.call(aten.index_select.default, x, 0, self.worlds.buffer("tokens", index))

    def _by_prompt(self, x: Tensor) -> Tensor:
        return x.reshape(self.prompts.layout.n_prompts, self.length(), *x.shape[1:])

    def _constant(self, name: str, x: Tensor) -> fx.Node:
        return self.worlds.buffer(name, x.to(self.worlds.pieces.device, self.worlds.pieces.dtype))

    def _run(self, world: str) -> PlainRun:
        """The plain run of other data."""
        if world not in self._runs:
            pieces, data = self.worlds.pieces, self.prompts.world(world)
            assert data.layout is not None
            with torch.no_grad():
                self._runs[world] = run_world(pieces, data, data.layout, pieces.tables(data.layout))
        return self._runs[world]
