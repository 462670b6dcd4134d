"""The hooks backend against brute force, and against itself on another driver: random path languages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.diagnostics import PatchcError
from patchc.ir.experiment import (
    Blocked,
    FromWorld,
    Itself,
    Mean,
    Moved,
    Noise,
    Patch,
    Probe,
    Value,
)
from patchc.ir.graph import BlockKind, Kind, ResidualGraph
from patchc.ir.paths import Alt, Edges, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from tests.unit.oracle_models import (
    CORRUPT,
    Fixture,
    cell,
    experiment,
    head,
    largest_difference,
    prompts,
)
from tests.unit.oracle_unrolling import UndefinedError, Unrolled
from tests.unit.oracle_words import steps_of

SMALL = prompts(3, 2, seed=3)
EARLY = 0b01001  # the first token of either prompt
SOURCES = [
    FromWorld("corrupt"),
    FromWorld("third"),
    FromWorld("clean"),
    Itself(),
    Mean("corrupt"),
    Mean("third", True),
    Mean("third", groups=(0, 1)),
    Moved(FromWorld("third"), (2, 2, 2, 4, 4)),
    Moved(FromWorld("corrupt"), (3, 4, 4, 0, 1)),
    Moved(Mean("corrupt"), (1, 1, 1, 3, 3)),
    Noise(0.5, 1),
    Noise(0.5, 2, relative=True),
]
MOVED = [source for source in SOURCES if isinstance(source, Moved)]
# Where another token's row ends there is no score: nothing can be subtracted from it.
OF_ENTRIES = [source for source in SOURCES if source not in MOVED and source != Noise(0.5, 2, relative=True)]


def values(sources: list[Any] = SOURCES) -> st.SearchStrategy[Value]:
    term = st.tuples(st.sampled_from([1.0, 0.5, -1.0]), st.sampled_from(sources))
    mixture = st.lists(term, max_size=2).map(lambda terms: Value(tuple(terms)))
    return st.one_of(st.just(CORRUPT), st.just(Value(())), mixture)


def values_for(path: Seq, complement: bool) -> st.SearchStrategy[Value]:
    """Values that every start of a path can take."""
    sites = {step.site for step in steps_of(path.parts[0])}
    if not sites & {Site.SCORES, Site.PATTERN}:
        return values()
    alone = MOVED + [Blocked()] * (sites == {Site.SCORES} and not complement)
    return st.one_of(values(OF_ENTRIES), st.sampled_from(alone).map(lambda source: Value(((1.0, source),))))


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


def inner_steps(graph: ResidualGraph) -> st.SearchStrategy[Step]:
    """Starts at entries of attention, at what MLPs read, and at neurons."""
    of_heads = node_sets(graph).map(lambda nodes: nodes & graph.heads or graph.heads)
    entries = st.builds(
        lambda nodes, some, site, sources: Step(nodes, tokens=some, site=site, sources=sources),
        of_heads, tokens(), st.sampled_from([Site.SCORES, Site.PATTERN]), tokens(),
    )  # fmt: skip
    if not graph.mlps:
        return entries
    mlps = st.builds(
        lambda some, site, neurons: Step(graph.mlps, tokens=some, site=site, neurons=neurons),
        tokens(), st.sampled_from([Site.IN, Site.POST]), st.sampled_from([-1, 1, 0b1011]),
    )  # fmt: skip
    return st.one_of(entries, mlps)


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
    return st.one_of(anywhere, anywhere, inside, streams, outputs, inner_steps(graph), inner_steps(graph))


def probes(graph: ResidualGraph) -> list[tuple[Probe, Step]]:
    """Places to read, and the steps by which paths end there."""
    head, mlp = (next((n for n in reversed(graph.nodes) if n.kind is kind), None) for kind in (Kind.HEAD, Kind.MLP))
    assert head is not None
    of_head = (Site.OUT, Site.Z, Site.Q, Site.K, Site.V, Site.SCORES, Site.PATTERN)
    at = [(1 << head.id, site) for site in of_head]
    at += [(1 << mlp.id, site) for site in (Site.OUT, Site.IN, Site.POST)] if mlp else []
    layer = graph.blocks[head.block].nodes
    whole = [(Probe(graph.below(rank), Site.STREAM, rank), Step(graph.below(rank), site=Site.STREAM, rank=rank))
             for rank in range(2, graph.top + 1)]  # fmt: skip
    return (
        [(Probe(nodes, site), Step(nodes)) for nodes, site in at] + [(Probe(layer, Site.ATTN_OUT), Step(layer))] + whole
    )


def languages(graph: ResidualGraph, end: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    step = steps(graph)
    group = st.one_of(
        st.lists(step, min_size=2, max_size=2).map(lambda two: Alt(tuple(two))),
        st.lists(step, min_size=2, max_size=2).map(lambda two: Seq(tuple(two))),
    )
    any_star = st.just(Star(Step(graph.all)))
    part = st.one_of(step, any_star, any_star, step.map(Star), group, group.map(Star))
    start = start_steps(graph)
    starts = st.one_of(start, st.lists(start, min_size=2, max_size=2).map(lambda two: Alt(tuple(two))))
    if end is None:
        end = st.builds(Step, st.just(graph.logits_set), st.just(7), tokens())
    return st.builds(lambda a, middle, z: Seq((a, *middle, z)), starts, st.lists(part, max_size=3), end)


def circuits(graph: ResidualGraph) -> st.SearchStrategy[Patch]:
    """Every path with an edge outside a random circuit of edges; or the complement of those wholly in it."""
    readers = [(r.node.id, -1 if r.port is None else r.port) for r in graph.readers]
    sets = st.lists(st.integers(0, graph.all), min_size=len(readers), max_size=len(readers))

    def patch(some: list[int], value: Value, complement: bool) -> Patch:
        inside = Edges(tuple(zip(readers, some, strict=True)))
        outside = Edges(inside.rows, keep=False)
        first = Step(graph.input, via=inside) if complement else Step(graph.all, via=outside)
        path = Seq((first, Star(Step(graph.all, via=inside)), Step(graph.logits_set)))
        return Patch(path, value, complement)

    return st.builds(patch, sets, values(), st.booleans())


def patches_of(paths: st.SearchStrategy[Seq]) -> st.SearchStrategy[Patch]:
    drawn = st.tuples(paths, st.booleans())
    return drawn.flatmap(lambda two: values_for(*two).map(lambda value: Patch(two[0], value, two[1])))


def patches(graph: ResidualGraph) -> st.SearchStrategy[tuple[Patch, ...]]:
    one = patches_of(languages(graph))
    alone = st.one_of(one, one, circuits(graph))
    return st.one_of(alone.map(lambda p: (p,)), alone.map(lambda p: (p,)), st.tuples(one, alone))


def checked(examples: int) -> Any:
    """Settings of a random test: the same examples each time, and no shrinking, which would take minutes."""
    phases = (Phase.explicit, Phase.generate)
    unwell = list(HealthCheck)
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases,
        suppress_health_check=unwell
    )  # fmt: skip


@torch.no_grad()
def unrolled_and_hooked(fixture: Fixture, some: tuple[Patch, ...]) -> float:
    """By how much they differ."""
    want = Unrolled(fixture.functions, fixture.data, "clean", some).logits()
    return largest_difference(fixture.logits(*some), list(want.split(SMALL.layout.lengths)))


@pytest.mark.parametrize(
    ("kind", "examples", "tolerance"),
    [("native", 60, 1e-9), ("gpt2", 12, 1e-9), ("llama", 16, 2e-5), ("gemma2", 4, 2e-5)],
)
def test_random_languages_unroll(kind: str, examples: int, tolerance: float) -> None:
    # In double precision (but for Llama's norms and rotations): where patches zero all that a norm reads, it
    # makes much of the last bits.
    fixture = Fixture(kind, n_heads=2, data=SMALL, double=True)

    @checked(examples)
    @given(patches(fixture.graph))
    def check(some: tuple[Patch, ...]) -> None:
        try:
            difference = unrolled_and_hooked(fixture, some)
        except UndefinedError:
            assume(False)
        else:
            assert difference < tolerance, some

    check()


@torch.no_grad()
def probed_and_hooked(fixture: Fixture, some: tuple[Patch, ...], probe: Probe) -> float:
    """By how much what stands at a probe differs."""
    want = Unrolled(fixture.functions, fixture.data, "clean", some).probed(probe)
    got = fixture.oracle.read(experiment(), cell(*some), probe)
    if probe.site in (Site.SCORES, Site.PATTERN):
        got = across(got, fixture.data.layout, -torch.inf if probe.site is Site.SCORES else 0.0)
    assert got.shape == want.shape
    assert torch.equal(got.isfinite(), want.isfinite())
    return (got - want).nan_to_num(0.0, 0.0, 0.0).abs().max().item()


def across(rows: Tensor, layout: Layout, beyond: float) -> Tensor:
    """Rows of attention `[token, position]` as `[token, token]`."""
    out = torch.full((layout.n_tokens, layout.n_tokens), beyond, dtype=rows.dtype)
    for offset, n in zip(layout.offsets, layout.lengths, strict=False):
        out[offset : offset + n, offset : offset + n] = rows[offset : offset + n, :n]
    return out


@pytest.mark.parametrize(
    ("kind", "examples", "tolerance"),
    [("native", 60, 1e-9), ("gpt2", 30, 1e-9), ("llama", 16, 2e-5), ("gemma2", 10, 2e-5)],
)
def test_what_stands_at_probes_unrolls(kind: str, examples: int, tolerance: float) -> None:
    fixture = Fixture(kind, n_heads=2, data=SMALL, double=True)
    logits = Step(fixture.graph.logits_set)

    def ending(place: tuple[Probe, Step]) -> st.SearchStrategy[tuple[Probe, tuple[Patch, ...]]]:
        probe, step = place
        ends = st.builds(
            lambda ports, some, alone: Alt((step_at(step, ports, some), *alone)),
            st.sampled_from([7, 7, 1, 6]), tokens(), st.sampled_from([(), (logits,)]),
        )  # fmt: skip
        long = languages(fixture.graph, ends)
        itself = st.sampled_from(starts_at(probe, step)).map(lambda start: Seq((start,)))
        one = patches_of(st.one_of(long, long, itself))
        some = st.one_of(one.map(lambda p: (p,)), st.tuples(one, one))
        return some.map(lambda cell: (probe, cell))

    @checked(examples)
    @given(st.sampled_from(probes(fixture.graph)).flatmap(ending))
    def check(drawn: tuple[Probe, tuple[Patch, ...]]) -> None:
        probe, some = drawn
        try:
            difference = probed_and_hooked(fixture, some, probe)
        except UndefinedError:
            assume(False)
        else:
            assert difference < tolerance, drawn

    check()


def step_at(step: Step, ports: int, some: int) -> Step:
    return replace(step, ports=ports, tokens=some)


def starts_at(probe: Probe, step: Step) -> list[Step]:
    """Starts at the very place that a metric reads, or inside the same node."""
    if probe.site in (Site.STREAM, Site.ATTN_OUT):
        return [replace(step, site=probe.site), replace(step, site=probe.site, tokens=EARLY)]
    of_mlp = probe.site in (Site.IN, Site.POST)
    sites = (Site.OUT, Site.IN, Site.POST) if of_mlp else (Site.OUT, Site.Q, Site.K, Site.V, Site.SCORES, Site.PATTERN)
    sites = (Site.OUT,) if probe.site is Site.OUT else (Site.OUT, Site.Z, Site.K) if probe.site is Site.Z else sites
    return [replace(step, site=site, tokens=some) for site in sites for some in (-1, EARLY)]


@pytest.mark.parametrize("kind", ["native", "gpt2"])
def test_a_value_that_is_itself_read_unrolls(kind: str) -> None:
    f = Fixture(kind, n_heads=2, data=SMALL, double=True)
    half = Value(((0.5, FromWorld("corrupt")), (0.25, Itself())))
    for probe, step in probes(f.graph):
        base = f.oracle.read(experiment(), cell(), probe)
        effects: list[bool] = []
        for start in starts_at(probe, step):
            # A complement is unrolled to the bottom: of a deep model at one probe alone.
            both = (False, True) if kind == "native" or probe.site is Site.IN else (False,)
            for patch in (Patch(start, half, complement) for complement in both):
                assert probed_and_hooked(f, (patch,), probe) < 1e-9
                effects.append(not torch.equal(f.oracle.read(experiment(), cell(patch), probe), base))
        assert any(effects), probe


@pytest.mark.parametrize("kind", ["native", "gpt2"])
def test_circuits_of_edges_unroll(kind: str) -> None:
    fixture = Fixture(kind, n_heads=2, data=SMALL, double=True)

    @checked(6)
    @given(circuits(fixture.graph))
    def check(circuit: Patch) -> None:
        assert unrolled_and_hooked(fixture, (circuit,)) < 1e-9

    check()


def test_a_circuit_may_hold_a_head_at_some_tokens_and_go_on_through_it_at_others() -> None:
    f = Fixture("native", n_heads=2, data=SMALL, double=True)
    graph, low, high = f.graph, head(f.graph, 0, 0), head(f.graph, 1, 1)
    logits = Step(graph.logits_set)
    whole = Seq((Step(high, tokens=EARLY), logits))
    through = Seq((Step(low), Step(high), logits))
    some = (Patch(Alt((whole, through)), Value(()), complement=True),)
    assert unrolled_and_hooked(f, some) < 1e-9
    alone = f.logits(Patch(through, Value(()), complement=True))
    assert largest_difference(f.logits(*some), alone) > 1e-3


def test_a_stream_is_read_from_above_it_alone() -> None:
    f = Fixture("native", n_heads=2, data=SMALL, double=True)
    stream = Step(f.graph.below(2), site=Site.STREAM, rank=2)
    path = Seq((stream, Step(f.graph.heads), Step(f.graph.logits_set)))
    for value in (CORRUPT, Value(())):
        assert unrolled_and_hooked(f, (Patch(path, value, complement=True),)) < 1e-9
        assert unrolled_and_hooked(f, (Patch(path, value),)) < 1e-9


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_both_drivers_agree(kind: str) -> None:
    one, other = (Fixture(kind, driver, data=SMALL) for driver in ("transformer_lens", "forward_hooks"))

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
