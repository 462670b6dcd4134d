"""Residual graphs as JSON: the same graph comes back, and nothing else is read for one."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchc.ir.graph import ResidualGraph
from patchc.ir.graph_json import graph_from_json, graph_to_json
from tests.drawn import network

GRAPHS = st.randoms(use_true_random=False).map(network)


@settings(max_examples=100, deadline=None)
@given(GRAPHS)
def test_the_same_graph_comes_back(graph: ResidualGraph) -> None:
    text = json.dumps(graph_to_json(graph), allow_nan=False)
    back = graph_from_json(json.loads(text))
    assert back == graph
    assert json.dumps(graph_to_json(back)) == text
    assert (back.readers, back.n_edges, back.top) == (graph.readers, graph.n_edges, graph.top)
    assert [type(n.kind) for n in back.nodes] == [type(n.kind) for n in graph.nodes]


WRONG = st.sampled_from([None, True, 1.5, "embed!", [], [[]], {}, -0.0])


@settings(max_examples=200, deadline=None)
@given(GRAPHS, st.randoms(use_true_random=False), WRONG)
def test_what_is_no_graph_is_refused(graph: ResidualGraph, rng: Random, wrong: Any) -> None:
    """One value anywhere replaced by another of another type."""
    content: Any = json.loads(json.dumps(graph_to_json(graph)))
    places = list(spots(content))
    holder, key = rng.choice(places)
    old = holder[key]
    holder[key] = copy.deepcopy(wrong)
    if type(old) is type(wrong) and not (isinstance(old, str) and key == 0):
        return  # another number or name, or fewer members: well formed, if not this graph
    if wrong is None and isinstance(holder, list):
        return  # a node without a layer
    with pytest.raises(ValueError, match=r"where a |values where |not a valid |not the fields"):
        graph_from_json(content)


def spots(content: Any) -> Any:
    """Every (holder, key) of a JSON value."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list):
            yield from spots(value)


@pytest.mark.parametrize("content", [None, [], {}, "", 1])
def test_other_values_are_refused(content: object) -> None:
    with pytest.raises(ValueError, match="not the fields of a graph"):
        graph_from_json(content)


def test_a_field_more_or_less_is_refused() -> None:
    content = graph_to_json(network(Random(0)))
    for other in ({**content, "new": 1}, {k: v for k, v in content.items() if k != "causal"}):
        with pytest.raises(ValueError, match="not the fields"):
            graph_from_json(other)
