"""Measures one row: what TransformerLens gives, what the spec and patchc's function give, how far apart they are.

Where TransformerLens refuses, its error is in the row and the numbers are held against plain forward hooks.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import transformer_lens.patching
from torch import Tensor

import patchc
import patchc.transformer_lens
from patchc.api import Compiled
from patchc.execute.hooks import Oracle
from patchc.ir.experiment import Experiment
from patchc.report.results import Result, Results
from tests.parity.subjects import Subject, subject
from tests.parity.works import Work

EXAMPLES = Path(__file__).parents[2] / "examples" / "transformer_lens"
TOLERANCE = 1e-4
"""The largest difference that counts as equal, in the metric's unit (logits, nats)."""


@dataclass(frozen=True, slots=True)
class Side:
    """What patchc gave in one of its two ways. `difference`: the largest; infinite where the form differs, or nothing
    came, and `fault` says how. `seconds`: of CPU, of the last call."""

    difference: float
    fault: str | None
    seconds: float

    @property
    def equal(self) -> bool:
        return self.difference <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Row:
    """`refused`: TransformerLens' own error; the sides are then held against hooks. `effect`: how far apart the numbers
    of a metric are; None where they are not a metric's. `seconds`: of CPU, of TransformerLens."""

    work: Work
    model: str
    refused: str | None
    effect: float | None
    seconds: float
    spec: Side | None
    function: Side | None

    @property
    def sides(self) -> tuple[Side, ...]:
        return tuple(side for side in (self.spec, self.function) if side is not None)

    @property
    def equal(self) -> bool:
        return all(side.equal for side in self.sides)


def measure(work: Work, name: str, *, calls: int = 1) -> Row:
    """Run both sides of a row; patchc's, whose first call does more than others, so many times."""
    on = subject(name)
    theirs, refused, seconds = _theirs(work, on)
    if refused is not None:
        theirs = hooked(work, on)
    spec = None if work.spec is None else _side(theirs, lambda: run_spec(work, on), calls)
    function = _side(theirs, lambda: work.call(patchc.transformer_lens, on), calls)
    return Row(work, name, refused, _effect(theirs), seconds, spec, function)


# ---- the sides


def _theirs(work: Work, on: Subject) -> tuple[Any, str | None, float]:
    """What TransformerLens gives, or its error; and CPU seconds."""
    _ = on.model, on.clean_cache, on.corrupt_cache  # made here, so that they are not in what is timed
    try:
        found, seconds = _timed(lambda: work.call(transformer_lens.patching, on))
        return found, None, seconds
    except (ValueError, NotImplementedError) as error:
        return None, f"{type(error).__name__}: {error}", math.nan


def run_spec(work: Work, on: Subject) -> Tensor:
    """The example spec on the same prompts, arranged as TransformerLens does."""
    assert work.arrange is not None
    return work.arrange(_compiled(work, on).run(progress=False, write=False), on)


def _compiled(work: Work, on: Subject) -> Compiled:
    return on.model.compile(EXAMPLES / f"{work.spec}.patch", on.data)


def hooked(work: Work, on: Subject) -> Tensor:
    """The same numbers by torch's forward hooks, cell by cell, without the compiler."""
    assert work.arrange is not None
    compiled = _compiled(work, on)
    # Of Hugging Face models alone are the modules known that plain hooks stand on.
    driver = "forward_hooks" if hasattr(on.plain, "config") else "auto"
    oracle = Oracle(on.plain or on.model.loaded.eager, on.graph, compiled.study.prompts, driver=driver)
    results = {e.name: _by_hooks(oracle, e, len(on.clean)) for e in compiled.study.experiments}
    return work.arrange(Results(results, {}), on)


def _by_hooks(oracle: Oracle, experiment: Experiment, n_prompts: int) -> Result:
    """The means over prompts; of their errors nothing is said."""
    tables: dict[str, npt.NDArray[np.float64]] = {}
    for metric, numbers in oracle.measure(experiment, experiment.cells).items():
        tables[metric] = np.zeros(experiment.shape)
        for cell, number in zip(experiment.cells, numbers.mean(1), strict=True):
            tables[metric][cell.index] = number
    return Result(experiment, tables, tables, n_prompts, {})


def _side(theirs: Any, give: Callable[[], Any], calls: int) -> Side:
    try:
        for _ in range(calls - 1):
            _timed(give)
        found, seconds = _timed(give)
    except patchc.PatchcError as error:
        return Side(math.inf, str(error), math.nan)
    return Side(*apart(theirs, found), seconds)


def _timed(give: Callable[[], Any]) -> tuple[Any, float]:
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        start = time.process_time()
        found = give()
        return found, time.process_time() - start


# ---- how far apart


def apart(theirs: Any, found: Any) -> tuple[float, str | None]:
    """The largest difference of two results, and what is unlike in their form."""
    if isinstance(theirs, Tensor):
        return _tensors_apart(theirs, found)
    if isinstance(theirs, pd.DataFrame):
        return _frames_apart(theirs, found)
    if is_dataclass(theirs):
        return _worst(theirs.__dict__, getattr(found, "__dict__", None))
    if isinstance(theirs, tuple):
        return _worst(dict(enumerate(theirs)), dict(enumerate(found)) if isinstance(found, tuple) else None)
    return (0.0, None) if theirs == found else (math.inf, f"{found!r} for {theirs!r}")


def _worst(theirs: dict[Any, Any], found: dict[Any, Any] | None) -> tuple[float, str | None]:
    """Of the parts of a tuple or an object."""
    if found is None or theirs.keys() != found.keys():
        return math.inf, f"parts {found and list(found)} for {list(theirs)}"
    parts = {name: apart(theirs[name], found[name]) for name in theirs}
    name, (difference, fault) = max(parts.items(), key=lambda part: part[1][0])
    return difference, fault and f"{name}: {fault}"


def _tensors_apart(theirs: Tensor, found: Any) -> tuple[float, str | None]:
    if not isinstance(found, Tensor) or found.shape != theirs.shape:
        return math.inf, f"{tuple(getattr(found, 'shape', ()))} for {tuple(theirs.shape)}"
    if not theirs.numel():
        return 0.0, None
    difference = (theirs.double() - found.double()).abs().max().item()
    return (math.inf, "not a number") if math.isnan(difference) else (difference, None)


def _frames_apart(theirs: pd.DataFrame, found: Any) -> tuple[float, str | None]:
    """Numbers may differ, all else may not."""
    if not isinstance(found, pd.DataFrame) or list(found.columns) != list(theirs.columns) or len(found) != len(theirs):
        return math.inf, "another table"
    numbers = [c for c in theirs.columns if theirs[c].dtype.kind == "f"]
    others = [c for c in theirs.columns if c not in numbers]
    if not theirs[others].equals(found[others]):
        return math.inf, "other rows"
    return max((float((theirs[c] - found[c]).abs().max()) for c in numbers), default=0.0), None


def _effect(theirs: Any) -> float | None:
    """How far the largest number is from the smallest, placeholders (0) left out."""
    first = theirs[0] if isinstance(theirs, tuple) else theirs
    values = first if isinstance(first, Tensor) else getattr(first, "values", None)
    if not isinstance(values, Tensor):
        return None
    numbers = values[values != 0]
    return (numbers.max() - numbers.min()).item() if len(numbers) else 0.0
