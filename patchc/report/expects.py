"""What a spec expects of its numbers, held against them. What follows from a failure is the CLI's matter."""

from __future__ import annotations

import math
import operator

from patchc.diagnostics import RULES, Diagnostic
from patchc.ir.experiment import Expect
from patchc.report.cells import cell_name, number
from patchc.report.results import Result

EXPECT_FAILED = RULES.add("expect-failed", "a measured number is not what `expect` says", exit=4)

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def failed_expects(result: Result) -> list[Diagnostic]:
    """An `expect-failed` for each expectation of the experiment that a cell does not meet."""
    found = (_failure(result, expect) for expect in result.experiment.expects)
    return [d for d in found if d is not None]


def _failure(result: Result, expect: Expect) -> Diagnostic | None:
    values = result.values[expect.metric]
    bad = [index for index in expect.indices if not _holds(float(values[index]), expect)]
    if not bad:
        return None
    worst = max(bad, key=lambda index: abs(float(values[index]) - expect.bound))
    where = cell_name(result.experiment, worst)
    value = _told_apart(float(values[worst]), expect.bound)
    message = f"`{expect.metric}` of `{result.name}` is {value}{where and f' at {where}'}"
    message += f", expected {expect.op} {expect.bound:g}"
    if len(expect.indices) > 1:
        message += f" ({len(bad)} of {len(expect.indices)} cells fail)"
    return EXPECT_FAILED.at(expect.span, message)


def _holds(value: float, expect: Expect) -> bool:
    """`==` allows for rounding, one part in a million; a cell without a number meets nothing."""
    if expect.op == "==":
        return math.isclose(value, expect.bound, rel_tol=1e-6, abs_tol=1e-9)
    return bool(_COMPARE[expect.op](value, expect.bound))


def _told_apart(value: float, bound: float) -> str:
    """The value in as many digits as it takes to see that it is not the bound."""
    return next((text for d in (4, 7, 10) if float(text := number(value, d)) != bound), repr(value))
