"""The rank rule, the reach of a value and differences of sets, each against what it means written out in full."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from patchc.diagnostics import Report
from patchc.ir.bits import bits, bitset
from patchc.ir.graph import PORTS, QKV, Kind, ResidualGraph, residual_graph
from patchc.ir.paths import EVERYWHERE, Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.resolve.legality import Legality, Reach
from patchc.resolve.paths import Paths
from patchc.resolve.terms import Chain, Difference, Member, NodeSet, of_nodes

TINY = residual_graph(
    "tiny", n_layers=2, n_heads=2, d_model=4, d_head=2, d_vocab=9, has_pos_embed=False, has_attn_bias=(True, False)
)
PARALLEL = residual_graph(
    "tiny", n_layers=2, n_heads=2, d_model=4, d_head=2, d_vocab=9, has_pos_embed=True, parallel=True
)
LAYOUT = Layout((3, 2))
HEAD = TINY.node(Kind.HEAD, 1, 0)


def steps(graph: ResidualGraph, with_tokens: bool) -> st.SearchStrategy[Path]:
    tokens = st.integers(1, LAYOUT.all) if with_tokens else st.just(EVERYWHERE)
    nodes = st.integers(0, 2 * graph.logits_set - 1)
    return st.builds(Step, nodes, st.integers(1, QKV), st.one_of(st.just(EVERYWHERE), tokens))


def paths(graph: ResidualGraph, with_tokens: bool = False) -> st.SearchStrategy[Path]:
    def extend(inner: st.SearchStrategy[Path]) -> st.SearchStrategy[Path]:
        several = st.lists(inner, min_size=1, max_size=3).map(tuple)
        return st.one_of(several.map(Seq), several.map(Alt), inner.map(Star))

    return st.recursive(steps(graph, with_tokens), extend, max_leaves=6)


# ---- the rank rule


def climbs(graph: ResidualGraph) -> Iterator[tuple[int, ...]]:
    """Every sequence of nodes along edges, the empty one too."""
    ranks = range(graph.top + 1)
    choices = [[(), *((n.id,) for n in graph.nodes if n.rank == r)] for r in ranks]
    for chosen in product(*choices):
        nodes = tuple(i for one in chosen for i in one)
        if all(graph.nodes[i].kind not in (Kind.EMBED, Kind.POS_EMBED, Kind.ATTN_BIAS) for i in nodes[1:]):
            yield nodes


CLIMBS = {id(graph): list(climbs(graph)) for graph in (TINY, PARALLEL)}


def matches(path: Path, word: tuple[int, ...]) -> bool:
    match path:
        case Step():
            return len(word) == 1 and bool(path.nodes >> word[0] & 1)
        case Alt(parts):
            return any(matches(p, word) for p in parts)
        case Seq(()):
            return not word
        case Seq((part, *rest)):
            cuts = range(len(word) + 1)
            return any(matches(part, word[:i]) and matches(Seq(tuple(rest)), word[i:]) for i in cuts)
        case Star(part):
            cuts = range(1, len(word) + 1)
            return not word or any(matches(part, word[:i]) and matches(path, word[i:]) for i in cuts)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([TINY, PARALLEL]), st.data())
def test_a_legal_path_is_found_exactly_where_there_is_one(graph: ResidualGraph, data: st.DataObject) -> None:
    # It starts with a step, as every path does: a star in front could be taken no times.
    start = data.draw(steps(graph, False))
    path = Seq((start, data.draw(paths(graph))))
    legal = [word for word in CLIMBS[id(graph)] if matches(path, word)]
    expected = min((graph.nodes[word[-1]].rank for word in legal), default=None)
    assert Legality(graph).lowest(path) == expected


def test_the_brute_force_sees_illegal_and_legal_paths() -> None:
    head, mlp = TINY.node(Kind.HEAD, 0, 0), TINY.node(Kind.MLP, 0)
    assert head is not None
    assert mlp is not None
    up, down = (head.id, mlp.id), (mlp.id, head.id)
    assert up in CLIMBS[id(TINY)]
    assert down not in CLIMBS[id(TINY)]


# ---- positions


def arrivals(path: Path, token: int, first: bool, graph: ResidualGraph) -> set[int]:
    """Where a value that is at `token` can be after the path; a star is taken at most as often as there are tokens."""
    match path:
        case Step():
            if not path.tokens >> token & 1:
                return set()
            moves = not first and path.ports & 6 and path.nodes & graph.heads
            return set(bits(LAYOUT.after(1 << token))) if moves else {token}
        case Alt(parts):
            return {t for p in parts for t in arrivals(p, token, first, graph)}
        case Seq(parts):
            here = {token}
            for i, part in enumerate(parts):
                here = {t for h in here for t in arrivals(part, h, first and i == 0, graph)}
            return here
        case Star(part):
            here = {token}
            for _ in range(LAYOUT.n_tokens):
                here |= {t for h in here for t in arrivals(part, h, False, graph)}
            return here


@settings(max_examples=150, deadline=None)
@given(paths(TINY, with_tokens=True))
def test_the_reach_of_a_path_is_where_its_value_can_arrive(path: Path) -> None:
    path = Seq((Step(1), path))
    expected = {t for token in range(LAYOUT.n_tokens) for t in arrivals(path, token, True, TINY)}
    assert set(bits(Reach(TINY, LAYOUT).end(path))) == expected


def test_a_replaced_key_changes_later_positions() -> None:
    assert HEAD is not None
    for site, moves in ((Site.K, True), (Site.V, True), (Site.Q, False), (Site.Z, False)):
        end = Reach(TINY, LAYOUT).end(Step(1 << HEAD.id, tokens=1, site=site))
        assert end == (LAYOUT.prompt(0) if moves else 1)


def test_keys_and_values_move_what_enters_them_and_queries_do_not() -> None:
    assert HEAD is not None
    for port, moves in enumerate((False, True, True)):
        path = Seq((Step(1, tokens=1), Step(1 << HEAD.id, ports=1 << port)))
        assert Reach(TINY, LAYOUT).end(path) == (LAYOUT.prompt(0) if moves else 1)


# ---- differences

Entry = tuple[int, int, int]


def members() -> st.SearchStrategy[Member]:
    def build(node: int, port: int | None, tokens: int) -> Member:
        found = TINY.nodes[node]
        if port is None or found.kind is not Kind.HEAD:
            return Member(found.name, 1 << node, tokens=tokens)
        return Member(f"{found.name}.{PORTS[port]}", 1 << node, Site(PORTS[port]), 1 << port, tokens)

    ports = st.one_of(st.none(), st.integers(0, 2))
    tokens = st.one_of(st.just(EVERYWHERE), st.integers(1, LAYOUT.all))
    return st.builds(build, st.integers(0, TINY.logits.id - 1), ports, tokens)


def entries_of(member: Member) -> set[Entry]:
    """Every (node, port, token) at which a member is entered."""
    tokens = bits(member.tokens & LAYOUT.all)
    return set(product(bits(member.nodes), bits(member.ports), tokens))


def sets(max_size: int = 4) -> st.SearchStrategy[NodeSet]:
    return st.lists(members(), max_size=max_size).map(lambda found: NodeSet(tuple(found)))


@settings(max_examples=300, deadline=None)
@given(sets(6), sets())
def test_a_difference_takes_out_exactly_what_is_named(whole: NodeSet, less: NodeSet) -> None:
    left = Difference(TINY, lambda: LAYOUT.all).of(whole, less, None)
    taken = {e for m in less.members for e in entries_of(m)}
    expected = {e for m in whole.members for e in entries_of(m)} - taken
    assert {e for m in left.members for e in entries_of(m)} == expected


@settings(max_examples=200, deadline=None)
@given(sets(6))
def test_steps_enter_exactly_what_their_members_name(nodes: NodeSet) -> None:
    start, end = NodeSet(of_nodes(TINY, 1)), NodeSet(of_nodes(TINY, TINY.logits_set))
    path = Paths(TINY, Report()).path(Chain((start, nodes, end)), None)
    assert isinstance(path, Seq)
    middle = path.parts[1]
    steps_ = middle.parts if isinstance(middle, Alt) else (middle,)
    entered = {
        entry
        for step in steps_
        if isinstance(step, Step)
        for entry in product(bits(step.nodes), bits(step.ports), bits(step.tokens & LAYOUT.all))
    }
    assert entered == {e for m in nodes.members for e in entries_of(m)}


def test_what_is_written_reads_as_it_was_named() -> None:
    assert HEAD is not None
    whole = NodeSet(of_nodes(TINY, TINY.heads))
    less = NodeSet((Member("q", 1 << HEAD.id, Site.Q, 1),))
    left = Difference(TINY, lambda: LAYOUT.all).of(whole, less, None)
    assert [m.name for m in left.members] == ["head[0, 0]", "head[0, 1]", "head[1, 0].{k, v}", "head[1, 1]"]
    assert bitset([HEAD.id]) & left.nodes
