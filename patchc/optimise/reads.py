"""What the metrics of an experiment read: tokens, answer columns, worlds. Everything else is not computed at the
end."""

from __future__ import annotations

from collections.abc import Iterator

from patchc.ir.bits import bitset
from patchc.ir.experiment import (
    Called,
    Constant,
    Experiment,
    Expression,
    FromWorld,
    Kl,
    Mean,
    Measure,
    Metric,
    Moved,
    Product,
    Prompts,
    Quotient,
    Read,
    Source,
    Sum,
)
from patchc.ir.tokens import Layout, Tokens


def leaves(expression: Expression) -> Iterator[Read | Kl | Called]:
    """Everything that an expression reads from the logits."""
    match expression:
        case Read() | Kl() | Called():
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


def measured_tokens(metrics: tuple[Metric, ...], layout: Layout) -> Tokens:
    """Every token that a metric reads; a Python function reads all."""
    out = 0
    for metric in metrics:
        for leaf in leaves(metric.expression):
            out |= layout.all if isinstance(leaf, Called) else bitset(leaf.tokens)
    return out


def columns(metrics: tuple[Metric, ...]) -> tuple[int, ...] | None:
    """The token ids whose logits are read, or None where a metric needs the whole vocabulary."""
    found: set[int] = set()
    for metric in metrics:
        for leaf in leaves(metric.expression):
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
