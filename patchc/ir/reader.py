"""The whole printed form of a study, read back: `read_study(print_study(study, graph, whole=True), graph) == study`.

Runs nothing that it reads. Paths and values are for `path_reader`, expressions for `metric_reader`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path as File
from typing import Any, TypeVar

from lark import Lark
from lark.exceptions import LarkError

from patchc.ir.experiment import (
    Cell,
    Dim,
    Expect,
    Experiment,
    Interval,
    Metric,
    ModelChoice,
    Patch,
    PromptDim,
    Prompts,
    Save,
    Show,
    Study,
    TensorFrom,
    World,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.metric_reader import MetricReader
from patchc.ir.tokens import Layout

Part = TypeVar("Part")


def read_study(text: str, graph: ResidualGraph) -> Study:
    """The study that was printed whole over this graph; it has no spans. Raises ValueError for any other text."""
    try:
        return _Reader(graph).transform(_parser().parse(text))
    except (LarkError, RecursionError) as error:
        raise ValueError(f"this is no study of {graph.model} printed whole: {error}") from error


@cache
def _parser() -> Lark:
    grammar = File(__file__).with_name("study.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", start="study", maybe_placeholders=False)


class _Reader(MetricReader):
    """Builds a study from the bottom up; the data come first, and with them the layout that tokens are counted in."""

    def study(self, items: list[Any]) -> Study:
        model, prompts, *rest = items
        kinds: dict[str, list[Any]] = {"tensor": [], "seed": [], "experiment": []}
        for kind, item in rest:
            kinds[kind].append(item)
        return Study(model, prompts, *(tuple(kinds[k]) for k in ("experiment", "tensor", "seed")))

    def model(self, items: list[Any]) -> ModelChoice:
        return ModelChoice(items[0], tuple(items[1:]))

    def option(self, items: list[Any]) -> tuple[str, Any]:
        return items[0], items[1]

    def true(self, _: list[Any]) -> bool:
        return True

    def false(self, _: list[Any]) -> bool:
        return False

    def tensor(self, items: list[Any]) -> tuple[str, TensorFrom]:
        return "tensor", TensorFrom(*items)

    def seed(self, items: list[Any]) -> tuple[str, tuple[str, int]]:
        return "seed", (items[1], items[0])

    # ---- data

    def data(self, items: list[Any]) -> Prompts:
        n, lengths, *rest = items
        copies, followed = rest.pop(0) if rest and not isinstance(rest[0], World) else (1, None)
        own = _spread(lengths, n * copies)
        self.layout = Layout(_spread(followed, n * copies) if followed else own)
        return Prompts(self.layout, tuple(rest), copies=copies, own=own if followed else ())

    def prompts(self, items: list[Any]) -> Prompts:
        data, *texts = items
        return Prompts(data.layout, data.worlds, tuple(texts), data.copies, data.own)

    def lengths(self, items: list[Any]) -> list[int]:
        return items

    def copies(self, items: list[Any]) -> tuple[int, list[int] | None]:
        return items[0], items[1] if len(items) > 1 else None

    def world(self, items: list[Any]) -> World:
        name, *rest = items
        layout = rest.pop(0) if rest and isinstance(rest[0], Layout) else None
        return World(name, tuple(rest), layout)

    def own(self, items: list[Any]) -> Layout:
        return Layout(_spread(items[1], items[0]))

    def ids(self, items: list[Any]) -> tuple[int, ...]:
        return tuple(items)

    def text(self, items: list[Any]) -> tuple[str, ...]:
        return tuple(items[1:])

    # ---- experiments

    def experiment(self, items: list[Any]) -> tuple[str, Experiment]:
        name, *rest = items
        title = rest.pop(0)[0] if isinstance(rest[0], tuple) else None
        run, n_cells, *lines = rest
        by = next((PromptDim(i, *line) for i, line in enumerate(lines) if isinstance(line, tuple)), None)
        cells = _cells(_only(Cell, lines))
        if len(cells) != n_cells:
            raise ValueError(f"{name} has {len(cells)} cells, not {n_cells}")
        measured, asked = _only(Metric, lines), _only(Expect, lines)
        saves, shows = _only(Save, lines), _only(Show, lines)
        dims = _only(Dim, lines)
        return "experiment", Experiment(name, title, run, dims, cells, measured, asked, saves, shows, by_prompt=by)

    def title(self, items: list[Any]) -> tuple[str]:
        return (items[0],)

    def dim(self, items: list[Any]) -> Dim:
        name, _, *coords = items
        labels = tuple(c[1] for c in coords if len(c) > 1)
        return Dim(name, tuple(c[0] for c in coords), labels or None)

    def by_prompt(self, items: list[Any]) -> tuple[str, tuple[int, ...]]:
        name, _, *coords = items
        return name, tuple(c[0] for c in coords)

    def coordinate(self, items: list[Any]) -> list[Any]:
        return items

    def cell(self, items: list[Any]) -> Cell:
        index = items.pop(0) if items and isinstance(items[0], tuple) else ()
        return Cell(index, tuple(items))

    def index(self, items: list[Any]) -> tuple[int, ...]:
        return tuple(items)

    def patch(self, items: list[Any]) -> Patch:
        *complement, path, value = items
        return Patch(path(True), value, bool(complement))

    def complement(self, _: list[Any]) -> bool:
        return True

    # ---- what is measured and asked

    def measure(self, items: list[Any]) -> Metric:
        name, expression, *more = items
        found: dict[str, Any] = {}
        for part in more:
            found |= part
        return Metric(name, expression, **found)

    def ends(self, items: list[Any]) -> dict[str, Any]:
        return {"zero": items[0], "one": items[1], "per_prompt": len(items) > 2}

    def per_prompt(self, _: list[Any]) -> bool:
        return True

    def interval(self, items: list[Any]) -> dict[str, Any]:
        return {"interval": Interval(items[0], seed=items[1], resamples=items[2])}

    def unit(self, items: list[Any]) -> dict[str, Any]:
        return {"unit": items[0]}

    def expect(self, items: list[Any]) -> Expect:
        name, *rest = items
        tolerance = rest.pop()[0] if isinstance(rest[-1], list) else None
        *indices, op, bound = rest
        return Expect(name, tuple(indices), str(op), bound, tolerance=tolerance)

    def tolerance(self, items: list[Any]) -> list[float]:
        return items

    def expect_top(self, items: list[Any]) -> Expect:
        name, top, *indices = items
        return Expect(name, tuple(indices), "includes", 0.0, top=top)

    def show(self, items: list[Any]) -> Show:
        return Show(*items)

    def save(self, items: list[Any]) -> Save:
        return Save(items[0])


def _spread(lengths: list[int], n: int) -> tuple[int, ...]:
    """The length of each of `n` prompts, told once where all have the same."""
    spread = tuple(lengths) if len(lengths) > 1 else tuple(lengths) * n
    if len(spread) != n:
        raise ValueError(f"{len(spread)} lengths are told of {n} prompts")
    return spread


def _only(kind: type[Part], lines: Iterable[Any]) -> tuple[Part, ...]:
    return tuple(line for line in lines if isinstance(line, kind))


def _cells(lines: Sequence[Cell]) -> tuple[Cell, ...]:
    """A patch a line, put together where the lines are of one cell."""
    cells: list[Cell] = []
    for line in lines:
        if cells and cells[-1].index == line.index:
            cells[-1] = Cell(line.index, cells[-1].patches + line.patches)
        else:
            cells.append(line)
    return tuple(cells)
