"""Paths that end where a metric reads: what `patch node`, `edge`, `path` and `all` become, and what is no end."""

from __future__ import annotations

from typing import Any

import pytest

from patchc.diagnostics import PatchcError, Report
from patchc.ir.bits import bitset
from patchc.ir.experiment import Constant, Kl, Measure, Metric, NodeRead, Probe, Product, Quotient, Read, Sum
from patchc.ir.graph import Kind
from patchc.ir.paths import Site
from patchc.ir.printer import print_path
from patchc.ir.tokens import Layout
from patchc.resolve.circuits import circuit
from patchc.resolve.ends import LOGITS, Ends, ends_of, probe_name
from patchc.resolve.paths import Paths
from patchc.resolve.terms import Chain, Member, NodeSet, Repeat, of_nodes
from tests.unit.resolving import SMALL

LAYOUT = Layout((6,))
READ = Read(Measure.LOGIT, ((1,),), (5,))


def nodes(kind: Kind, *place: int) -> int:
    found = SMALL.node(kind, *place)
    assert found is not None
    return 1 << found.id


MOVER = nodes(Kind.HEAD, 3, 1)
MLP = nodes(Kind.MLP, 1)
HEAD = nodes(Kind.HEAD, 1, 0)
PATTERN = Ends(False, (Probe(MOVER, Site.PATTERN),))
STREAM = Ends(False, (Probe(0, Site.STREAM, 7),))
BOTH = Ends(True, (Probe(MOVER),))


def member(of: int, site: Site = Site.OUT, ports: int = 7, **more: Any) -> NodeSet:
    name = SMALL.nodes[of.bit_length() - 1].name + ("" if site is Site.OUT else f".{site}")
    return NodeSet((Member(name, of, site, ports, **more),))


def shown(path: Any) -> str:
    return print_path(path, SMALL, LAYOUT)


def paths() -> Paths:
    return Paths(SMALL, Report())


def refused(term: Any, ends: Ends) -> str:
    with pytest.raises(PatchcError) as caught:
        paths().path(term, None, ends)
    (found,) = caught.value.diagnostics
    assert found.code == "path-end"
    return found.message


# ---- what metrics read


def test_the_ends_are_what_the_leaves_read() -> None:
    at = NodeRead(Probe(MOVER, Site.PATTERN), (5,), (2,))
    other = NodeRead(Probe(MOVER), (5,), key="k")
    mixed = Sum(((1.0, READ), (2.0, Quotient(at, Constant(2.0))), (1.0, Product((at, Kl("clean", (5,)))))))
    assert ends_of([Metric("m", READ)]) == LOGITS
    assert ends_of([Metric("m", at), Metric("n", other)]) == Ends(False, (at.probe, other.probe))
    assert ends_of([Metric("m", mixed)]) == Ends(True, (at.probe,))
    assert ends_of([Metric("m", Constant(1.0))]) == LOGITS
    assert not ends_of([], certain=False).certain


def test_places_are_named_as_a_spec_writes_them() -> None:
    probes = [Probe(MOVER), Probe(MOVER, Site.PATTERN), Probe(0, Site.STREAM, 7), Probe(0, Site.STREAM, 9)]
    heads = bitset(n.id for n in SMALL.nodes if n.layer == 2 and n.kind in (Kind.HEAD, Kind.ATTN_BIAS))
    probes += [Probe(heads, Site.ATTN_OUT), Probe(MLP, Site.POST)]
    names = ["head[3, 1]", "head[3, 1].pattern", "resid_pre[3]", "resid_post[3]", "attn_out[2]", "mlp[1].post"]
    assert [probe_name(SMALL, p) for p in probes] == names
    assert BOTH.told(SMALL) == "the logits and head[3, 1]"


# ---- nodes


@pytest.mark.parametrize(
    ("start", "ends", "expected"),
    [
        (member(HEAD), LOGITS, "head[1, 0] -> any* -> logits"),
        (member(HEAD), PATTERN, "head[1, 0] -> any* -> head[3, 1].{q, k}"),
        (member(HEAD), STREAM, "head[1, 0] -> any* -> resid_pre[3]"),
        (member(HEAD), BOTH, "head[1, 0] -> any* -> ((logits) | (head[3, 1]))"),
        (member(MOVER), BOTH, "(head[3, 1] -> any* -> ((logits) | (head[3, 1]))) | (head[3, 1])"),
        (member(MOVER), PATTERN, "head[3, 1] -> any* -> head[3, 1].{q, k}"),  # its output is no part of its pattern
    ],
)  # fmt: skip
def test_a_node_patch_ends_at_all_that_is_read(start: NodeSet, ends: Ends, expected: str) -> None:
    assert shown(paths().node(start, None, ends)) == expected


@pytest.mark.parametrize(
    ("site", "read", "is_read"),
    [
        (Site.Q, Site.PATTERN, True),
        (Site.K, Site.SCORES, True),
        (Site.V, Site.PATTERN, False),
        (Site.V, Site.Z, True),
        (Site.Q, Site.K, False),
        (Site.PATTERN, Site.SCORES, False),
        (Site.SCORES, Site.OUT, True),
        (Site.SCORES, Site.PATTERN, True),
        (Site.PATTERN, Site.Z, True),
        (Site.K, Site.V, False),
        (Site.OUT, Site.Z, False),
        (Site.OUT, Site.ATTN_OUT, True),
        (Site.Z, Site.ATTN_OUT, True),
        (Site.IN, Site.POST, True),
        (Site.POST, Site.IN, False),
    ],
)
def test_a_value_is_read_where_it_is_put_in(site: Site, read: Site, is_read: bool) -> None:
    of = MLP if site in (Site.IN, Site.POST) else MOVER
    ends = Ends(False, (Probe(of, read),))
    found = shown(paths().node(member(of, site), None, ends))
    assert (
        found.endswith(f" | ({SMALL.nodes[of.bit_length() - 1].name}{'' if site is Site.OUT else f'.{site}'})")
        is is_read
    )


