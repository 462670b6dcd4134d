"""The whole spec: names first, then data, then each statement in the order in which it is written."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchc.diagnostics import RULES, Diagnostic, Note, PatchcError, Report, Source, Span
from patchc.ir.experiment import Experiment, ModelChoice, Study
from patchc.ir.graph import ResidualGraph
from patchc.parse import tree
from patchc.resolve.answers import AnswerReader
from patchc.resolve.continuations import Continuations
from patchc.resolve.data import Dataset
from patchc.resolve.encode import Encoder
from patchc.resolve.expects import Expects
from patchc.resolve.experiments import Experiments
from patchc.resolve.indices import Indexer
from patchc.resolve.loops import Loops
from patchc.resolve.metrics import Metrics
from patchc.resolve.model_choice import choose_model, missing_model
from patchc.resolve.parameters import wrong_parameters
from patchc.resolve.patches import Patches
from patchc.resolve.paths import Paths
from patchc.resolve.places import Places
from patchc.resolve.positions import Positions
from patchc.resolve.probes import Probes
from patchc.resolve.records import EMPTY_DATA, Given, read_records
from patchc.resolve.scope import BUILT_IN, NAME_CLASH, NOT_SUPPORTED_YET, Scope, collecting
from patchc.resolve.selectors import Selectors
from patchc.resolve.sets import Sets
from patchc.resolve.tensors import Tensors
from patchc.resolve.terms import Difference
from patchc.resolve.values import Values

NO_EXPERIMENT = RULES.add("no-experiment", "a spec without an experiment")


@dataclass(frozen=True, slots=True)
class Resolved:
    """A resolved spec, and what there is to say about it that does not stop it."""

    study: Study
    warnings: tuple[Diagnostic, ...] = ()


def resolve(
    spec: tree.Spec,
    source: Source,
    graph: ResidualGraph,
    tokenizer: Any,
    *,
    base: Path,
    model: ModelChoice | None = None,
    data: Given | None = None,
    tensors: Mapping[str, Sequence[int]] | None = None,
    metrics: Collection[str] = (),
    parameters: Mapping[str, str | int | float] | None = None,
    bos: bool | None = None,
) -> Resolved:
    """Look up every name of a spec, expand every selector, and check everything that can be checked without a
    run.

    `tokenizer(text)["input_ids"]`, also with `add_special_tokens=False`, and `tokenizer.decode(ids)` are
    called; None where all data are token ids. `base`: what the spec's paths are relative to. `model`: where
    it was given in Python, so that the spec needs none. `data`: see `records.Given`. `tensors`: the shape
    `[d]` of each tensor given. `metrics`: the names of Python metrics. `parameters`: the values of `${NAME}`.
    `bos` overrides the spec's option.

    Raises `PatchcError` with every error of the spec and its data, in the spec's order.
    """
    report = Report()
    scope = Scope(report, parameters or {})
    for diagnostic in wrong_parameters(spec, scope.parameters):
        report.add(diagnostic)
    report.raise_errors()
    chosen = choose_model(spec, scope)
    if model is None and chosen is None and not any(isinstance(i, tree.Model) for i in spec.items):
        report.add(missing_model(spec).diagnostics[0].at(_start(source)))
    if bos is None and chosen is not None:
        bos = next((bool(value) for name, value in chosen.options if name == "bos"), None)
    study = _Study(spec, graph, Encoder(tokenizer, bos, _model(spec)), scope, base, data, tensors or {}, metrics)
    experiments = study.experiments(source)
    if report.has_errors:
        raise PatchcError(_in_order(report.diagnostics, source))
    study.dataset.check_unused(report)  # only now: what has an error uses less than it will
    choice = model or chosen or ModelChoice("")
    prompts = study.dataset.prompts()
    prompts = replace(prompts, worlds=(*prompts.worlds, *study.values.other.worlds.values()))
    seeds = (*study.values.sources.seeds, *_seeds(experiments))
    found = Study(choice, prompts, experiments, tuple(study.tensors.used.values()), seeds)
    return Resolved(found, tuple(_in_order(report.diagnostics, source)))


def _in_order(diagnostics: Sequence[Diagnostic], source: Source) -> list[Diagnostic]:
    """Those about data files and Python's arguments first, then as they stand in the spec."""

    def start(d: Diagnostic) -> int:
        return d.span.start if d.span is not None and d.span.source == source else -1

    return sorted(diagnostics, key=start)


def _model(spec: tree.Spec) -> Span | None:
    """Where the spec names its model."""
    return next((item.span for item in spec.items if isinstance(item, tree.Model)), None)


def _seeds(experiments: Sequence[Experiment]) -> tuple[tuple[str, int], ...]:
    """What is random, with its seed, each once."""
    intervals = (m.interval for e in experiments for m in e.metrics if m.interval is not None)
    return tuple(dict.fromkeys(("interval", i.seed) for i in intervals))


def _start(source: Source) -> Span:
    return Span(source, 0, min(1, len(source.text)))


