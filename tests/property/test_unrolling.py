"""Compiled == brute force: random small networks, random path languages, every path a leaf of its own."""

from __future__ import annotations

from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.execute.base import PlainRun, run_world
from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.dag import Dag
from patchc.ir.experiment import Cell
from patchc.ir.verify import faults
from patchc.lower.fold import Fold, Folded
from tests.drawn import Case, case
from tests.unrolled import Unrolled

EPS = 1e-9  # float64


def plain_runs(c: Case) -> dict[str, PlainRun]:
    tables = c.toy.tables(c.prompts.layout)
    return {w.name: run_world(c.toy, w, c.prompts.layout, tables) for w in c.prompts.worlds}


def fold(c: Case, cell: Cell) -> tuple[Dag, Folded]:
    dag = Dag(c.graph, c.prompts.layout)
    return dag, Fold(dag, c.prompts, "clean").cell(cell.patches)


def compiled(c: Case, dag: Dag, *roots: int) -> list[Tensor]:
    """Logits `[token, vocab]` of each root."""
    layout = c.prompts.layout
    stored = Stored(c.toy, c.prompts, "clean", plain_runs(c), {})
    walk = Walk(dag, c.toy, c.toy.tables(layout), stored, layout.all)
    return [c.toy.unembed(x) for x in walk.streams(roots)]


def unrolled(c: Case, cell: Cell) -> Tensor:
    prompts = range(c.prompts.layout.n_prompts)
    return torch.cat([Unrolled(c.toy, c.prompts, "clean", i).logits(cell) for i in prompts])


def base(c: Case) -> Tensor:
    return c.toy.unembed(plain_runs(c)["clean"].stream[-1])


@settings(max_examples=250, deadline=None)
@given(st.randoms(use_true_random=False))
def test_compiled_equals_brute_force(rng: Random) -> None:
    c = case(rng)
    dag, folded = fold(c, c.cell)
    if folded.faults:  # one start with two different values: refused
        return
    expected = unrolled(c, c.cell)
    (got,) = compiled(c, dag, folded.root)
    assert (got - expected).abs().max() < EPS
    unchanged = (dag.layout.all & ~dag.changed[folded.root]).bit_count()
    same = ((expected - base(c)).abs().amax(-1) < EPS).sum()
    assert same >= unchanged  # what is said to equal the base run does


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_starts_inside_nodes_equal_brute_force(rng: Random) -> None:
    c = case(rng, inside=True)
    dag, folded = fold(c, c.cell)
    if folded.faults:
        return
    assert not list(faults(dag, [folded.root]))
    expected = unrolled(c, c.cell)
    (got,) = compiled(c, dag, folded.root)
    assert (got - expected).abs().max() < EPS
    untouched = [t for t in range(c.prompts.layout.n_tokens) if not dag.changed[folded.root] >> t & 1]
    assert torch.equal(got[untouched], base(c)[untouched])
    assert (expected[untouched] - base(c)[untouched]).abs().sum() < EPS


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 4))
def test_cells_of_a_sweep_do_not_disturb_each_other(rng: Random, n: int) -> None:
    """Cells folded into one DAG and run in one pass give what each gives alone."""
    from tests.drawn import Draw

    c = case(rng, inside=True)
    cells = [c.cell, *(Draw(rng, c.graph, c.prompts.layout, inside=True).cell() for _ in range(n - 1))]
    dag = Dag(c.graph, c.prompts.layout)
    folder = Fold(dag, c.prompts, "clean")
    folded = [folder.cell(cell.patches) for cell in cells]
    together = compiled(c, dag, *(f.root for f in folded))
    for cell, f, got in zip(cells, folded, together, strict=True):
        if not f.faults:
            alone_dag, alone = fold(c, cell)
            assert (got - compiled(c, alone_dag, alone.root)[0]).abs().max() < EPS


def test_the_drawn_cases_have_effects() -> None:
    """Two backends that do nothing agree too: most drawn cells must change something, of each kind of patch."""
    kinds = {"complement": 0, "two patches": 0, "plain": 0}
    for seed in range(150):
        c = case(Random(seed))
        dag, folded = fold(c, c.cell)
        if folded.faults or (compiled(c, dag, folded.root)[0] - base(c)).abs().max() < 1e-3:
            continue
        kinds["complement"] += c.cell.patches[0].complement
        kinds["two patches"] += len(c.cell.patches) == 2
        kinds["plain"] += len(c.cell.patches) == 1 and not c.cell.patches[0].complement
    assert min(kinds.values()) >= 5, kinds