def test_a_stream_is_read_where_it_is_put_in() -> None:
    below = NodeSet((Member("resid_pre[3]", SMALL.below(7), Site.STREAM, 0, rank=7),))
    lower = NodeSet((Member("resid_pre[2]", SMALL.below(5), Site.STREAM, 0, rank=5),))
    assert shown(paths().node(below, None, STREAM)) == "resid_pre[3] -> any* -> resid_pre[3]"  # no step between will do
    assert shown(paths().node(lower, None, STREAM)) == "resid_pre[2] -> any* -> resid_pre[3]"


# ---- edges


def test_an_edge_can_end_at_what_is_read() -> None:
    into = member(MOVER, Site.Q, 1)
    found = shown(paths().edge(Chain((member(HEAD), into)), None, PATTERN))
    expected = "(head[1, 0] -> head[3, 1].q) | (head[1, 0] -> head[3, 1].q -> any* -> head[3, 1].{q, k})"
    assert found == expected
    through = shown(paths().edge(Chain((member(HEAD), member(MLP))), None, PATTERN))
    assert through == "head[1, 0] -> mlp[1] -> any* -> head[3, 1].{q, k}"


def test_an_edge_into_a_stream_is_the_direct_part_of_it() -> None:
    stream = NodeSet((Member("resid_pre[3]", SMALL.below(7), Site.STREAM, 0, rank=7),))
    assert shown(paths().edge(Chain((member(HEAD), stream)), None, STREAM)) == "head[1, 0] -> resid_pre[3]"
    with pytest.raises(PatchcError):
        paths().edge(Chain((member(HEAD), stream)), None, LOGITS)


def test_an_edge_into_logits_that_nothing_reads_has_no_paths() -> None:
    logits = NodeSet(of_nodes(SMALL, SMALL.logits_set))
    assert shown(paths().edge(Chain((member(HEAD), logits)), None, PATTERN)) == "nothing"


# ---- paths


def test_a_path_can_end_at_what_is_read() -> None:
    mlps = Repeat(NodeSet(of_nodes(SMALL, SMALL.mlps)))
    into = member(MOVER, Site.Q, 1, tokens=1 << 5)
    stream = NodeSet((Member("resid_post[2]", SMALL.below(7), Site.STREAM, 0, rank=7, tokens=1 << 5),))
    assert shown(paths().path(Chain((member(HEAD), mlps, into)), None, PATTERN)) == (
        "head[1, 0] -> mlp* -> head[3, 1].q @ {5}"
    )
    assert shown(paths().path(Chain((member(HEAD), mlps, stream)), None, STREAM)) == (
        "head[1, 0] -> mlp* -> resid_pre[3] @ {5}"
    )
    assert shown(paths().path(member(MOVER), None, BOTH)) == "head[3, 1]"


def test_a_path_ends_nowhere_else() -> None:
    logits = NodeSet(of_nodes(SMALL, SMALL.logits_set))
    by_v = member(MOVER, Site.V, 4)
    told = "a path ends at what is measured, and the metrics read head[3, 1].pattern; this one ends at "
    assert refused(Chain((member(HEAD), logits)), PATTERN) == told + "logits"
    assert refused(Chain((member(HEAD), by_v)), PATTERN) == told + "head[3, 1].v"
    assert refused(Chain((member(HEAD), member(MLP))), PATTERN) == told + "mlp[1]"
    assert refused(member(HEAD), PATTERN) == told.removesuffix("; this one ends at ")
    assert refused(Chain((member(HEAD), Repeat(member(MLP)))), PATTERN) == told.removesuffix("; this one ends at ")
    assert refused(Chain((member(HEAD), member(MLP))), LOGITS) == "a path ends at the logits"


def test_where_a_metric_is_at_fault_no_end_is() -> None:
    unknown = Ends(certain=False)
    assert shown(paths().path(Chain((member(HEAD), member(MLP))), None, unknown)) == "head[1, 0] -> mlp[1]"


# ---- all, circuits


def test_all_enters_into_whatever_is_read() -> None:
    assert shown(paths().everything(BOTH)) == "any -> ((logits) | (head[3, 1]))"


def test_a_circuit_leads_to_whatever_is_read() -> None:
    inside = NodeSet((Member("input", SMALL.input), Member("mlp[1]", MLP)))
    by_nodes = circuit(SMALL, [inside], None)
    assert shown(paths().path(by_nodes, None, PATTERN)) == "input -> (input | mlp[1])* -> head[3, 1].{q, k}"


def test_ends_are_not_mixed_up() -> None:
    one, start = paths(), member(HEAD)
    edge = Chain((start, member(MLP)))
    found = [shown(one.edge(edge, None, ends)) for ends in (LOGITS, PATTERN, Ends(), STREAM, LOGITS)]
    assert [f.rsplit(" ", 1)[1] for f in found] == ["logits", "k}", "logits", "resid_pre[3]", "logits"]
