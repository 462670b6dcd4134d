"""The compiler on one page: the stages in order, each taking what the one before gives. Start reading here.

    text -parse-> tree -resolve-> study -lower-> variant DAG -optimise-> program -execute-> outcome -report-> result

What a spec says is in `parse` and `resolve`; what a model is, in `model`; everything fast is in `lower`, `optimise` and
`execute`; the same numbers computed naively, to check them, in `execute.hooks`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from patchc.codegen.emit import NOT_CAPTURED, CompiledGraph, compiled_graph
from patchc.diagnostics import RULES, Diagnostic, PatchcError, Report, Source
from patchc.execute.base import PlainRun
from patchc.execute.kept import Kept, NotKept
from patchc.execute.sweep import Outcome, Sweep
from patchc.ir.experiment import Experiment, ModelChoice, Prompts, Study
from patchc.ir.graph import ResidualGraph
from patchc.ir.program import Program
from patchc.lower import lower
from patchc.lower.every import Every, lower_every
from patchc.lower.masked import lower_masked
from patchc.model.load import LoadedModel
from patchc.optimise import optimise, reads
from patchc.optimise.passes import laws_without
from patchc.parse.tree import Spec
from patchc.resolve import resolve
from patchc.resolve.parameters import Literal

BAD_BUDGET = RULES.add("bad-memory", "an amount of memory that no pass can keep to")


@dataclass(frozen=True)
class Given:
    """What is given beside the spec: data, tensors, metric functions, and the values of `${NAME}`, by name."""

    data: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    metrics: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict[str, Callable[[Tensor], Tensor]])
    parameters: Mapping[str, Literal] = field(default_factory=dict[str, Literal])


@dataclass(frozen=True, slots=True)
class GraphForm:
    """What a compiled graph has masks for: every node or edge of the model, at each position or at all; None: the
    experiment's cells. `captures`: whether it gives what nodes write."""

    every: Every | None = None
    by_position: bool = False
    captures: bool = False


class Described(Protocol):
    """What is known of a model as far as no weights are needed: a loaded model, or an outline."""

    @property
    def graph(self) -> ResidualGraph: ...
    @property
    def tokenizer(self) -> Any | None: ...
    @property
    def bos(self) -> bool | None: ...
    @property
    def element(self) -> int: ...


@contextmanager
def without_collection() -> Generator[None]:
    """Planning makes many objects that stay and no cycles: looking for garbage among them would take most of the
    time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@without_collection()
def to_study(
    tree: Spec, source: Source, model: Described, choice: ModelChoice | None, base: Path, given: Given
) -> tuple[Study, tuple[Diagnostic, ...]]:
    """Syntax tree to resolved study, and its warnings. Raises every error that it finds at once."""
    resolved = resolve(
        tree,
        source,
        model.graph,
        model.tokenizer,
        base=base,
        model=choice,
        data=given.data,
        tensors={name: tuple(tensor.shape) for name, tensor in given.tensors.items()},
        metrics=tuple(given.metrics),
        parameters=given.parameters,
        bos=model.bos,
    )
    return resolved.study, resolved.warnings


@without_collection()
def to_programs(study: Study, model: Described, budget: int) -> tuple[Program, ...]:
    """Every experiment's program, a pass holding at most `budget` bytes; errors of all experiments are raised
    together."""
    if budget <= 0:
        raise BAD_BUDGET.error("a pass needs some memory")
    report = Report()
    out: list[Program] = []
    for experiment in study.experiments:
        try:
            out.append(to_program(experiment, study.prompts, model, budget))
        except PatchcError as error:
            for diagnostic in error.diagnostics:
                report.add(diagnostic)
    report.raise_errors()
    return tuple(out)


def to_program(
    experiment: Experiment, prompts: Prompts, model: Described, budget: int, without: Set[str] = frozenset()
) -> Program:
    """One experiment, folded into a variant DAG and cut into passes; `without` names passes of the optimiser to leave
    out, which changes no result."""
    ends = reads.ends(experiment.metrics, prompts)
    lowered = lower(experiment, prompts, model.graph, ends, laws=laws_without(without))
    return optimise(experiment, prompts, lowered, ends, budget, model.element, without)


def to_graph(
    experiment: Experiment,
    prompts: Prompts,
    model: LoadedModel,
    tensors: Mapping[str, Tensor],
    form: GraphForm | None = None,
) -> CompiledGraph:
    """One experiment as one differentiable fx graph with a mask a cell, or as `form` says."""
    form = form or GraphForm()
    inputs = tuple(w for w in reads.worlds(experiment, prompts) if prompts.world(w).layout is None)
    if form.every is not None:
        cells = lower_every(experiment, prompts, model.graph, form.every, form.by_position)
        inputs = inputs if form.every is not Every.NONE else inputs[:1]
    else:
        found = (end.probe for end in reads.ends(experiment.metrics, prompts))
        probes = tuple(probe for probe in found if probe is not None and probe.site not in NOT_CAPTURED)
        cells = lower_masked(experiment, prompts, model.graph, probes)
    return compiled_graph(cells, model.pieces, inputs, tensors, captures=form.captures)


def execute(
    program: Program,
    model: LoadedModel,
    given: Given,
    runs: dict[str, PlainRun],
    progress: Callable[[int], None] | None = None,
    kept: Kept | None = None,
) -> Outcome:
    """A program's numbers. `runs` keeps the plain runs for the next experiment on the same data; `kept` has the passes
    that need not be run again."""
    tables = model.pieces.tables(program.prompts.layout)
    return Sweep(program, model.pieces, tables, given.metrics, given.tensors, runs, kept or NotKept()).run(progress)
