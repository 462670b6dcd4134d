"""patchc from Python: load a model once, compile specs against it, run them, keep their graphs.

m = patchc.load("ioi-tiny")
compiled = m.compile("heads.patch")
results = compiled.run(check=True)
results["heads"]["recovered"]            # an xarray.DataArray with dims and coords
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from patchc import pipeline
from patchc.codegen.emit import CompiledGraph
from patchc.diagnostics import RULES, Diagnostic, PatchcError, Report, Source
from patchc.execute.analyse import Analysis, analyse
from patchc.execute.base import PlainRun
from patchc.execute.check import SAMPLE, check
from patchc.execute.sweep import Outcome
from patchc.ir.experiment import Called, Experiment, ModelChoice, Save, Show, Study
from patchc.ir.graph import ResidualGraph
from patchc.ir.leaves import leaves
from patchc.ir.program import Program, Rates
from patchc.lower.every import Every
from patchc.lower.unfelt import NO_EFFECT
from patchc.model.load import LoadedModel
from patchc.model.load import load as load_model
from patchc.model.rates import rates
from patchc.optimise.cut import DEFAULT_BUDGET
from patchc.optimise.plan import plan
from patchc.parse import parse
from patchc.pipeline import Given
from patchc.places import check_places, input_paths, result_path
from patchc.planning import Plans
from patchc.report.files import save_picture, save_table
from patchc.report.labelling import labelled
from patchc.report.record import run_record
from patchc.report.results import Check, Result, Results
from patchc.spec import read_spec

SEVERAL_EXPERIMENTS = RULES.add("several-experiments", "one graph was asked for, and the spec has several experiments")
CALLED_LENGTHS = RULES.add("metric-needs-one-length", "a Python metric needs prompts of one length")
BAD_MASKS = RULES.add("bad-masks", "masks were asked for of a kind that graphs do not have")
BAD_TENSOR = RULES.add("bad-tensor", "a tensor given in Python is none, or holds NaN or infinity")

Masks = Literal["cell", "none", "node", "edge", "node by position", "edge by position"]
"""What a compiled graph has masks for."""

Progress = Callable[[str, int, int], None]
"""Told an experiment's name, how many of its cells are done, and how many it has."""


def load(
    model: str | Path | nn.Module | ModelChoice,
    *,
    tokenizer: Any | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    attention: str | None = None,
    bos: bool | None = None,
    base: Path | None = None,
) -> Model:
    """Load and trace a model once, for any number of specs.

    `model`: a built-in name (`"ioi-tiny"`), a model directory, a hub id, a `torch.nn.Module` of a supported
    architecture (left exactly as it is; give its `tokenizer`), or a `TransformerBridge`. Raises `PatchcError`.
    """
    if isinstance(model, ModelChoice):
        return Model(_chosen(model, tokenizer, base), model)
    loaded = load_model(
        model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        attention=attention,
        bos=bos,
        base=base,
    )
    return Model(loaded, ModelChoice(loaded.name))


def _chosen(choice: ModelChoice, tokenizer: Any | None, base: Path | None) -> LoadedModel:
    """The model that a spec asks for; what is wrong with it is said at its statement."""
    options: dict[str, Any] = dict(choice.options)
    try:
        return load_model(choice.name, tokenizer=tokenizer, base=base, **options)
    except PatchcError as error:
        raise PatchcError(d.at(choice.span) for d in error.diagnostics) from None


def load_graph(directory: str | Path, model: str | Path | nn.Module | Model) -> CompiledGraph:
    """A compiled graph that `Compiled.save` wrote, over the weights of `model`: the same ones, or `other-weights`."""
    from patchc.codegen.saved import load_saved

    loaded = model if isinstance(model, Model) else load(model)
    return load_saved(Path(directory), loaded.loaded)


