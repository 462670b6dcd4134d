"""Experiments: their clauses, their cells and what is done with the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from patchc.diagnostics import RULES, Note, PatchcError, Report, Severity
from patchc.ir.experiment import Cell, Dim, Expect, Experiment, Metric, Patch, PromptDim, Save, Show, Value
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Path
from patchc.parse import tree
from patchc.resolve.bindings import Env
from patchc.resolve.by_prompt import ByPrompt, is_over_prompts, misused, over_prompts
from patchc.resolve.data import Dataset
from patchc.resolve.dims import axes_of, distinct
from patchc.resolve.ends import Ends, ends_of
from patchc.resolve.expects import Cells, Expects, Table
from patchc.resolve.loops import Loops, label_of
from patchc.resolve.metrics import BAD_INTERVAL, Metrics
from patchc.resolve.outputs import check_drawn, save, show
from patchc.resolve.patches import WORLDS_EQUAL, OneExperiment, Patches
from patchc.resolve.places import names_in
from patchc.resolve.scope import NAME_CLASH, NOT_SUPPORTED_YET, WRONG_KIND, Scope, collecting
from patchc.resolve.sweeps import Sweep, sweep

MISSING_CLAUSE = RULES.add("missing-clause", "an experiment without `run`, `patch` or `measure`")
TWO_RUNS = RULES.add("two-runs", "an experiment with more than one `run`")
NO_CELLS = RULES.add("no-cells", "a sweep in which no choice of the variables is a path of the model")
UNUSED_VARIABLE = RULES.add("unused-variable", "a loop variable that no patch has in it", Severity.WARNING)
UNCHANGED_PROMPTS = RULES.add(
    "unchanged-prompts", "prompts in which a patch's world is the same as the run's", Severity.WARNING
)

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
        measured = sum(len(clause.items) for clause in _clauses(node, tree.Measure))
        ends = ends_of(metrics, certain=len(metrics) == measured)
        if run is None or swept is None:
            self._try_patches(node, swept and swept[0], run or self.dataset.base, ends)
            return None
        found = self._cells(node, run, swept[0], ends)
        if found is None:
            return None
        table = self._table(found, swept[1])
        expects = self._expects(node, [m.name for m in metrics], table) if len(metrics) == measured else ()
        self._check_shape(metrics, shows, found.dims, table.by_prompt)
        title = node.title.text if node.title else None
        return Experiment(
            node.name.text,
            title,
            run,
            found.dims,
            found.cells,
            tuple(metrics),
            expects,
            saves,
            shows,
            node.span,
            table.by_prompt,
        )

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

    def _sweep(self, node: tree.Experiment) -> tuple[Sweep, ByPrompt | None] | None:
        """The sweep of the variables that make cells, and the loop over prompts, which makes none."""
        bindings = [b for clause in _clauses(node, tree.For) for b in clause.bindings]
        sound = [self._is_free(b, bindings[:i]) for i, b in enumerate(bindings)]
        self._warn_unused(node, bindings)
        with collecting(self.report):
            prompts = self._prompts(bindings, node)
            if all(sound):
                span = next((c.span for c in _clauses(node, tree.For)), node.span)
                return sweep(self.loops, [b for b in bindings if not is_over_prompts(b)], span), prompts
        return None

    def _warn_unused(self, node: tree.Experiment, bindings: Sequence[tree.Binding]) -> None:
        """A variable that no patch and no other variable has in it: its cells are all the same."""
        for i, b in enumerate(bindings):
            used = {n for c in node.clauses if isinstance(c, tree.Patch | tree.Attribute) for n in names_in(c)}
            used |= {n for other in bindings[i + 1 :] for n in names_in(other.domain)}
            if b.name.text not in used and not is_over_prompts(b):
                message = f"no patch has the loop variable {b.name.text!r} in it, so that its cells are all the same"
                fix = f"patch with it, as in `patch node {b.name.text} with ...`, or leave it out"
                self.report.add(UNUSED_VARIABLE.at(b.name.span, message, fix=fix))

    def _prompts(self, bindings: Sequence[tree.Binding], node: tree.Experiment) -> ByPrompt | None:
        if not any(map(is_over_prompts, bindings)):
            return None
        found = over_prompts(bindings, len(self.dataset.lengths), self.scope)
        if found and (wrong := list(misused(found.binding, node.clauses))):
            raise PatchcError(wrong)
        return found

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

    def _try_patches(self, node: tree.Experiment, swept: Sweep | None, run: str, ends: Ends) -> None:
        """Where there can be no cells: at least the errors of the patches that can be looked at."""
        clauses = _clauses(node, tree.Patch)
        if swept is None:
            variables = {b.name.text for clause in _clauses(node, tree.For) for b in clause.bindings}
            for clause in (c for c in clauses if variables & set(names_in(c))):
                if not variables & set(names_in(clause.value)):
                    with collecting(self.report):
                        self.patches.value(clause.value, {}, run)
            clauses = [c for c in clauses if not variables & set(names_in(c))]
        self._is_sound(clauses, {} if swept is None else _first(swept), run, ends)

    def _cells(self, node: tree.Experiment, run: str, swept: Sweep, ends: Ends) -> _Cells | None:
        clauses = _clauses(node, tree.Patch)
        if not self._is_sound(clauses, _first(swept), run, ends):
            return None
        one = self.patches.cells(clauses, run, ends)
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
            return _Cells(swept, distinct(axes), tuple(len(a.dims) for a in axes), tuple(cells), tuple(places))
        return None

    def _table(self, found: _Cells, prompts: ByPrompt | None) -> Table:
        names = tuple(b.name.text for b in found.swept.bindings)
        if prompts is None:
            return Table(names, found.swept.universes, found.places)
        at = prompts.before
        return Table(
            (*names[:at], prompts.binding.name.text, *names[at:]),
            (*found.swept.universes[:at], prompts.universe, *found.swept.universes[at:]),
            found.places,
            at,
            prompts.dim(sum(found.counts[:at]), found.dims),
        )

    def _is_sound(self, clauses: Sequence[tree.Patch], env: Env, run: str, ends: Ends) -> bool:
        """Report every clause's errors in one cell, so that one clause does not hide another's."""
        sound = [self._is_sound_clause(clause, env, run, ends) for clause in clauses]
        return all(sound)

    def _is_sound_clause(self, clause: tree.Patch, env: Env, run: str, ends: Ends) -> bool:
        targets: list[Path | None] = []
        values: list[Value] = []
        with collecting(self.report):
            targets.append(self.patches.target(clause.target, env, ends))
        with collecting(self.report):
            values.append(self.patches.value(clause.value, env, run))
        for path in targets if values else ():
            with collecting(self.report):
                if path is not None:
                    self.patches.check_value(clause, path, values[0], ends)
                return True
        return False

    def _tokens(self) -> tuple[str, ...] | None:
        """The first prompt's tokens, where all prompts have one length."""
        if len(set(self.dataset.lengths)) > 1:
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

    def _expects(self, node: tree.Experiment, metrics: list[str], table: Table) -> tuple[Expect, ...]:
        out: list[Expect] = []
        for clause in (c for c in node.clauses if isinstance(c, tree.Expect | tree.ExpectTop)):
            with collecting(self.report):
                out.append(self.expects.resolve(clause, metrics, table))
        return tuple(out)

    def _saves(self, node: tree.Experiment) -> tuple[Save, ...]:
        out: list[Save] = []
        for clause in _clauses(node, tree.Save):
            with collecting(self.report):
                out.append(save(self.scope, clause))
        return tuple(out)

    def _shows(self, node: tree.Experiment) -> tuple[Show, ...]:
        out: list[Show] = []
        for clause in _clauses(node, tree.Show):
            with collecting(self.report):
                out.append(show(self.scope, clause))
        return tuple(out)

    def _check_shape(
        self, metrics: Sequence[Metric], shows: Sequence[Show], dims: Sequence[Dim], by_prompt: PromptDim | None
    ) -> None:
        """What the results' dims leave without a meaning."""
        shape = [len(d.coords) for d in dims] + ([len(by_prompt.prompts)] if by_prompt else [])
        for shown in shows:
            with collecting(self.report):
                check_drawn(shown, shape)
        for metric in metrics:
            if metric.interval and by_prompt:
                message = "an interval is drawn over prompts, and this experiment shows each prompt alone"
                self.report.add(
                    BAD_INTERVAL.at(metric.span, message, fix="leave out the loop over prompts, or the interval")
                )


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cells of an experiment; `counts` are the numbers of dims of its variables, `places` what `Table` has."""

    swept: Sweep
    dims: tuple[Dim, ...]
    counts: tuple[int, ...]
    cells: tuple[Cell, ...]
    places: Cells


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
