"""Each pass of the optimiser left out in turn: every answer stays, and only what is planned grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.ir.dag import Dag
from patchc.ir.program import Program
from patchc.optimise.contract import Exactness
from patchc.optimise.passes import PASSES
from patchc.optimise.rebuild import read_by, written_into
from tests.drawn_sweeps import drawn_sweep
from tests.toy import Toy

EPS = 1e-9  # float64
NAMES = [p.name for p in PASSES]
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
    if name not in ("chunks", "late entry"):  # which cut cells otherwise
        assert all(less <= more for less, more in zip(drawn.cost(program), drawn.cost(other), strict=True))


class RowByRow(Toy):
    """A network of which every product is one row's, so that no row's last bits depend on the others."""

    def project(self, layer: int, port: int, y: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        project = super().project
        return each(lambda row: project(layer, port, row, heads), y)

    def write(self, layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        write = super().write
        return each(lambda row: write(layer, row, heads), z)

    def mlp_post(self, layer: int, x: Tensor) -> Tensor:
        mlp_post = super().mlp_post
        return each(lambda row: mlp_post(layer, row), x)

    def mlp_down(self, layer: int, post: Tensor) -> Tensor:
        mlp_down = super().mlp_down
        return each(lambda row: mlp_down(layer, row), post)

    def neurons(self, layer: int, post: Tensor, neurons: Sequence[int]) -> Tensor:
        written = super().neurons
        return each(lambda row: written(layer, row, neurons), post)


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(row) for row in x.split(1)])


@pytest.mark.parametrize("name", [p.name for p in PASSES if p.exactness is Exactness.BITWISE])
@settings(max_examples=40, deadline=None)
@given(rng=randoms)
def test_a_bitwise_pass_changes_no_bit(name: str, rng: Random) -> None:
    if drawn := drawn_sweep(rng, kind=RowByRow):
        assert torch.equal(drawn.run(drawn.program()), drawn.run(drawn.program({name})))


@settings(max_examples=60, deadline=None)
@given(randoms, st.sampled_from([p.name for p in PASSES if p.law]))
def test_what_a_pass_rewrites_is_what_lowering_writes_at_once(rng: Random, name: str) -> None:
    """From a DAG lowered without a pass's law, to the variant; but a sum that no other begins with stays whole."""
    drawn = drawn_sweep(rng)
    if drawn is None:
        return
    program, rewritten = drawn.program(), drawn.rewritten({name})
    dag = Dag(drawn.toy.graph, drawn.prompts.layout)
    assert drawn.cost(rewritten) == drawn.cost(program)
    if name == "shared streams":
        assert size(rewritten) <= size(program)
    else:
        assert written_into(dag, rewritten, {}) == written_into(dag, program, {})


def size(program: Program) -> int:
    return len(read_by(program.dag, (root for roots in program.roots for root in roots)))


@settings(max_examples=40, deadline=None)
@given(randoms)
def test_a_pass_leaves_its_argument_alone_and_has_nothing_to_do_twice(rng: Random) -> None:
    drawn = drawn_sweep(rng, budget=1 << 30)
    if drawn is None:
        return
    program = drawn.before_passes(set(NAMES))
    for p in PASSES:
        before = (program, len(program.dag))
        after = p.apply(program)
        assert (program, len(program.dag)) == before
        again = p.apply(after)
        assert again is after or (p.name == "chunks" and again == after)
        program = after


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