@dataclass(repr=False)
class Model:
    """A traced and proved model. `loaded.eager` is the module itself; nothing here changes it."""

    loaded: LoadedModel
    choice: ModelChoice

    def __repr__(self) -> str:
        return f"<Model {self.choice.name}: {self.graph.n_layers} layers of {self.graph.n_heads} heads>"

    @property
    def graph(self) -> ResidualGraph:
        """The residual graph: nodes, ports, ranks. `graph.to_networkx()` for algorithms and pictures."""
        return self.loaded.graph

    @cached_property
    def rates(self) -> Rates:
        """What the model's pieces cost, in FLOPs."""
        return rates(self.loaded.pieces)

    def compile(
        self,
        spec: str | Path,
        data: Any = None,
        tensors: Mapping[str, Tensor] | None = None,
        metrics: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        *,
        parameters: Mapping[str, str | int | float] | None = None,
        memory: int = DEFAULT_BUDGET,
        masks: Masks = "cell",
        captures: bool = False,
    ) -> Compiled:
        """Compile a spec (a path, or its text) against this model; its own `model` statement, if any, is not looked at.

        `data`: records (dicts), a DataFrame, or columns by name, where the spec's own data are not to be used.
        `tensors`: what the spec's `tensor("name")` reads, `[d_model]`. `metrics`: functions of the logits
        `[prompt, pos, d_vocab]` that give one number a prompt, under names that the spec measures.
        `parameters`: the values of `${NAME}`.
        `memory`: the bytes beyond the model that a pass aims at; one cell is always run.
        `masks`: what graphs have a mask for: each `"cell"` of the experiment; each `"node"` or `"edge"` of the model,
        patched with the experiment's one value, at all positions, or (`"node by position"`, `"edge by position"`) each;
        or `"none"`, the base run alone. `captures`: whether graphs also give what every node that is run again writes.
        Raises `PatchcError` with every error of the spec.
        """
        self.loaded.check_unchanged()
        source, base = read_spec(spec)
        given = Given(data, _checked_tensors(tensors or {}), dict(metrics or {}), dict(parameters or {}))
        tree = parse(source)
        study, warnings = pipeline.to_study(tree, source, self.loaded, self.choice, base, given)
        given = replace(given, tensors=_tensors(study, base, given.tensors, self.loaded))
        _check_called(study)
        programs = pipeline.to_programs(study, self.loaded, memory)
        inputs = input_paths(tree, study, source, base, given.parameters, self.choice.name)
        form = _graph_form(masks, captures)
        return Compiled(self, source, base, study, programs, given, warnings, inputs, memory, form)


