"""Cutting cells into passes: any budget gives the same numbers, and each cell runs once, entering late."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

import patchc
from patchc.api import Compiled, Model
from patchc.ir.program import Program
from tests.models import gpt2

SPEC = """
metric diff = logit(answer) - logit(wrong)
experiment nodes {
  for h in head, p in positions
  run clean
  patch node h @ p with corrupt
  measure diff
}
experiment edges {
  for w in writers, r in readers
  run clean
  patch edge w -> r with corrupt
  measure diff
}
"""
DATA: dict[str, Any] = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "corrupt": [[1, 9, 3, 4], [5, 6, 10, 8]],
    "answer": [11, 12],
    "wrong": [13, 14],
}
BUDGETS = [1, 1 << 10, 1 << 14, 1 << 16, 1 << 18, 1 << 40]
"""Bytes: from one cell a pass to all in one."""


@cache
def model() -> Model:
    return patchc.load(gpt2(n_layer=3))


@cache
def compiled(budget: int) -> Compiled:
    return model().compile(SPEC, DATA, memory=budget)


@cache
def numbers(budget: int) -> Any:
    return compiled(budget).run(progress=False)


def programs() -> list[Program]:
    return [p for budget in BUDGETS for p in compiled(budget).programs]


@pytest.mark.parametrize("budget", BUDGETS)
def test_any_budget_gives_the_same_numbers(budget: int) -> None:
    want = numbers(BUDGETS[-1])
    for name, result in numbers(budget).items():
        assert np.nanmax(np.abs(result.values["diff"] - want[name].values["diff"])) < 1e-6
        assert np.nanmax(np.abs(result.stderr["diff"] - want[name].stderr["diff"])) < 1e-6
        assert np.array_equal(np.isnan(result.values["diff"]), np.isnan(want[name].values["diff"]))


def test_passes_are_counted_and_grow_as_budgets_shrink() -> None:
    for name in ("nodes", "edges"):
        passes = [numbers(b)[name].passes for b in BUDGETS]
        assert passes == sorted(passes, reverse=True)
        assert passes[-1] == 1
        assert passes[0] > 20
        assert passes == [p.n_passes for p in programs() if p.experiment.name == name]
        assert passes == [plan.n_passes for b in BUDGETS for plan in compiled(b).plan() if plan.experiment == name]


def test_no_cell_is_lost_and_none_runs_twice() -> None:
    for program in programs():
        ran = sorted(c for work in program.passes for c in work.cells)
        assert ran == sorted(set(range(len(program.roots))) - set(program.no_effect))
        assert len(program.roots) == len(program.experiment.cells)


def test_cells_enter_late() -> None:
    """Cells stand by the rank at which they enter; a pass of late ones runs no block below."""
    late = 0
    for program in programs():
        dag = program.dag
        entered = [dag.low[program.roots[c][0]] for work in program.passes for c in work.cells]
        assert entered == sorted(entered)
        for work in program.passes:
            first = min(dag.low[program.roots[c][0]] for c in work.cells)
            below = [n for n, block in zip(work.rows, dag.graph.blocks, strict=True) if block.rank < first]
            assert not any(below)
            late += bool(below[1:])
    assert late > 0


def test_a_pass_keeps_to_the_budget_unless_it_is_one_cell() -> None:
    for budget in BUDGETS:
        for program in compiled(budget).programs:
            assert all(work.bytes <= budget or len(work.cells) == 1 for work in program.passes)


def test_a_tight_budget_does_not_lose_what_cells_share() -> None:
    """Together, cells compute no more rows than apart, and fewer where they share variants."""
    apart, together = (sum(sum(w.rows) for w in compiled(b).programs[1].passes) for b in (1, BUDGETS[-1]))
    assert together < apart
