"""The hooks backend against brute force, and against itself on another driver: random path languages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from patchc.diagnostics import PatchcError
from patchc.ir.experiment import (
    FromWorld,
    Itself,
    Mean,
    Patch,
    Value,
)
from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.paths import Alt, Edges, Seq, Site, Star, Step
from tests.unit.oracle_models import (
    CORRUPT,
    Fixture,
    largest_difference,
    prompts,
)
from tests.unit.oracle_unrolling import DisagreeError, Unrolled


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SMALL = prompts(3, 2, seed=3)
EARLY = 0b01001  # the first token of either prompt
SOURCES = [
    FromWorld("corrupt"),
    FromWorld("third"),
    FromWorld("clean"),
    Itself(),
    Mean("corrupt"),
    Mean("third", True),
]


def values() -> st.SearchStrategy[Value]:
    term = st.tuples(st.sampled_from([1.0, 0.5, -1.0]), st.sampled_from(SOURCES))
    mixture = st.lists(term, max_size=2).map(lambda terms: Value(tuple(terms)))
    return st.one_of(st.just(CORRUPT), st.just(Value(())), mixture)


def node_sets(graph: ResidualGraph) -> st.SearchStrategy[int]:
    single = st.sampled_from([1 << n.id for n in graph.nodes[:-1]])
    kinds = [graph.all, graph.all & ~1, graph.heads, graph.mlps or graph.heads, graph.input]
    return st.one_of(single, st.sampled_from(kinds), st.integers(1, graph.all))


def relations(graph: ResidualGraph) -> st.SearchStrategy[Edges | None]:
    readers = [(r.node.id, -1 if r.port is None else r.port) for r in graph.readers]
    row = st.tuples(st.sampled_from(readers), st.integers(0, graph.all))
    rows = st.lists(row, max_size=6, unique_by=lambda pair: pair[0]).map(lambda pairs: tuple(sorted(pairs)))
    return st.one_of(st.none(), st.none(), st.none(), st.builds(Edges, rows, st.booleans()))


def tokens() -> st.SearchStrategy[int]:
    return st.sampled_from([-1, -1, -1, -1, EARLY, SMALL.layout.all & ~EARLY])


def steps(graph: ResidualGraph) -> st.SearchStrategy[Step]:
    ports = st.sampled_from([7, 7, 1, 2, 4, 6])
    return st.builds(Step, node_sets(graph), ports, tokens(), relations(graph))


def start_steps(graph: ResidualGraph) -> st.SearchStrategy[Step]:
    anywhere = st.builds(Step, node_sets(graph), st.just(7), tokens(), relations(graph))
    sites = st.sampled_from([Site.Z, Site.Q, Site.K, Site.V])
    of_heads = node_sets(graph).map(lambda nodes: nodes & graph.heads or graph.heads)
    inside = st.builds(Step, of_heads, st.just(7), tokens(), relations(graph), sites)
    ranks = st.integers(1, graph.top)
    streams = st.builds(
        lambda rank, some: Step(graph.below(rank), tokens=some, site=Site.STREAM, rank=rank), ranks, tokens()
    )
    layers = [b.nodes for b in graph.blocks if b.kind is BlockKind.ATTENTION]
    outputs = st.builds(
        lambda nodes, some: Step(nodes, tokens=some, site=Site.ATTN_OUT), st.sampled_from(layers), tokens()
    )
    return st.one_of(anywhere, anywhere, inside, streams, outputs)


def languages(graph: ResidualGraph) -> st.SearchStrategy[Seq]:
    step = steps(graph)
    group = st.one_of(
        st.lists(step, min_size=2, max_size=2).map(lambda two: Alt(tuple(two))),
        st.lists(step, min_size=2, max_size=2).map(lambda two: Seq(tuple(two))),
    )
    any_star = st.just(Star(Step(graph.all)))
    part = st.one_of(step, any_star, any_star, step.map(Star), group, group.map(Star))
    start = start_steps(graph)
    starts = st.one_of(start, st.lists(start, min_size=2, max_size=2).map(lambda two: Alt(tuple(two))))
    end = st.builds(Step, st.just(graph.logits_set), st.just(7), tokens())
    return st.builds(lambda a, middle, z: Seq((a, *middle, z)), starts, st.lists(part, max_size=3), end)


def patches(graph: ResidualGraph) -> st.SearchStrategy[tuple[Patch, ...]]:
    one = st.builds(Patch, languages(graph), values(), st.booleans())
    return st.one_of(one.map(lambda p: (p,)), st.tuples(one, one))


def checked(examples: int) -> Any:
    """Settings of a random test: the same examples each time, and no shrinking, which would take minutes."""
    phases = (Phase.explicit, Phase.generate)
    unwell = list(HealthCheck)
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases,
        suppress_health_check=unwell
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "examples", "tolerance"), [("native", 80, 1e-9), ("gpt2", 20, 1e-9), ("llama", 20, 2e-5)]
)
def test_random_languages_unroll(kind: str, examples: int, tolerance: float) -> None:
    # In double precision (but for Llama's norms and rotations): where patches zero all that a norm reads, it
    # makes much
    # of the last bits.
    fixture = Fixture(kind, n_heads=2, data=SMALL, double=True)

    @checked(examples)
    @given(patches(fixture.graph))
    def check(some: tuple[Patch, ...]) -> None:
        try:
            with torch.no_grad():
                want = Unrolled(fixture.functions, fixture.data, "clean", some).logits()
        except DisagreeError:
            assume(False)
            return
        got = fixture.logits(*some)
        assert largest_difference(got, list(want.split(SMALL.layout.lengths))) < tolerance

    check()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_drivers_agree(kind: str) -> None:
    one, other = (
        Fixture(kind, driver, data=prompts(4, 3, 4)) for driver in ("transformer_lens", "forward_hooks")
    )

    @checked(20)
    @given(patches(one.graph))
    def check(some: tuple[Patch, ...]) -> None:
        try:
            want = one.logits(*some)
        except PatchcError:
            assume(False)
            return
        assert largest_difference(other.logits(*some), want) < 1e-3

    check()
