"""Experiments: their clauses, their cells and what is done with the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TypeVar

from patchc.diagnostics import RULES, Note, PatchcError, Report, Severity, nearest
from patchc.ir.experiment import Cell, Dim, Expect, Experiment, Metric, Patch, Save, Show
from patchc.ir.graph import ResidualGraph
from patchc.parse import tree
from patchc.resolve.bindings import Env
from patchc.resolve.data import Dataset
from patchc.resolve.dims import axes_of, distinct
from patchc.resolve.expects import Cells, Expects
from patchc.resolve.loops import Loops, label_of
from patchc.resolve.metrics import Metrics
from patchc.resolve.patches import WORLDS_EQUAL, OneExperiment, Patches
from patchc.resolve.scope import NAME_CLASH, NOT_SUPPORTED_YET, WRONG_KIND, Scope, collecting
from patchc.resolve.sets import names_in
from patchc.resolve.sweeps import Sweep, sweep

MISSING_CLAUSE = RULES.add("missing-clause", "an experiment without `run`, `patch` or `measure`")
TWO_RUNS = RULES.add("two-runs", "an experiment with more than one `run`")
NO_CELLS = RULES.add("no-cells", "a sweep in which no choice of the variables is a path of the model")
UNCHANGED_PROMPTS = RULES.add(
    "unchanged-prompts", "prompts in which a patch's world is the same as the run's", Severity.WARNING
)
UNKNOWN_PICTURE = RULES.add("unknown-picture", "`show` with a kind of picture that does not exist")
UNKNOWN_SUFFIX = RULES.add("unknown-suffix", "a file name whose suffix names no format that can be written")

PICTURES = ("heatmap",)
PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
RESULT_SUFFIXES = (".json", ".csv", ".parquet")
LATER = {tree.Attribute: "attribute", tree.Freeze: "freeze", tree.Keep: "keep", tree.Prune: "prune"}


@dataclass(frozen=True, slots=True)
class Experiments:
    """Resolves experiments, one by one, each with all of its errors."""

    report: Report
    scope: Scope
    graph: ResidualGraph
    dataset: Dataset
    loops: Loops
    patches: Patches
    metrics: Metrics
    expects: Expects

    def resolve(self, node: tree.Experiment) -> Experiment | None:
        """An experiment, or None where it has errors, which are in the report."""
        self._check_clauses(node)
        metrics = self._metrics(node)
        saves, shows = self._saves(node), self._shows(node)
        run = self._run(node)
        swept = self._sweep(node)
        if run is None or swept is None:
            self._try_patches(node, swept, run or self.dataset.base)
            return None
        found = self._cells(node, run, swept)
        if found is None:
            return None
        dims, cells, places = found
        measured = sum(len(clause.items) for clause in _clauses(node, tree.Measure))
        expects = self._expects(node, [m.name for m in metrics], swept, places) if len(metrics) == measured else ()
        title = node.title.text if node.title else None
        return Experiment(node.name.text, title, run, dims, cells, tuple(metrics), expects, saves, shows, node.span)

    # ---- clauses

    def _check_clauses(self, node: tree.Experiment) -> None:
        name, has = node.name.text, {type(c) for c in node.clauses}
        for kind, word in LATER.items():
            for clause in (c for c in node.clauses if isinstance(c, kind)):
                self.report.add(NOT_SUPPORTED_YET.at(clause.span, f"`{word}` is not supported yet"))
        for kind, word in ((tree.Run, "run"), (tree.Patch, "patch"), (tree.Measure, "measure")):
            if kind not in has and not (kind is tree.Patch and tree.Attribute in has):
                fix = {
                    "run": "as in `run clean`",
                    "patch": "as in `patch node head[0, 0] with corrupt`",
                    "measure": "as in `measure kl(clean)`",
                }[word]
                self.report.add(MISSING_CLAUSE.at(node.name.span, f"experiment {name!r} has no `{word}`", fix=fix))
        runs = _clauses(node, tree.Run)
        for other in runs[1:]:
            notes = [Note("the first is here", runs[0].span)]
            self.report.add(TWO_RUNS.at(other.span, f"experiment {name!r} has a second `run`", notes=notes))

    def _run(self, node: tree.Experiment) -> str | None:
        for clause in _clauses(node, tree.Run):
            with collecting(self.report):
                return self.dataset.world(clause.world)
        return None

    def _metrics(self, node: tree.Experiment) -> list[Metric]:
        found: list[Metric] = []
        variables = {b.name.text for clause in _clauses(node, tree.For) for b in clause.bindings}
        for item in (item for clause in _clauses(node, tree.Measure) for item in clause.items):
            with collecting(self.report):
                self._check_metric(item, variables)
                metric = self.metrics.measured(item)
                if metric.name in {m.name for m in found}:
                    fix = f"name one of them: `as {metric.name.split('(')[0]}_2`"
                    raise NAME_CLASH.error(f"two metrics are called {metric.name!r}", fix=fix, span=item.span)
                found.append(metric)
        return found

    def _check_metric(self, item: tree.Measured, variables: set[str]) -> None:
        if used := sorted(variables & set(names_in(item.value))):
            message = f"a metric is the same for every cell, and {used[0]!r} is a loop variable"
            raise WRONG_KIND.error(message, span=item.span)

    # ---- cells

    def _sweep(self, node: tree.Experiment) -> Sweep | None:
        bindings = [b for clause in _clauses(node, tree.For) for b in clause.bindings]
        sound = [self._is_free(b, bindings[:i]) for i, b in enumerate(bindings)]
        if all(sound):
            with collecting(self.report):
                span = next((c.span for c in _clauses(node, tree.For)), node.span)
                return sweep(self.loops, bindings, span)
        return None

    def _is_free(self, binding: tree.Binding, before: Sequence[tree.Binding]) -> bool:
        """Whether a loop variable's name is its own; reports it where it is not."""
        name, span = binding.name.text, binding.name.span
        if clash := self.scope.clash(name, "a loop variable", span):
            self.report.add(clash)
            return False
        if any(b.name.text == name for b in before):
            self.report.add(NAME_CLASH.at(span, f"two loop variables are called {name!r}"))
            return False
        return True

    def _try_patches(self, node: tree.Experiment, swept: Sweep | None, run: str) -> None:
        """Where there can be no cells: at least the errors of the patches that can be looked at."""
        clauses = _clauses(node, tree.Patch)
        if swept is None:
            variables = {b.name.text for clause in _clauses(node, tree.For) for b in clause.bindings}
            clauses = [c for c in clauses if not variables & set(names_in(c))]
        self._is_sound(clauses, {} if swept is None else _first(swept), run)

    def _cells(
        self, node: tree.Experiment, run: str, swept: Sweep
    ) -> tuple[tuple[Dim, ...], tuple[Cell, ...], Cells] | None:
        clauses = _clauses(node, tree.Patch)
        if not self._is_sound(clauses, _first(swept), run):
            return None
        one = self.patches.cells(clauses, run)
        axes = [
            axes_of(self.graph, b.name.text, u, self._tokens())
            for b, u in zip(swept.bindings, swept.universes, strict=True)
        ]
        cells: list[Cell] = []
        places: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        with collecting(self.report):
            for place, env in swept.choices():
                if (patches := _of_cell(one, env)) is not None:
                    index = tuple(i for a, p in zip(axes, place, strict=True) for i in a.places[p])
                    cells.append(Cell(index, patches))
                    places.append((place, index))
            self._check_cells(node, one, cells, run)
            return distinct(axes), tuple(cells), places
        return None

    def _is_sound(self, clauses: Sequence[tree.Patch], env: Env, run: str) -> bool:
        """Report every clause's errors in one cell, so that one clause does not hide another's."""
        sound = 0
        for clause in clauses:
            with collecting(self.report):
                self.patches.target(clause.target, env)
                sound += 1
            with collecting(self.report):
                self.patches.value(clause.value, env, run)
                sound += 1
        return sound == 2 * len(clauses)

    def _tokens(self) -> tuple[str, ...] | None:
        """The first prompt's tokens, where all prompts have one length."""
        if len(set(self.dataset.layout.lengths)) > 1:
            return None
        return tuple(self.dataset.encoder.show(i) for i in self.dataset.text_ids[0])

    def _check_cells(self, node: tree.Experiment, one: OneExperiment, cells: Sequence[Cell], run: str) -> None:
        if not cells and one.nothing:
            target, env = one.nothing
            why = self.patches.why_none(target, env)
            message = f"no choice of the variables of {node.name.text!r} is a path of the model"
            told = [Note(f"in the first cell: {why.message}", why.span)] if why else []
            raise PatchcError([NO_CELLS.at(target.span, message, notes=told)])
        if one.values and all(self.patches.is_run_itself(v, run) for v in one.values):
            raise self._equal(node, one, run)
        self._warn_unchanged(node, one, run)

    def _equal(self, node: tree.Experiment, one: OneExperiment, run: str) -> PatchcError:
        others = sorted({v.world for v in one.values if v.world and v.world != run})
        told = f": {run!r} and {others[0]!r} have the same text in every prompt" if others else f", {run!r}"
        message = f"the patches of {node.name.text!r} change nothing: each value is what the run itself has{told}"
        span = next(c.value.span for c in _clauses(node, tree.Patch))
        return WORLDS_EQUAL.error(message, fix=f"name another world than `{run}` after `with`", span=span)

    def _warn_unchanged(self, node: tree.Experiment, one: OneExperiment, run: str) -> None:
        for world in sorted({v.world for v in one.values if v.world and v.world != run}):
            same = self.dataset.same(world, run)
            if any(same) and not all(same):
                told = ", ".join(str(i) for i, s in enumerate(same) if s)
                message = f"{run!r} and {world!r} are the same in {sum(same)} of {len(same)} prompts ({told})"
                self.report.add(UNCHANGED_PROMPTS.at(node.name.span, message))

    # ---- results

    def _expects(self, node: tree.Experiment, metrics: list[str], swept: Sweep, cells: Cells) -> tuple[Expect, ...]:
        out: list[Expect] = []
        for clause in _clauses(node, tree.Expect):
            with collecting(self.report):
                out.append(self.expects.resolve(clause, metrics, swept, cells))
        return tuple(out)

    def _saves(self, node: tree.Experiment) -> tuple[Save, ...]:
        out: list[Save] = []
        for clause in _clauses(node, tree.Save):
            with collecting(self.report):
                out.append(Save(self._file(clause.file, RESULT_SUFFIXES), clause.span))
        return tuple(out)

    def _shows(self, node: tree.Experiment) -> tuple[Show, ...]:
        out: list[Show] = []
        for clause in _clauses(node, tree.Show):
            with collecting(self.report):
                kind = clause.kind.text
                if kind not in PICTURES:
                    message = f"no picture {kind!r}; there is {', '.join(PICTURES)}"
                    raise UNKNOWN_PICTURE.error(message, fix=nearest(kind, PICTURES), span=clause.kind.span)
                file = self._file(clause.file, PICTURE_SUFFIXES) if clause.file else None
                out.append(Show(kind, file, clause.span))
        return tuple(out)

    def _file(self, file: tree.Text | tree.Parameter, suffixes: Sequence[str]) -> str:
        name = self.scope.text(file)
        if PurePath(name).suffix.lower() in suffixes:
            return name
        message = f"{name!r} names no format that can be written here; the suffixes are {' '.join(suffixes)}"
        raise UNKNOWN_SUFFIX.error(message, span=file.span)


C = TypeVar("C", bound=tree.Construct)


def _of_cell(one: OneExperiment, env: Env) -> tuple[Patch, ...] | None:
    """A cell's patches; an error says in which cell it is."""
    try:
        return one.of_cell(env)
    except PatchcError as error:
        where = ", ".join(f"{name} = {label_of(value)}" for name, value in env.items())
        notes = (Note(f"in the cell with {where}"),) if where else ()
        raise PatchcError(replace(d, notes=(*d.notes, *notes)) for d in error.diagnostics) from None


def _first(swept: Sweep) -> Env:
    """The variables' values in the first cell."""
    return next((dict(env) for _, env in swept.choices()), {})


def _clauses(node: tree.Experiment, kind: type[C]) -> list[C]:
    return [c for c in node.clauses if isinstance(c, kind)]
