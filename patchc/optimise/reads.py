"""What the metrics of an experiment read: tokens, answer columns, worlds. Everything else is not computed at the
end."""

from __future__ import annotations

from patchc.ir.bits import bitset
from patchc.ir.experiment import (
    Called,
    Continuation,
    Experiment,
    FromWorld,
    Kl,
    Leaf,
    Mean,
    Measure,
    Metric,
    Moved,
    NodeRead,
    Probe,
    Prompts,
    Read,
    Source,
)
from patchc.ir.leaves import leaves
from patchc.ir.program import End
from patchc.ir.tokens import Tokens


def ends(metrics: tuple[Metric, ...], prompts: Prompts) -> tuple[End, ...]:
    """Where metrics read: the logits, if any does, then each probe. A Python function reads what it is
    known to, or every token."""
    found: dict[Probe | None, Tokens] = {}
    for metric in metrics:
        for leaf in leaves(metric.expression):
            probe = leaf.probe if isinstance(leaf, NodeRead) else None
            found[probe] = found.get(probe, 0) | _tokens(leaf, prompts)
    return tuple(End(probe, found[probe]) for probe in sorted(found, key=lambda p: p is not None))


def _tokens(leaf: Leaf, prompts: Prompts) -> Tokens:
    match leaf:
        case Called(_, tokens):
            return bitset(tokens) if tokens else prompts.alone
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
            if isinstance(leaf, Called) and leaf.columns is not None:
                found.update(leaf.columns)
            elif isinstance(leaf, Read) and leaf.measure is Measure.LOGIT:
                found.update(i for answers in leaf.answers for i in answers)
            else:
                return None
    return tuple(sorted(found))


def world_of(source: Source) -> str | None:
    """The world that a source of values is read from, if there is one."""
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
        used |= {world for _, source in value.terms if (world := world_of(source)) is not None}
    return (experiment.run, *(w.name for w in prompts.worlds if w.name in used and w.name != experiment.run))