@dataclass(repr=False)
class Compiled:
    """A compiled spec: `plan()`, `run()`, and each experiment as a differentiable graph. `inputs`: the files and
    directories that it was read from."""

    model: Model
    source: Source
    base: Path
    study: Study
    programs: tuple[Program, ...]
    given: Given
    warnings: tuple[Diagnostic, ...] = ()
    inputs: tuple[Path, ...] = ()
    memory: int = DEFAULT_BUDGET
    form: pipeline.GraphForm = field(default_factory=pipeline.GraphForm)
    _runs: dict[str, PlainRun] = field(default_factory=dict[str, PlainRun])

    def __repr__(self) -> str:
        names = ", ".join(e.name for e in self.study.experiments)
        return f"<Compiled {self.source.name} on {self.model.choice.name}: {names}>"

    # ---- before anything runs
    def plan(self) -> Plans:
        """What each experiment will run."""
        return Plans(plan(p, self.model.rates) for p in self.programs)

    def analyse(self) -> tuple[Analysis, ...]:
        """Run each experiment twice, from its plain runs on, and measure what `plan` foretells."""
        self.model.loaded.check_unchanged()
        device = self.model.loaded.pieces.device
        return tuple(
            analyse(lambda p=p: pipeline.execute(p, self.model.loaded, self.given, {}), device) for p in self.programs
        )

    def check_files(self) -> None:
        """Raise for `save` and `show` lines whose file could not be written: `no-such-directory`, `same-file`,
        `overwrites-input`."""
        check_places(self.study, self.source, self.base, self.inputs)

    def _path(self, experiment: Experiment, line: Save | Show) -> Path:
        return result_path(self.source, self.base, experiment, line)

    # ---- running
    def run(
        self,
        check: bool | int | str = False,
        *,
        progress: Progress | bool = True,
        write: bool = True,
        per_prompt: bool = False,
    ) -> Results:
        """Run every experiment.

        `check`: hold a sample of cells (True), a number of them or all (`"all"`) against the hooks backend. `progress`:
        a callback, or whether to show a bar. `write`: whether `save` and `show` write their files, once everything has
        run and been checked. `per_prompt`: results have a dim `prompt` more, and a prompt's numbers instead of their
        mean. Raises `PatchcError`: `check-failed`, `non-finite`, `no-effect`...
        """
        self.model.loaded.check_unchanged()
        if write:
            self.check_files()
        tell = _bars() if progress is True else (progress or (lambda *_: None))
        results = {p.experiment.name: self._run(p, _count(check), tell, per_prompt) for p in self.programs}
        prompts, seeds, weights = self.study.prompts, self.study.seeds, self.model.loaded.fingerprint
        out = Results(results, run_record(self.source.text, prompts, weights, seeds, self.given.parameters))
        if write:
            self._write(out)
        return out

    def _write(self, results: Results) -> None:
        for result in results.values():
            for save in result.experiment.saves:
                result.files.append(result.save(self._path(result.experiment, save), span=save.span))
            for show in result.experiment.shows:
                if show.kind != "table":
                    result.files.append(save_picture(result, self._path(result.experiment, show), show.span, show.kind))
                elif show.path is not None:
                    result.files.append(save_table(result, self._path(result.experiment, show), show.span))

    def _run(self, program: Program, count: int | bool | None, tell: Progress, per_prompt: bool) -> Result:
        experiment, n_cells = program.experiment, len(program.roots)
        loaded = self.model.loaded
        outcome = pipeline.execute(program, loaded, self.given, self._runs, lambda n: tell(experiment.name, n, n_cells))
        _refuse_silent(program, outcome)
        result = labelled(program, outcome, per_prompt)
        if count is not False:
            compared = check(
                experiment,
                outcome,
                loaded.eager,
                loaded.graph,
                self.study.prompts,
                self.given.tensors,
                self.given.metrics,
                count,
                lambda n: tell(f"{experiment.name}: check", n, n_cells if count is None else min(count, n_cells)),
            )
            effect = compared.largest_effect
            result = replace(result, check=Check(compared.cells, compared.max_abs_diff, compared.tolerance, effect))
        return result

    # ---- as graphs
    @cached_property
    def graphs(self) -> Mapping[str, CompiledGraph]:
        """Each experiment as one `torch.fx.GraphModule`, by name, compiled when first asked for."""
        return _Graphs(self)

    @property
    def graph(self) -> CompiledGraph:
        """The spec's one experiment as a graph: `forward(ids of each world [batch, pos], masks) -> logits, captures`.

        `masks` has the shape of the experiment's results, one number a cell: 1 patches, 0 does not, anything between
        blends, and gradients flow. Compiled with `masks="edge"`, it has one number an edge of the model (`graph.starts`
        names them), `[edge]` or `[edge, pos]`; with `"node"` one a writer. The worlds are inputs in the order of
        `graph.worlds`.
        """
        if len(self.study.experiments) != 1:
            names = ", ".join(e.name for e in self.study.experiments)
            raise SEVERAL_EXPERIMENTS.error(f"the spec has several experiments: {names}", fix="use `.graphs[name]`")
        return self.graphs[self.study.experiments[0].name]

    def save(self, directory: str | Path, experiment: str | None = None) -> Path:
        """Write an experiment's graph (JSON and safetensors, weights not included) for `patchc.load_graph`."""
        from patchc.codegen.saved import save_graph

        graph = self.graph if experiment is None else self.graphs[experiment]
        return save_graph(graph, Path(directory), self.model.loaded)


