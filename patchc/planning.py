"""What specs will run and cost, found without weights: `patchc plan`.

From the model's outline and the prompts. The numbers are those of `Compiled.plan`, which has weights; to set measured
ones beside them weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchc import pipeline
from patchc.diagnostics import Diagnostic, PatchcError
from patchc.free_memory import default_budget
from patchc.ir.experiment import ModelChoice
from patchc.model.outline import Outline, chosen_outline, outline
from patchc.optimise.plan import Plan
from patchc.optimise.plan import plan as plan_program
from patchc.parse import parse
from patchc.pipeline import Given
from patchc.resolve import model_choice
from patchc.spec import read_spec


class Plans(tuple[Plan, ...]):
    """The plans of a spec, one an experiment; prints as text. `warnings`: the spec's."""

    warnings: tuple[Diagnostic, ...] = ()

    def __str__(self) -> str:
        from patchc.report.plans import plan_text

        return "\n\n".join(map(plan_text, self))

    __repr__ = __str__


def plan(
    spec: str | Path,
    model: str | Path | None = None,
    data: Any = None,
    tensors: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    *,
    tokenizer: Any | None = None,
    dtype: str | None = None,
    attention: str | None = None,
    parameters: Mapping[str, str | int | float] | None = None,
    memory: int | None = None,
) -> Plans:
    """What each experiment of a spec (a path, or its text) will run, in FLOPs, rows and bytes; weights may be missing.

    `model`: a name, a directory (of which `config.json` is enough) or a hub id, with `dtype` and `attention` as in
    `patchc.load`; without one, the spec's own `model` statement with its options. The other arguments are those of
    `Model.compile`. For a module in Python, compile and ask for `Compiled.plan()`. Raises `PatchcError`.
    """
    source, base = read_spec(spec)
    given = Given(data, dict(tensors or {}), dict(metrics or {}), dict(parameters or {}))
    tree = parse(source)
    if model is None:
        choice = model_choice(tree, given.parameters)
        found = _asked_for(choice, base)
    else:
        choice, found = ModelChoice(str(model)), outline(model, dtype=dtype, attention=attention)
    if tokenizer is not None:
        found = found.with_tokenizer(tokenizer)
    study, warnings = pipeline.to_study(tree, source, found, choice, base, given)
    programs = pipeline.to_programs(study, found, memory or default_budget(torch.device("cpu")))
    plans = Plans(plan_program(p, found.rates) for p in programs)
    plans.warnings = warnings
    return plans


def _asked_for(choice: ModelChoice, base: Path) -> Outline:
    """The outline of the model of a spec's statement; what is wrong with it is said there."""
    try:
        return chosen_outline(choice, base)
    except PatchcError as error:
        raise error.at(choice.span) from None
