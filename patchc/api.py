"""patchc from Python: load a model once, compile specs against it, run them, keep their graphs.

m = patchc.load("ioi-tiny")
compiled = m.compile("heads.patch")
results = compiled.run(check=True)
results["heads"]["recovered"]            # an xarray.DataArray with dims and coords
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from patchc import pipeline
from patchc.codegen.emit import BAD_MASKS, CompiledGraph
from patchc.diagnostics import RULES, Diagnostic, PatchcError, Source
from patchc.execute.analyse import Analysis, analyse
from patchc.execute.base import PlainRun
from patchc.execute.check import SAMPLE, Checker
from patchc.execute.kept import Kept
from patchc.execute.settings import settings
from patchc.execute.sweep import Outcome
from patchc.free_memory import default_budget
from patchc.given import all_tensors, check_called, checked_tensors, read_by
from patchc.ir.experiment import Experiment, ModelChoice, Save, Show, Study
from patchc.ir.graph import ResidualGraph
from patchc.ir.program import Program, Rates
from patchc.lower.every import Every
from patchc.lower.unfelt import NO_EFFECT
from patchc.model.load import LoadedModel
from patchc.model.load import load as load_model
from patchc.model.rates import rates
from patchc.optimise.plan import plan
from patchc.parse import parse
from patchc.pipeline import Given
from patchc.places import check_places, input_paths, result_path
from patchc.planning import Plans
from patchc.progress import Progress, bars, silent
from patchc.report.files import save_picture, save_table
from patchc.report.labelling import labelled
from patchc.report.record import Course, input_hashes, run_record, write_records
from patchc.report.results import Result, Results
from patchc.resuming import EVERY, Origin, Resuming, resuming
from patchc.spec import read_spec

SEVERAL_EXPERIMENTS = RULES.add("several-experiments", "one graph was asked for, and the spec has several experiments")

Masks = Literal["cell", "none", "node", "edge", "node by position", "edge by position"]
"""What a compiled graph has masks for."""


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
    progress: Progress | bool = True,
) -> Model:
    """Load and trace a model once, for any number of specs.

    `model`: a built-in name (`"ioi-tiny"`), one that comes in an installed package (`"smollm2-135m"`), a model
    directory, a hub id, a `torch.nn.Module` of a supported architecture (left exactly as it is; give its `tokenizer`),
    or a `TransformerBridge`. `progress`: a callback, or whether to show a bar where it takes seconds.
    Raises `PatchcError`.
    """
    tell = bars("step") if progress is True else (progress or silent)
    if isinstance(model, ModelChoice):
        return Model(_chosen(model, tokenizer, base, tell), model)
    loaded = load_model(
        model,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
        revision=revision,
        attention=attention,
        bos=bos,
        base=base,
        progress=tell,
    )
    return Model(loaded, ModelChoice(loaded.name))


def _chosen(choice: ModelChoice, tokenizer: Any | None, base: Path | None, tell: Progress) -> LoadedModel:
    """The model that a spec asks for; what is wrong with it is said at its statement."""
    options: dict[str, Any] = dict(choice.options)
    try:
        return load_model(choice.name, tokenizer=tokenizer, base=base, progress=tell, **options)
    except PatchcError as error:
        raise error.at(choice.span) from None


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
        memory: int | None = None,
        masks: Masks = "cell",
        captures: bool = False,
        partial: str | Path | None = None,
        fresh: bool = False,
    ) -> Compiled:
        """Compile a spec (a path, or its text) against this model; its own `model` statement, if any, is not looked at.

        `data`: records (dicts), a DataFrame, or columns by name, where the spec's own data are not to be used.
        `tensors`: what `tensor("name")` reads, `[d]` or `[prompt, pos, d]`. `metrics`: functions of the logits
        `[prompt, pos, d_vocab]` that give one number a prompt, under names that the spec measures.
        `parameters`: the values of `${NAME}`.
        `memory`: the bytes beyond the model that a pass aims at; one cell is always run. Without it, what an
        interrupted run of the same had, or three quarters of what is free.
        `masks`: what graphs have a mask for: each `"cell"` of the experiment; each `"node"` or `"edge"` of the model,
        patched with the experiment's one value, at all positions, or (`"node by position"`, `"edge by position"`) each;
        or `"none"`, the base run alone. `captures`: whether graphs also give what every node that is run again writes.
        `partial`: where a long run keeps its finished passes until it is complete, `SPEC.partial` for a spec in a file;
        `fresh` discards what is kept there. Raises `PatchcError` with every error of the spec.
        """
        self.loaded.check_unchanged()
        source, base = read_spec(spec)
        given = Given(data, checked_tensors(tensors or {}), dict(metrics or {}), dict(parameters or {}))
        if memory is not None and memory <= 0:
            raise pipeline.BAD_BUDGET.error("a pass needs some memory")
        tree = parse(source)
        study, warnings = pipeline.to_study(tree, source, self.loaded, self.choice, base, given)
        given = replace(given, tensors=all_tensors(study, base, given.tensors, self.loaded))
        check_called(study)
        study = read_by(study, given.metrics, self.loaded)
        origin = Origin(source, given.parameters, study, given.tensors, self.loaded)
        kept, unkept = resuming(source, partial, origin, given.metrics)
        if fresh:
            kept.discard()
        budget = memory or kept.memory() or default_budget(self.loaded.pieces.device)
        programs = pipeline.to_programs(study, self.loaded, budget)
        warnings = (*warnings, *unkept, *kept.warnings(programs, budget))
        inputs = input_paths(tree, study, source, base, given.parameters, self.choice.name)
        hashes, form = input_hashes(inputs[1:], base), _graph_form(masks, captures)
        if self.loaded.packaged is not None:
            hashes[self.loaded.packaged] = self.loaded.fingerprint
        return Compiled(self, source, base, study, programs, given, budget, kept, warnings, inputs, hashes, form)


@dataclass(repr=False)
class Compiled:
    """A compiled spec: `plan()`, `run()`, and each experiment as a differentiable graph.

    `memory`: the bytes that a pass aims at; `resuming`: where a run's finished passes are kept; `inputs`: the files and
    directories that it was read from; `hashes`: those of the files, as they were then."""

    model: Model
    source: Source
    base: Path
    study: Study
    programs: tuple[Program, ...]
    given: Given
    memory: int
    resuming: Resuming
    warnings: tuple[Diagnostic, ...] = ()
    inputs: tuple[Path, ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict[str, str])
    form: pipeline.GraphForm = field(default_factory=pipeline.GraphForm)
    _runs: dict[str, PlainRun] = field(default_factory=dict[str, PlainRun])

    def __repr__(self) -> str:
        names = ", ".join(e.name for e in self.study.experiments)
        return f"<Compiled {self.source.name} on {self.model.choice.name}: {names}>"

    # ---- before anything runs
    def plan(self) -> Plans:
        """What each experiment will run."""
        return self._plans

    @cached_property
    def _plans(self) -> Plans:
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
        keep_every: float = EVERY,
        say: Callable[[Diagnostic], object] | None = None,
    ) -> Results:
        """Run every experiment. A long run that is stopped, however, goes on from its finished passes the next time.

        `check`: hold a sample of cells (True), a number of them or all (`"all"`) against the hooks backend. `progress`:
        a callback, or whether to show a bar. `write`: whether `save` and `show` write their files, once everything has
        run and been checked. `per_prompt`: results have a dim `prompt` more, and a prompt's numbers instead of their
        mean. `keep_every`: after how many seconds finished passes are written; a run that is over sooner writes none.
        `say`: told of what goes wrong without stopping the run; Python's `warnings`, unless given.
        Raises `PatchcError`: `check-failed`, `non-finite`, `no-effect`...
        """
        self.model.loaded.check_unchanged()
        if write:
            self.check_files()
        tell = bars() if progress is True else (progress or silent)
        started, count, loaded = datetime.now(UTC), _count(check), self.model.loaded
        checker = Checker(loaded.eager, loaded.graph, self.study.prompts, self.given.tensors, self.given.metrics)
        with self.resuming.open(self.programs, self.memory, keep_every, say or _warn) as kept:
            runs = zip(self.programs, kept.passes, strict=True)
            found = {p.experiment.name: self._run(p, some, checker, count, tell, per_prompt) for p, some in runs}
            out = Results(found, self._record())
            if write:
                self._write(out, Course(started, datetime.now(UTC), self.memory, kept.resumed))
        kept.discard()
        return out

    def _record(self) -> dict[str, Any]:
        loaded, plans = self.model.loaded, self.plan()
        return run_record(
            self.source.text,
            self.study,
            loaded.content,
            self.given.parameters,
            inputs=self.hashes,
            settings=settings(loaded),
            plan={p.experiment: (p.n_cells, p.n_passes, p.cost.flops, p.cost.bytes) for p in plans},
        )

    def _write(self, results: Results, course: Course) -> None:
        for result in results.values():
            for save in result.experiment.saves:
                result.files.append(result.save(self._path(result.experiment, save), span=save.span))
            for show in result.experiment.shows:
                if show.kind != "table":
                    result.files.append(save_picture(result, self._path(result.experiment, show), show.span, show.kind))
                elif show.path is not None:
                    result.files.append(save_table(result, self._path(result.experiment, show), show.span))
        write_records(results, self.source.text, course)

    def _run(
        self, program: Program, kept: Kept, checker: Checker, count: int | bool | None, tell: Progress, per_prompt: bool
    ) -> Result:
        experiment, n_cells = program.experiment, len(program.roots)
        loaded = self.model.loaded
        outcome = pipeline.execute(
            program, loaded, self.given, self._runs, lambda n: tell(experiment.name, n, n_cells), kept
        )
        _refuse_silent(program, outcome)
        result = labelled(program, outcome, per_prompt)
        if count is False:
            return result
        checked = n_cells if count is None else min(count, n_cells)
        name = f"{experiment.name}: check"
        return replace(result, check=checker.check(experiment, outcome, count, lambda n: tell(name, n, checked)))

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


def _warn(diagnostic: Diagnostic) -> None:
    warnings.warn(f"{diagnostic.message} [{diagnostic.code}]", stacklevel=2)


def _refuse_silent(program: Program, outcome: Outcome) -> None:
    """Where no cell was touched by its values, which only the run could tell."""
    experiment = program.experiment
    if outcome.silent and len(outcome.silent) + len(program.no_effect) == len(program.roots):
        raise NO_EFFECT.error(
            f"in `{experiment.name}` every value that is patched in came out as the run's own: nothing changes",
            span=experiment.cells[0].patches[0].span,
        )


__all__ = ["Compiled", "Model", "PatchcError", "Plans", "load", "load_graph"]
