"""Compiled == hooks for starts inside nodes, on traced models of every kind: random scores, patterns, MLP inputs and
neurons, on their own and below paths."""

from __future__ import annotations

from random import Random

import pytest

from patchc.ir.dag import Dag
from patchc.ir.experiment import Blocked, Cell, FromWorld, Itself, Mean, Moved, Noise, Patch, Prompts, Value
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Seq, Site, Star, Step
from patchc.lower.fold import Fold
from tests.differential.test_compiled_equals_hooks import VALUES, experiment, must_agree, prompts
from tests.drawn import Draw
from tests.models import MODELS, loaded_model

TOLERANCE = 1e-4
CASES = 6


INSIDE = (Site.SCORES, Site.PATTERN, Site.IN, Site.POST)


def drawn_cells(graph: ResidualGraph, data: Prompts, rng: Random) -> list[Cell]:
    """Random cells that begin inside nodes, without a start of two values or a complement of a part of a node."""
    out: list[Cell] = []
    while len(out) < CASES:
        cell = Draw(rng, graph, data.layout, VALUES, inside=True).cell()
        mine = any(f"<Site.{site.name}" in repr(cell) for site in INSIDE)
        if mine and not Fold(Dag(graph, data.layout), data, "clean").cell(cell.patches).faults:
            out.append(cell)
    return out


def equal(kind: str, data: Prompts, cells: list[Cell]) -> None:
    must_agree(loaded_model(kind), data, experiment(cells))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", [(5,), (4, 6)], ids=["one prompt", "two lengths"])
def test_random_cells(kind: str, lengths: tuple[int, ...]) -> None:
    rng = Random(f"inside {kind} {lengths}")
    data = prompts(rng, lengths)
    equal(kind, data, drawn_cells(loaded_model(kind).graph, data, rng))


@pytest.mark.parametrize("site", INSIDE)
@pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-eager", "neox-parallel"])
def test_values(kind: str, site: Site) -> None:
    """Every kind of value at every site, whole and in part."""
    rng = Random(f"{kind} {site}")
    data, graph = prompts(rng, (5, 4, 5)), loaded_model(kind).graph
    swapped = tuple(data.layout.token({0: 2, 1: 1, 2: 0}[p], at) for p, at in map(data.layout.place, range(14)))
    sources = [FromWorld("other"), Mean("corrupt"), Moved(FromWorld("corrupt"), swapped)]
    values = [Value(((1.0, source),)) for source in sources] + [Value(()), Value(((0.5, Itself()),))]
    values += [Value(((1.0, Itself()), (1.0, Noise(0.3, 7))))]
    if site is Site.SCORES:
        values.append(Value(((1.0, Blocked()),)))
    nodes = [n for n in graph.members(graph.mlps if site in (Site.IN, Site.POST) else graph.heads) if n.layer]
    cells: list[Cell] = []
    for value in values:
        for whole in (True, False):
            part = {} if whole else {"tokens": rng.getrandbits(14), "sources": rng.getrandbits(14), "neurons": 0b1101}
            if site not in (Site.SCORES, Site.PATTERN):
                part.pop("sources", None)
            if site is not Site.POST:
                part.pop("neurons", None)
            step = Step(1 << rng.choice(nodes).id, site=site, **part)
            cells.append(Cell((), (Patch(Seq((step, Star(Step(graph.all)), Step(graph.logits_set))), value),)))
    equal(kind, data, cells)
