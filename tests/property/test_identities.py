"""What path sets must satisfy, whatever the network: identities between different ways to say one thing."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.ir.bits import bits, bitset
from patchc.ir.experiment import Cell, FromWorld, Patch, Value
from patchc.ir.graph import BlockKind, Reader, ResidualGraph
from patchc.ir.paths import Alt, Edges, Path, Seq, Star, Step
from tests.drawn import Case, case
from tests.property.test_unrolling import EPS, base, compiled, fold, plain_runs
from tests.toy import Toy

CORRUPT = Value(((1.0, FromWorld("corrupt")),))
randoms = st.randoms(use_true_random=False)
quick = settings(max_examples=60, deadline=None)


def logits(c: Case, *patches: Patch) -> Tensor:
    dag, folded = fold(c, Cell((), patches))
    assert not folded.faults
    return compiled(c, dag, folded.root)[0]


def path(graph: ResidualGraph, *parts: Path) -> Patch:
    return Patch(Seq((*parts, Step(graph.logits_set))), CORRUPT)


def anything(graph: ResidualGraph) -> Star:
    return Star(Step(graph.all))


def into(reader: Reader) -> Step:
    return Step(1 << reader.node.id, ports=7 if reader.port is None else 1 << reader.port)


def edge(graph: ResidualGraph, writers: int, reader: Reader) -> Patch:
    if reader.node is graph.logits:
        return path(graph, Step(writers))
    return path(graph, Step(writers), into(reader), anything(graph))


def relation(graph: ResidualGraph, rng: Random) -> Edges:
    """A random circuit: for each reader some of the writers below it."""
    rows = []
    for r in graph.readers:
        mine = rng.getrandbits(len(graph.nodes) - 1) & graph.below(r.node.rank)
        rows.append(((r.node.id, -1 if r.port is None else r.port), mine))
    return Edges(tuple(rows))


@quick
@given(randoms)
def test_all_paths_patched_is_the_other_world(rng: Random) -> None:
    c = case(rng)
    other = c.toy.unembed(plain_runs(c)["corrupt"].stream[-1])
    everything = path(c.graph, Step(c.graph.input), anything(c.graph))
    nothing = Patch(Seq((Step(0), Step(c.graph.logits_set))), CORRUPT, complement=True)
    assert (logits(c, everything) - other).abs().max() < EPS
    assert (logits(c, nothing) - other).abs().max() < EPS


@quick
@given(randoms)
def test_no_path_patched_is_the_base_run(rng: Random) -> None:
    c = case(rng)
    everything = Seq((Step(c.graph.input), anything(c.graph), Step(c.graph.logits_set)))
    assert torch.equal(logits(c, Patch(everything, CORRUPT, complement=True)), base(c))
    assert torch.equal(logits(c, path(c.graph, Step(0))), base(c))


@quick
@given(randoms)
def test_patching_every_edge_of_a_node_is_patching_the_node(rng: Random) -> None:
    c = case(rng)
    node = 1 << rng.randrange(len(c.graph.nodes) - 1)
    rank = c.graph.members(node)[0].rank
    edges = [edge(c.graph, node, r) for r in c.graph.readers if r.node.rank > rank]
    assert (logits(c, path(c.graph, Step(node), anything(c.graph))) - logits(c, *edges)).abs().max() < EPS


@quick
@given(randoms)
def test_edges_outside_a_circuit_are_the_paths_not_wholly_in_it(rng: Random) -> None:
    """Three ways to run a circuit: its complement as edges, as one relation, as all paths but its own."""
    c = case(rng)
    graph, circuit = c.graph, relation(c.graph, rng)
    outside = Edges(circuit.rows, keep=False)
    edges = [
        edge(graph, missing, r)
        for r in graph.readers
        if (missing := graph.below(r.node.rank) & outside.writers(r.node.id, -1 if r.port is None else r.port))
    ]
    as_relation = path(graph, Step(graph.all, via=outside), Star(Step(graph.all, via=circuit)))
    inside = Seq((Step(graph.input, via=circuit), Star(Step(graph.all, via=circuit)), Step(graph.logits_set)))
    as_paths = Patch(inside, CORRUPT, complement=True)
    expected = logits(c, as_relation)
    assert (logits(c, as_paths) - expected).abs().max() < EPS
    if edges:
        assert (logits(c, *edges) - expected).abs().max() < EPS


@quick
@given(randoms)
def test_union_is_two_patches(rng: Random) -> None:
    c = case(rng)
    one, two = (Step(1 << rng.randrange(len(c.graph.nodes) - 1)) for _ in range(2))
    both = path(c.graph, Alt((one, two)), anything(c.graph))
    apart = path(c.graph, one, anything(c.graph)), path(c.graph, two, anything(c.graph))
    assert (logits(c, both) - logits(c, *apart)).abs().max() < EPS


@quick
@given(randoms)
def test_a_receiver_that_is_set_is_patched_by_what_it_would_compute(rng: Random) -> None:
    """Path patching as in IOI: run the sender into the receiver alone, store what the receiver gives, patch that in."""
    c = case(rng)
    graph = c.graph
    readers = [r for r in graph.readers if r.node is not graph.logits]
    receiver = rng.choice(readers).node
    senders = graph.below(receiver.rank) & graph.of(
        *{n.kind for n in graph.nodes if n.kind not in ("attn_bias", "logits")}
    )
    sender = 1 << rng.choice(list(bits(senders)))
    mine = 1 << receiver.id
    rest = graph.all & ~mine
    set_once = path(graph, Step(sender), Step(mine), Star(Step(rest)))
    dag, folded = fold(c, Cell((), (set_once,)))
    live = path(graph, Step(sender), Step(mine), anything(graph))
    # The receiver reads nothing above itself, so with one receiver set and live are the same.
    assert (compiled(c, dag, folded.root)[0] - logits(c, live)).abs().max() < EPS


@quick
@given(randoms)
def test_positions_of_a_patch_add_up(rng: Random) -> None:
    """A start at two disjoint sets of positions is the start at their union."""
    c = case(rng)
    node, tokens = 1 << rng.randrange(len(c.graph.nodes) - 1), rng.getrandbits(c.prompts.layout.n_tokens)
    rest = c.prompts.layout.all & ~tokens
    halves = [path(c.graph, Step(node, tokens=t), anything(c.graph)) for t in (tokens, rest)]
    assert (logits(c, *halves) - logits(c, path(c.graph, Step(node), anything(c.graph)))).abs().max() < EPS


class Doubled(Toy):
    """Its norm after attention is linear."""

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        return 2 * x if any(b.layer == layer and b.post_norm for b in self.graph.blocks) else x


@quick
@given(randoms)
def test_where_the_norm_after_attention_is_linear_heads_add_up(rng: Random) -> None:
    """As in the network that has no such norm, and whose heads write twice as much."""
    drawn = case(rng, inside=True)
    blocks = tuple(replace(b, post_norm=b.kind is BlockKind.ATTENTION) for b in drawn.graph.blocks)
    normed, plain = Doubled(replace(drawn.graph, blocks=blocks)), Toy(without_norms(drawn.graph))
    plain.o, plain.ob = [2 * o for o in plain.o], [2 * b for b in plain.ob]
    a, b = (replace(drawn, toy=toy) for toy in (normed, plain))
    (one, folded), (other, also) = fold(a, a.cell), fold(b, b.cell)
    if not folded.faults:
        assert (compiled(a, one, folded.root)[0] - compiled(b, other, also.root)[0]).abs().max() < EPS


def without_norms(graph: ResidualGraph) -> ResidualGraph:
    return replace(graph, blocks=tuple(replace(b, post_norm=False) for b in graph.blocks))


def test_relations_compare_by_content() -> None:
    rows = (((1, 0), bitset([0])),)
    assert Edges(rows) == Edges(((((1, 0), bitset([0]))),))
    assert hash(Edges(rows)) == hash(Edges(((((1, 0), bitset([0]))),)))
    assert Edges(rows) != Edges(rows, keep=False)
