"""What a pass of the optimiser is: a pure function of a program, a remark on what it did, and how exact it is.

`ir.program.Pass` is another thing: cells that run together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from patchc.ir.laws import NO_LAWS, Law
from patchc.ir.program import Program
from patchc.optimise.facts import Facts


class Exactness(StrEnum):
    """`BITWISE`: each number comes of the same operations on the same numbers in the same order, so that bits differ
    only where a matrix product rounds a row otherwise beside other rows. `CLOSE`: last bits differ whatever products
    do."""

    BITWISE = "bitwise"
    CLOSE = "close"


@dataclass(frozen=True, slots=True)
class Remark:
    """`used`: whether the optimisation changed anything here; `text`: what, in numbers, or why it could not."""

    optimisation: str
    used: bool
    text: str


@dataclass(frozen=True, slots=True)
class OptimiserPass:
    """`apply` gives the same object where it changes nothing. `remark` reads the finished program: whether the pass was
    of use, and the words. `law`: the law that it makes a DAG keep, if it rewrites DAGs; `lower` keeps all of them as it
    goes, so that such a pass has work only where lowering was told not to."""

    name: str
    apply: Callable[[Program], Program]
    remark: Callable[[Facts], tuple[bool, str]]
    exactness: Exactness
    law: Law = NO_LAWS
