"""Resolved studies as text: for a look (first cells and a count, lists cut), or whole, so that `reader` reads an equal
study back.

Prints what `ir.experiment` holds and nothing that has to be computed for it. Spans are not printed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patchc.ir.experiment import Cell, Dim, Expect, Experiment, Interval, Metric, Patch, Prompts, Study, World
from patchc.ir.graph import ResidualGraph
from patchc.ir.path_text import PathText
from patchc.ir.paths import Path
from patchc.ir.tokens import Layout
from patchc.ir.value_text import MetricText, ValueText
from patchc.ir.wording import CELLS, ITEMS, Wording


def print_study(study: Study, graph: ResidualGraph, whole: bool = False) -> str:
    """The whole study, ended by a line end; `whole`: nothing left out, for `reader.read_study`."""
    writer = _Writer(graph, study.prompts, Wording(study.prompts.layout, whole))
    return "".join(f"{line}\n" for line in writer.study(study))


def print_path(path: Path, graph: ResidualGraph, layout: Layout) -> str:
    """A path as a spec would write it; tokens are `prompt:position`, the prompt left off where there is
    one."""
    return PathText(graph, Wording(layout)).path(path)


@dataclass(frozen=True, slots=True)
class _Writer:
    """Writes a study, line by line."""

    graph: ResidualGraph
    prompts: Prompts
    wording: Wording

    def study(self, study: Study) -> Iterator[str]:
        w = self.wording
        yield f"model {study.model.name!r}" + "".join(
            f" {w.name(k)}={v!r}" if w.whole else f" {k}={v}" for k, v in study.model.options
        )
        yield from self._data()
        for tensor in study.tensors:
            file = "" if tensor.file is None else f" from {w.name(tensor.file)}"
            yield f"tensor {w.name(tensor.key)} = {w.name(tensor.name)}{file}"
        yield from (f"seed {seed} of {w.name(what)}" for what, seed in study.seeds)
        for experiment in study.experiments:
            yield ""
            yield from self._experiment(experiment)

    # ---- data

    def _data(self) -> Iterator[str]:
        prompts = self.prompts
        yield f"prompts {prompts.n}, of {self._lengths(prompts.own_lengths)} tokens"
        if prompts.own:
            yield f"  copies {prompts.copies}, of {self._lengths(prompts.layout.lengths)} tokens with what follows"
        elif prompts.copies != 1:
            yield f"  copies {prompts.copies}"
        yield from map(self._world, prompts.worlds)
        yield from self.wording.first([f"  {i}: {self._tokens(text)}" for i, text in enumerate(prompts.texts)], ITEMS)

    def _world(self, world: World) -> str:
        own = ""
        if world.layout is not None:
            own = f", of {world.layout.n_prompts} prompts of {self._lengths(world.layout.lengths)} tokens"
        ids = "".join(f" [{' '.join(map(str, row))}]" for row in world.ids)
        return f"  world {self.wording.name(world.name)}{own}" + (f":{ids}" if self.wording.whole else "")

    def _lengths(self, lengths: Sequence[int]) -> str:
        """Each prompt's, or one where all have it; for a look each length once."""
        distinct = sorted(set(lengths))
        return ", ".join(map(str, lengths if self.wording.whole and len(distinct) > 1 else distinct))

    def _tokens(self, text: Sequence[str]) -> str:
        return "|".join(map(repr, text) if self.wording.whole else text)

    # ---- experiments

    def _experiment(self, experiment: Experiment) -> Iterator[str]:
        w = self.wording
        count = f"{len(experiment.cells)} cell" + "s" * (len(experiment.cells) != 1)
        title = self._title(experiment.title)
        yield f"experiment {w.name(experiment.name)}{title}: run {w.name(experiment.run)}, {count}"
        yield from (f"  dim {dim}" for dim in self._dims(experiment))
        yield from (f"  measure {self._metric(metric)}" for metric in experiment.metrics)
        shown = experiment.cells if w.whole else experiment.cells[:CELLS]
        yield from (line for cell in shown for line in self._cell(cell))
        if len(experiment.cells) > len(shown):
            yield f"  and {len(experiment.cells) - len(shown)} more"
        yield from (f"  expect {self._expect(expect)}" for expect in experiment.expects)
        yield from (f"  show {w.name(s.kind)}" + ("" if s.path is None else f" {s.path!r}") for s in experiment.shows)
        yield from (f"  save {save.path!r}" for save in experiment.saves)

    def _title(self, title: str | None) -> str:
        if self.wording.whole:
            return "" if title is None else f" {title!r}"
        return f' "{title}"' if title else ""

    def _dims(self, experiment: Experiment) -> list[str]:
        dims = [self._dim(dim) for dim in experiment.dims]
        if (by := experiment.by_prompt) is not None:
            shown = self.wording.listed(list(map(str, by.prompts)))
            dims.insert(by.axis, f"{self.wording.name(by.name)} ({len(by.prompts)}): {shown}, by prompt")
        return dims

    def _dim(self, dim: Dim) -> str:
        coords = [self.wording.name(c) if isinstance(c, str) else f"{c!r}" for c in dim.coords]
        if dim.labels is not None:
            coords = [f"{c}={label!r}" for c, label in zip(coords, dim.labels, strict=True)]
        return f"{self.wording.name(dim.name)} ({len(coords)}): {self.wording.listed(coords)}"

    def _cell(self, cell: Cell) -> Iterator[str]:
        where = f"[{', '.join(map(str, cell.index))}] " if cell.index else ""
        for patch in cell.patches:
            yield f"  {where}patch {self._patch(patch)}"
        if not cell.patches and self.wording.whole:
            yield f"  {where}unpatched"

    def _patch(self, patch: Patch) -> str:
        but = "all except " if patch.complement else ""
        path = PathText(self.graph, self.wording).path(patch.path)
        return f"{but}{path} with {ValueText(self.wording).value(patch.value)}"

    # ---- numbers

    def _metric(self, metric: Metric) -> str:
        w, text = self.wording, MetricText(self.wording, PathText(self.graph, self.wording), self.prompts)
        line = f"{w.name(metric.name)} = {text.expression(metric.expression)}"
        if metric.zero is not None and metric.one is not None:
            line += f" from {w.name(metric.zero)} to {w.name(metric.one)}" + (
                " per prompt" if metric.per_prompt else ""
            )
        line += self._interval(metric.interval) if metric.interval else ""
        return line + (f" unit {w.name(metric.unit)}" if w.whole and metric.unit is not None else "")

    def _interval(self, interval: Interval) -> str:
        level = self.wording.number(interval.level)
        return f" with interval {level} seed={interval.seed} resamples={interval.resamples}"

    def _expect(self, expect: Expect) -> str:
        w = self.wording
        name, shown = w.name(expect.metric), w.listed([f"[{', '.join(map(str, i))}]" for i in expect.indices])
        if expect.top:
            return f"{name} top({expect.top}) includes {shown}"
        within = "" if expect.tolerance is None else f" within {w.number(expect.tolerance)}"
        return f"{name} at {shown} {expect.op} {w.number(expect.bound)}{within}"
