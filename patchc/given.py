"""What Python gives beside a spec: checked, and brought to where the model computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from patchc.diagnostics import RULES, Report
from patchc.execute.read_logits import reads_of
from patchc.execute.readout import MetricFunction
from patchc.ir.bits import bits
from patchc.ir.experiment import Called, Experiment, Leaf, Prompts, Study
from patchc.ir.leaves import leaves, with_leaves
from patchc.model.load import LoadedModel

CALLED_LENGTHS = RULES.add("metric-needs-one-length", "a Python metric needs prompts of one length")
BAD_TENSOR = RULES.add("bad-tensor", "a tensor given in Python is none, or holds NaN or infinity")


def checked_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors as they were given. Errors: `bad-tensor`."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()):
            raise BAD_TENSOR.error(f"tensors[{name!r}] is not a torch.Tensor of finite numbers")
    return dict(tensors)


def all_tensors(study: Study, base: Path, given: Mapping[str, Tensor], model: LoadedModel) -> dict[str, Tensor]:
    """Every tensor that the study names, in the model's dtype: from Python, or a key of a safetensors file; a row a
    token, `[prompt, pos, d]`, as `[token, d]`. Those from Python are copied: their owner may go on writing to them."""
    out = {name: t.detach().to(model.pieces.device, model.pieces.dtype, copy=True) for name, t in given.items()}
    for tensor in study.tensors:
        if tensor.file is not None:
            with safe_open(base / tensor.file, framework="pt") as opened:
                out[tensor.key] = opened.get_tensor(tensor.name).to(model.pieces.device, model.pieces.dtype)
    return {key: tensor.flatten(0, -2) if tensor.dim() > 2 else tensor for key, tensor in out.items()}


def read_by(study: Study, functions: Mapping[str, MetricFunction], model: LoadedModel) -> Study:
    """The study with each Python metric knowing which logits it reads, where that can be told."""
    metrics = [m for e in study.experiments for m in e.metrics]
    called = {leaf for m in metrics for leaf in leaves(m.expression) if isinstance(leaf, Called)}
    known: dict[Leaf, Leaf] = {x: known_reads(x.name, functions[x.name], study.prompts, model) for x in called}
    return study if not known else replace(study, experiments=tuple(_reading(e, known) for e in study.experiments))


def known_reads(name: str, function: MetricFunction, prompts: Prompts, model: LoadedModel) -> Called:
    """A Python metric with the logits that it reads, of prompts of one length, where that can be told."""
    shape, tokens = (prompts.n, prompts.own_lengths[0], model.graph.d_vocab), list(bits(prompts.alone))
    reads = reads_of(function, shape, model.pieces.dtype, model.pieces.device)
    return Called(name) if reads is None else Called(name, tuple(tokens[row] for row in reads.rows), reads.columns)


def _reading(experiment: Experiment, known: Mapping[Leaf, Leaf]) -> Experiment:
    metrics = (replace(m, expression=with_leaves(m.expression, known)) for m in experiment.metrics)
    return replace(experiment, metrics=tuple(metrics))


def check_called(study: Study) -> None:
    """Raise `metric-needs-one-length` where a Python metric is measured on prompts that differ in length."""
    if len(set(study.prompts.own_lengths)) == 1:
        return
    report = Report()
    for metric in (m for experiment in study.experiments for m in experiment.metrics):
        if any(isinstance(leaf, Called) for leaf in leaves(metric.expression)):
            message = f"`{metric.name}` is a Python function, and the prompts differ in length"
            report.add(CALLED_LENGTHS.at(metric.span, message))
    report.raise_errors()
