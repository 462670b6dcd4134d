"""The compiler on one page: the stages in order, each taking what the one before gives. Start reading here.

    text --parse--> tree --resolve--> study --lower--> variant DAG --optimise--> program --execute--> outcome --report--> result

What a spec says is in `parse` and `resolve`; what a model is, in `model`; everything fast is in `lower`, `optimise` and
`execute`; the same numbers computed naively, to check them, in `execute.hooks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from patchc.diagnostics import Diagnostic, Report, Source
from patchc.execute.base import PlainRun
from patchc.execute.sweep import Outcome, Sweep
from patchc.ir.experiment import Experiment, Prompts, Study
from patchc.ir.program import Program
from patchc.lower import lower
from patchc.model.load import LoadedModel
from patchc.optimise import optimise, reads
from patchc.optimise.cut import DEFAULT_BUDGET
from patchc.parse import parse
from patchc.parse.tree import Spec
from patchc.resolve import resolve

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Given:
    """What Python gives beside the spec: data, tensors and metric functions, by name."""

    data: Any = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    metrics: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict[str, Callable[[Tensor], Tensor]])


def read(source: Source) -> Spec:
    """Text to syntax tree."""
    return parse(source)


def study(tree: Spec, source: Source, model: LoadedModel, base: Path, given: Given) -> tuple[Study, tuple[Diagnostic, ...]]:
    """Syntax tree to resolved study, and its warnings. Raises every error that it finds at once."""
    resolved = resolve(
        tree,
        source,
        model.graph,
        model.tokenizer,
        base=base,
        data=given.data,
        tensors={name: tuple(tensor.shape) for name, tensor in given.tensors.items()},
        metrics=tuple(given.metrics),
        bos=model.bos,
    )
    return resolved.study, resolved.warnings


def programs(study: Study, model: LoadedModel, budget: int = DEFAULT_BUDGET) -> tuple[Program, ...]:
    """Every experiment's program; errors of all experiments are raised together."""
    report = Report()
    out = [program for e in study.experiments if (program := _program(e, study.prompts, model, budget, report)) is not None]
    report.raise_errors()
    return tuple(out)


def _program(experiment: Experiment, prompts: Prompts, model: LoadedModel, budget: int, report: Report) -> Program | None:
    from patchc.diagnostics import PatchcError

    measured = reads.measured_tokens(experiment.metrics, prompts.layout)
    try:
        lowered = lower(experiment, prompts, model.graph, measured)
    except PatchcError as error:
        for diagnostic in error.diagnostics:
            report.add(diagnostic)
        return None
    return optimise(experiment, prompts, lowered, measured, budget, model.pieces.dtype.itemsize)


def execute(
    program: Program, model: LoadedModel, given: Given, runs: dict[str, PlainRun], progress: Progress | None = None
) -> Outcome:
    """A program's numbers. `runs` keeps the plain runs for the next experiment on the same data."""
    tables = model.pieces.tables(program.prompts.layout)
    return Sweep(program, model.pieces, tables, given.metrics, given.tensors, runs).run(progress)
