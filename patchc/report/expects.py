"""What a spec expects of its numbers, held against them. What follows from a failure is the CLI's matter."""

from __future__ import annotations

import math
import operator

import numpy as np

from patchc.diagnostics import RULES, Diagnostic, Note
from patchc.ir.experiment import Dim, Expect
from patchc.report.cells import cell_name, number
from patchc.report.results import Array, Result

EXPECT_FAILED = RULES.add("expect-failed", "a measured number is not what `expect` says", exit=4)

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def failed_expects(result: Result) -> list[Diagnostic]:
    """An `expect-failed` for each expectation of the experiment that a cell does not meet."""
    found = (
        _not_on_top(result, expect) if expect.op == "includes" else _failure(result, expect)
        for expect in result.experiment.expects
    )
    return [d for d in found if d is not None]


def _failure(result: Result, expect: Expect) -> Diagnostic | None:
    values = result.expected(expect.metric)
    bad = [index for index in expect.indices if not _holds(float(values[index]), expect)]
    if not bad:
        return None
    worst = max(bad, key=lambda index: abs(float(values[index]) - expect.bound))
    where = cell_name(_dims(result), worst)
    value = _told_apart(float(values[worst]), expect.bound)
    message = f"`{expect.metric}` of `{result.name}` is {value}{where and f' at {where}'}"
    message += f", expected {expect.op} {expect.bound:g}"
    message += "" if expect.tolerance is None else f" within {expect.tolerance:g}"
    if len(expect.indices) > 1:
        message += f" ({len(bad)} of {len(expect.indices)} cells fail)"
    return EXPECT_FAILED.at(expect.span, message)


def _dims(result: Result) -> tuple[Dim, ...]:
    """The dims of what `expect` speaks of."""
    return result.dims if result.experiment.by_prompt is not None else result.experiment.dims


def _holds(value: float, expect: Expect) -> bool:
    """`==` allows `within`, or for rounding, one part in a million; a cell without a number meets nothing."""
    if expect.op == "==" and expect.tolerance is not None:
        return abs(value - expect.bound) <= expect.tolerance
    if expect.op == "==":
        return math.isclose(value, expect.bound, rel_tol=1e-6, abs_tol=1e-9)
    return bool(_COMPARE[expect.op](value, expect.bound))


def _told_apart(value: float, bound: float) -> str:
    """The value in as many digits as it takes to see that it is not the bound."""
    return next((text for d in (4, 7, 10) if float(text := number(value, d)) != bound), number(value, 17))


# ---- the strongest


def _not_on_top(result: Result, expect: Expect) -> Diagnostic | None:
    """Where a cell is not among the `top`: those whose effects are largest in size, cells with the same included."""
    size = np.abs(_effects(result, expect.metric))
    order = sorted(np.argwhere(np.isfinite(size)).tolist(), key=lambda index: -size[tuple(index)])
    top = [tuple(index) for index in order[: expect.top]]
    least = float(size[top[-1]]) if top else math.inf
    missing = [index for index in expect.indices if not size[index] >= least]
    if not missing:
        return None
    dims = _dims(result)
    place = 1 + order.index(list(missing[0]))
    message = (
        f"{cell_name(dims, missing[0])} is number {place} of `{result.name}` by the size of its effect on"
        f" `{expect.metric}`, expected among the top {expect.top}"
    )
    told = "; ".join(f"{cell_name(dims, index)}: {number(float(size[index]))}" for index in top)
    notes = [Note(f"the strongest: {told}"), Note(f"its own effect: {number(float(size[missing[0]]))}")]
    return EXPECT_FAILED.at(expect.span, message, notes=notes)


def _effects(result: Result, metric: str) -> Array:
    """`[*dims]` of what `expect` speaks of: the change from the unpatched run."""
    if result.prompts is not None and result.experiment.by_prompt is not None:
        return result.effects(metric)
    return result.expected(metric) - result.baseline(metric)
