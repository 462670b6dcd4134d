"""What the metrics of an experiment read: tokens, answer columns, worlds. Everything else is not computed at the
end."""

from __future__ import annotations

from collections.abc import Iterator

from patchc.ir.bits import bitset
from patchc.ir.experiment import (
    Called,
    Constant,
    Continuation,
    Experiment,
    Expression,
    FromWorld,
    Kl,
    Leaf,
    Mean,
    Measure,
    Metric,
    Moved,
    NodeRead,
    Probe,
    Product,
    Prompts,
    Quotient,
    Read,
    Source,
    Sum,
)
from patchc.ir.program import End
from patchc.ir.tokens import Tokens


def leaves(expression: Expression) -> Iterator[Leaf]:
    """Everything that an expression reads from a run."""
    match expression:
        case Read() | Continuation() | Kl() | NodeRead() | Called():
            yield expression
        case Sum(terms):
            for _, term in terms:
                yield from leaves(term)
        case Product(factors):
            for factor in factors:
                yield from leaves(factor)
        case Quotient(over, under):
            yield from leaves(over)
            yield from leaves(under)
        case Constant():
            pass


def ends(metrics: tuple[Metric, ...], prompts: Prompts) -> tuple[End, ...]:
    """Where metrics read: the logits, if any does, then each probe; a Python function reads every prompt's tokens."""
    found: dict[Probe | None, Tokens] = {}
    for metric in metrics:
        for leaf in leaves(metric.expression):
            probe = leaf.probe if isinstance(leaf, NodeRead) else None
            found[probe] = found.get(probe, 0) | _tokens(leaf, prompts)
    return tuple(End(probe, found[probe]) for probe in sorted(found, key=lambda p: p is not None))


def _tokens(leaf: Leaf, prompts: Prompts) -> Tokens:
    match leaf:
        case Called():
            return prompts.alone
        case Continuation(_, tokens):
            return bitset(t for some in tokens for t in some)
        case Read() | Kl() | NodeRead():
            return bitset(leaf.tokens)


def columns(metrics: tuple[Metric, ...]) -> tuple[int, ...] | None:
    """The token ids whose logits are read, or None where a metric needs the whole vocabulary."""
    found: set[int] = set()
    for metric in metrics:
        for leaf in leaves(metric.expression):
            if isinstance(leaf, NodeRead):
                continue
            if not isinstance(leaf, Read) or leaf.measure is not Measure.LOGIT:
                return None
            found.update(i for answers in leaf.answers for i in answers)
    return tuple(sorted(found))


def _world_of(source: Source) -> str | None:
    match source:
        case FromWorld(world) | Mean(world):
            return world
        case Moved(inner, _):
            return inner.world
        case _:
            return None


def worlds(experiment: Experiment, prompts: Prompts) -> tuple[str, ...]:
    """The worlds that must be run: the base world first, then those of values and metrics, in the data's order."""
    used = {experiment.run}
    for metric in experiment.metrics:
        used |= {w for w in (metric.zero, metric.one) if w is not None}
        used |= {leaf.world for leaf in leaves(metric.expression) if isinstance(leaf, Kl)}
    for value in {patch.value for cell in experiment.cells for patch in cell.patches}:
        used |= {world for _, source in value.terms if (world := _world_of(source)) is not None}
    return (experiment.run, *(w.name for w in prompts.worlds if w.name in used and w.name != experiment.run))