class _Graphs(Mapping[str, CompiledGraph]):
    def __init__(self, compiled: Compiled):
        self._compiled, self._made = compiled, dict[str, CompiledGraph]()
        self._experiments = {e.name: e for e in compiled.study.experiments}

    def __getitem__(self, name: str) -> CompiledGraph:
        if name not in self._experiments:
            raise KeyError(f"no experiment {name!r}: the spec has {', '.join(self._experiments)}")
        if name not in self._made:
            c, experiment = self._compiled, self._experiments[name]
            c.model.loaded.check_unchanged()
            self._made[name] = pipeline.to_graph(experiment, c.study.prompts, c.model.loaded, c.given.tensors, c.form)
        return self._made[name]

    def __iter__(self) -> Any:
        return iter(self._experiments)

    def __len__(self) -> int:
        return len(self._experiments)


# ---- between stages


def _graph_form(masks: str, captures: bool) -> pipeline.GraphForm:
    if masks not in get_args(Masks):
        known = ", ".join(map(repr, get_args(Masks)))
        raise BAD_MASKS.error(f"masks={masks!r} is none of {known}")
    if masks == "cell":
        return pipeline.GraphForm(captures=captures)
    every = Every(masks.split()[0])
    return pipeline.GraphForm(every, masks.endswith("by position"), captures)


def _checked_tensors(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or not bool(torch.isfinite(value).all()):
            raise BAD_TENSOR.error(f"tensors[{name!r}] is not a torch.Tensor of finite numbers")
    return dict(tensors)


def _tensors(study: Study, base: Path, given: Mapping[str, Tensor], model: LoadedModel) -> dict[str, Tensor]:
    """Every tensor that the study names, in the model's dtype: from Python, or a key of a safetensors file."""
    out = {name: t.to(model.pieces.device, model.pieces.dtype) for name, t in given.items()}
    for tensor in study.tensors:
        if tensor.file is not None:
            with safe_open(base / tensor.file, framework="pt") as opened:
                out[tensor.key] = opened.get_tensor(tensor.name).to(model.pieces.device, model.pieces.dtype)
    return out


def _check_called(study: Study) -> None:
    if len(set(study.prompts.own_lengths)) == 1:
        return
    report = Report()
    for metric in (m for experiment in study.experiments for m in experiment.metrics):
        if any(isinstance(leaf, Called) for leaf in leaves(metric.expression)):
            message = f"`{metric.name}` is a Python function, and the prompts differ in length"
            report.add(CALLED_LENGTHS.at(metric.span, message))
    report.raise_errors()


def _count(check: bool | int | str) -> int | bool | None:
    """How many cells to check: False for none, None for all."""
    if check == "all":
        return None
    if isinstance(check, bool):
        return SAMPLE if check else False
    if check == "sample":
        return SAMPLE
    if not isinstance(check, int) or check < 1:
        raise ValueError(f'check is True, False, "all" or a number of cells, not {check!r}')
    return check


def _refuse_silent(program: Program, outcome: Outcome) -> None:
    """Where no cell was touched by its values, which only the run could tell."""
    experiment = program.experiment
    if outcome.silent and len(outcome.silent) + len(program.no_effect) == len(program.roots):
        raise NO_EFFECT.error(
            "every value that is patched in came out as the run's own: nothing changes",
            span=experiment.cells[0].patches[0].span,
        )


def _bars() -> Progress:
    """A progress bar an experiment, for a terminal or a notebook; silent where there is neither."""
    import sys

    from tqdm.auto import tqdm

    bars: dict[str, Any] = {}

    def tell(name: str, done: int, total: int) -> None:
        if name not in bars:
            bars[name] = tqdm(total=total, desc=name, unit="cell", leave=False, file=sys.stderr, disable=None)
        bars[name].update(done - bars[name].n)
        if done >= total:
            bars[name].close()

    return tell


__all__ = ["Compiled", "Model", "PatchcError", "Plans", "load", "load_graph"]