class _Study:
    """The parts that resolve one spec, wired together."""

    def __init__(
        self,
        spec: tree.Spec,
        graph: ResidualGraph,
        encoder: Encoder,
        scope: Scope,
        base: Path,
        data: Given | None,
        tensors: Mapping[str, Sequence[int]],
        metrics: Collection[str],
    ):
        self.spec, self.scope, self.report = spec, scope, scope.report
        self._declare(metrics)
        statements = [i for i in spec.items if isinstance(i, tree.Data)]
        records = read_records(statements, scope, base, data)
        if not statements and data is None:
            fix = 'as in `data { clean "..." corrupt "..." }`'
            self.report.add(EMPTY_DATA.at(spec.span, "the spec has no data", fix=fix))
        self.dataset = Dataset(records, encoder, graph, scope, set(_runs(spec)))
        self._declare_data()
        self.tensors = Tensors(tensors, base)
        self._build(graph)

    def _build(self, graph: ResidualGraph) -> None:
        scope, dataset = self.scope, self.dataset
        self.positions = Positions(dataset)
        difference = Difference(graph, lambda: dataset.layout.all)
        places = Places(self.positions)
        indexer = Indexer(scope)
        self.sets = Sets(scope, graph, Selectors(graph, indexer, places), places, difference)
        answers = AnswerReader(dataset)
        continuations = Continuations(self.spec, dataset, answers)
        dataset.following = lambda: continuations.endings
        probes = Probes(graph, dataset, self.positions, self.sets, indexer, self.tensors)
        self.metrics = Metrics(scope, dataset, self.positions, probes, answers, continuations)
        self.values = Values(scope, dataset, self.tensors, places)
        self._resolve = Experiments(
            self.report,
            scope,
            graph,
            dataset,
            Loops(scope, graph, dataset, self.positions, self.sets),
            Patches(graph, dataset, self.sets, Paths(graph, self.report), self.values, self.tensors),
            self.metrics,
            Expects(scope, self.positions, self.sets, self.report),
        )

    # ---- names

    def _declare(self, metrics: Collection[str]) -> None:
        for name in metrics:
            if self.scope.declare(name, "a metric", None):
                self.scope.called.add(name)
        for item in self.spec.items:
            match item:
                case tree.Let():
                    if self.scope.declare(item.name.text, "a let", item.name.span):
                        self.scope.lets[item.name.text] = item
                    self._check_parameters(item)
                case tree.Metric():
                    if self.scope.declare(item.name.text, "a metric", item.name.span):
                        self.scope.metrics[item.name.text] = item
                case tree.Sae():
                    self.report.add(NOT_SUPPORTED_YET.at(item.span, "sae is not supported yet"))
                    self.scope.unsupported.add(item.name.text)
                case _:
                    pass

    def _check_parameters(self, item: tree.Let) -> None:
        for i, parameter in enumerate(item.parameters):
            if any(p.text == parameter.text for p in item.parameters[:i]):
                message = f"two parameters of {item.name.text!r} are called {parameter.text!r}"
                self.report.add(NAME_CLASH.at(parameter.span, message))

    def _declare_data(self) -> None:
        """Columns and positions, each once, wherever it is first."""
        seen: set[str] = set()
        for record in self.dataset.records:
            for name in record.cells:
                # A file's key may be a word of the language: where the key is used, no such word can stand.
                if name not in seen and not (name in BUILT_IN and name not in record.spans):
                    self.scope.declare(name, "a column", record.span(name))
                seen.add(name)
            for name, position in record.positions.items():
                if name not in seen:
                    self.scope.declare(name, "a position", position.name.span)
                seen.add(name)

    # ---- statements

    def experiments(self, source: Source) -> tuple[Experiment, ...]:
        """Every experiment that has no error; lets, metrics and positions that nothing uses are checked
        too."""
        self.positions.check_declared()
        for item in self.spec.items:
            with collecting(self.report):
                if isinstance(item, tree.Let):
                    self.sets.check_let(item)
                elif isinstance(item, tree.Metric):
                    self.metrics.check(item)
        nodes = [i for i in self.spec.items if isinstance(i, tree.Experiment)]
        if not nodes:
            self.report.add(NO_EXPERIMENT.at(_start(source), "the spec has no experiment"))
        self._check_names(nodes)
        return tuple(found for node in nodes if (found := self._one(node)) is not None)

    def _one(self, node: tree.Experiment) -> Experiment | None:
        try:
            return self._resolve.resolve(node)
        except PatchcError as error:
            for diagnostic in error.diagnostics:
                self.report.add(diagnostic)
            return None

    def _check_names(self, nodes: Sequence[tree.Experiment]) -> None:
        first: dict[str, tree.Experiment] = {}
        for node in nodes:
            other = first.setdefault(node.name.text, node)
            if other is not node:
                notes = [Note("the first is here", other.name.span)]
                self.report.add(
                    NAME_CLASH.at(node.name.span, f"two experiments are called {node.name.text!r}", notes=notes)
                )


def _runs(spec: tree.Spec) -> Iterator[str]:
    """The worlds that experiments run on."""
    for item in spec.items:
        if isinstance(item, tree.Experiment):
            yield from (c.world.text for c in item.clauses if isinstance(c, tree.Run))
