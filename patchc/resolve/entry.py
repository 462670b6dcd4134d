"""Whether a value can enter where a patch starts: widths of tensors, what goes with patterns and scores, and
positions that a mean of other data has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from patchc.diagnostics import RULES, Span
from patchc.ir.bits import bits
from patchc.ir.experiment import Blocked, Given, Mean, Moved, Noise, Source, Value, World
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Site, Step
from patchc.resolve.data import Dataset
from patchc.resolve.tensors import TENSOR_SHAPE, Tensors

VALUE_SITE = RULES.add("value-site", "a value that cannot enter at the site where it is put")
MEAN_POSITION = RULES.add("mean-position", "a mean of other data at a position that no prompt there has")

ENTRIES = (Site.PATTERN, Site.SCORES)


@dataclass(frozen=True, slots=True)
class Entry:
    """Checks values against starts. `worlds` are those of other data."""

    graph: ResidualGraph
    tensors: Tensors
    dataset: Dataset
    worlds: Mapping[str, World]
    _lengths: dict[str, int] = field(default_factory=dict[str, int])

    def check(self, step: Step, value: Value, span: Span | None) -> None:
        """Raise what is wrong with a value at a start."""
        for factor, source in value.terms:
            if isinstance(source, Moved) and step.site is Site.SCORES and (factor != 1 or len(value.terms) > 1):
                self._check_row(step, source, span)
            match source:
                case Given(key):
                    self._check_tensor(step, key, span)
                case Blocked() if step.site is not Site.SCORES:
                    fix = "head[l, h].scores[dest, src] with blocked"
                    raise VALUE_SITE.error("`blocked` is no attention: a value of scores alone", fix=fix, span=span)
                case Noise(relative=True) if step.site in ENTRIES:
                    message = f"the rows of .{step.site} differ in length, so that no one deviation is their own"
                    raise VALUE_SITE.error(message, fix="as in `noise(std=0.1, seed=0)`", span=span)
                case Mean() | Moved():
                    self._check_mean(step, source, span)
                case _:
                    pass

    # ---- tensors

    def _check_tensor(self, step: Step, key: str, span: Span | None) -> None:
        shape = self.tensors.shapes[key]
        rows = None if len(shape) == 1 else self._rows(key, shape, span)
        self._check_takes_tensor(step, rows is not None, span)
        fitting = [(*(rows or ()), w) for w in self._widths(step)]
        if shape not in fitting:
            told = " or ".join(str(list(found)) for found in fitting)
            message = f"tensor {key!r} has shape {list(shape)}, and what it replaces has {told}"
            raise TENSOR_SHAPE.error(message, span=span)

    def _rows(self, key: str, shape: Sequence[int], span: Span | None) -> tuple[int, int]:
        """How many prompts and positions a tensor with a row a token has to have."""
        lengths = self.dataset.layout.lengths
        if len(set(lengths)) == 1 and len(lengths) == len(self.dataset.lengths) and lengths == self.dataset.lengths:
            return len(lengths), lengths[0]
        why = "the prompts differ in length" if len(set(self.dataset.lengths)) > 1 else "an answer follows each prompt"
        message = f"tensor {key!r} has shape {list(shape)}, a row a token, and {why}"
        raise TENSOR_SHAPE.error(message, fix="give a vector, [d], or prompts of one length", span=span)

    def _widths(self, step: Step) -> list[int]:
        match step.site:
            case Site.Q | Site.K | Site.V:
                return [self.graph.d_head]
            case Site.SCORES | Site.PATTERN:
                return [max(self.dataset.layout.lengths)]
            case Site.POST:
                return [self.graph.d_mlp, *([1] if step.neurons.bit_count() == 1 and step.neurons > 0 else [])]
            case _:
                return [self.graph.d_model]

    def _check_takes_tensor(self, step: Step, has_rows: bool, span: Span | None) -> None:
        """A tensor is the output of one node: of several together it would be unclear whether each writes it."""
        if step.site is Site.Z:
            fix = "patch the head itself, with what it writes: [d_model]"
            raise TENSOR_SHAPE.error("a tensor cannot stand for a head's z", fix=fix, span=span)
        if step.site in ENTRIES and not has_rows:
            message = f"a vector cannot stand for .{step.site}, whose rows differ in length"
            fix = "write `zero`, `mean` or another world, or give a row a token, [prompt, pos, pos]"
            raise VALUE_SITE.error(message, fix=fix, span=span)
        if step.site is Site.OUT and step.nodes == self.graph.all:
            message = "a tensor stands for one node's output, and `patch all` puts its value in at every node"
            fix = "patch one node or path, or write `zero`, `mean` or a world"
            raise TENSOR_SHAPE.error(message, fix=fix, span=span)
        if step.site is Site.OUT and step.nodes.bit_count() != 1:
            names = ", ".join(n.name for n in self.graph.members(step.nodes)[:3])
            message = f"a tensor takes the place of one node, and this start is several ({names}, ...)"
            raise TENSOR_SHAPE.error(message, fix="sweep over the nodes, or name one", span=span)

    def _check_row(self, step: Step, source: Moved, span: Span | None) -> None:
        """A row of scores has minus infinity at what comes after it, with which nothing can be calculated."""
        layout = self.dataset.layout
        for token in bits(step.tokens & layout.all) if self.graph.causal else ():
            own, other = layout.place(token)[1], layout.place(source.tokens[token])[1]
            between = ((1 << max(own - other, 0)) - 1) << token + 1 - max(own - other, 0)
            if step.sources & between:
                message = (
                    f"position {other} does not see what comes after it: where its scores stand for those of "
                    f"position {own}, they take no factor and no sum"
                )
                fix = "write the value of another position alone, or patch `.pattern`, in which what is hidden is 0"
                raise VALUE_SITE.error(message, fix=fix, span=span)

    # ---- means

    def _check_mean(self, step: Step, source: Source, span: Span | None) -> None:
        at = source.tokens if isinstance(source, Moved) else None
        mean = source.source if isinstance(source, Moved) else source
        if not isinstance(mean, Mean):
            return
        if mean.over_positions:
            if step.site in ENTRIES:
                message = f"the rows of .{step.site} differ in length, and have no mean over positions"
                raise VALUE_SITE.error(message, fix=f"write `mean({mean.world})`", span=span)
        elif mean.world in self.worlds:
            tokens = bits(step.tokens & self.dataset.layout.all)
            self._check_positions(mean.world, [at[t] if at else t for t in tokens], span)

    def _check_positions(self, world: str, tokens: Sequence[int], span: Span | None) -> None:
        """Other data have no answers that follow their prompts, and a last position of their own."""
        lengths = self.dataset.lengths
        if world not in self._lengths:
            self._lengths[world] = max(map(len, self.worlds[world].ids))
        longest = self._lengths[world]
        for row, position in map(self.dataset.layout.place, tokens):
            if position < min(longest, lengths[row % len(lengths)]):
                continue
            lacking = f"its longest prompt has {longest} tokens" if position >= longest else "no answer follows there"
            message = f"the mean of {world} is needed at position {position}; {lacking}"
            file, column = world.rsplit(":", 1)
            fix = f'write `mean("{file}", {column}, over=positions)`'
            raise MEAN_POSITION.error(message, fix=fix, span=span)
