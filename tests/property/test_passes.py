"""Each pass of the optimiser left out in turn: every answer stays, and only what is planned grows."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.optimise.contract import Exactness
from patchc.optimise.passes import PASSES
from tests.drawn_sweeps import drawn_sweep

EPS = 1e-9  # float64
NAMES = [p.name for p in PASSES]
PACKED = "packed rows"
randoms = st.randoms(use_true_random=False)


def same(one: Tensor, other: Tensor) -> bool:
    assert torch.equal(one.isinf(), other.isinf())
    return bool(((one - other).nan_to_num(nan=0.0).abs() < EPS * (1 + other.abs().nan_to_num(posinf=0.0))).all())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(rng=randoms)
def test_without_a_pass_the_answers_stay_and_the_cost_grows(name: str, rng: Random) -> None:
    drawn = drawn_sweep(rng)
    if drawn is None:
        return
    program, other = drawn.program(), drawn.program({name})
    assert same(drawn.run(program), drawn.run(other))
    if name not in ("chunks", "late entry"):
        assert drawn.flops(program) <= drawn.flops(other)


@pytest.mark.parametrize("name", [p.name for p in PASSES if p.exactness is Exactness.BITWISE])
@settings(max_examples=40, deadline=None)
@given(rng=randoms)
def test_a_bitwise_pass_changes_no_bit(name: str, rng: Random) -> None:
    """One product a variant: in a product of other rows, another kernel rounds otherwise."""
    if drawn := drawn_sweep(rng):
        with_, without = (drawn.program({PACKED, *left}) for left in ([], [name]))
        assert torch.equal(drawn.run(with_), drawn.run(without))


@settings(max_examples=60, deadline=None)
@given(randoms, st.sets(st.sampled_from(NAMES)))
def test_any_passes_may_be_left_out(rng: Random, names: set[str]) -> None:
    if drawn := drawn_sweep(rng):
        assert same(drawn.run(drawn.program()), drawn.run(drawn.program(names)))


@settings(max_examples=40, deadline=None)
@given(randoms)
def test_no_pass_at_all(rng: Random) -> None:
    if drawn := drawn_sweep(rng):
        assert same(drawn.run(drawn.program()), drawn.run(drawn.program(set(NAMES))))
