"""Sites on other models: grouped key-value heads, no MLPs, attention that looks ahead; and what sweeps share."""

from __future__ import annotations

from typing import Any

import pytest

from patchc.ir.graph import residual_graph
from patchc.ir.paths import EVERYWHERE, Seq, Site, Step
from tests.unit.resolving import ATTENTION_ONLY, GPT2, SMALL, error, errors, experiment, resolved

SIZES: dict[str, Any] = {"n_layers": 2, "d_model": 32, "d_head": 8, "d_vocab": 60, "has_pos_embed": False}
GROUPED = residual_graph("llama", n_heads=4, n_kv_heads=2, d_mlp=16, **SIZES)
SHARED = residual_graph("falcon", n_heads=4, n_kv_heads=1, d_mlp=16, **SIZES)
LOOKS_AHEAD = residual_graph("tracr", n_heads=2, d_mlp=16, causal=False, **SIZES)


def starts(body: str, graph: Any = SMALL, **options: Any) -> list[Step]:
    """The first step of each cell's only patch."""
    found: list[Step] = []
    for cell in experiment(f"run clean {body}", graph, **options).cells:
        (patch,) = cell.patches
        assert isinstance(patch.path, Seq)
        step = patch.path.parts[0]
        assert isinstance(step, Step)
        found.append(step)
    return found


def names(step: Step, graph: Any) -> list[str]:
    return [n.name for n in graph.members(step.nodes)]


# ---- grouped keys and values


def test_a_key_value_head_is_all_of_its_query_heads() -> None:
    (step,) = starts("patch node kv[1, 1].k with corrupt", GROUPED)
    assert (names(step, GROUPED), step.site) == (["head[1, 2]", "head[1, 3]"], Site.K)
    (step,) = starts("patch node kv[1, *].v with corrupt", GROUPED)
    assert names(step, GROUPED) == [f"head[1, {h}]" for h in range(4)]
    (step,) = starts("patch node kv[0, -1].v @ end with corrupt", SHARED)
    assert names(step, SHARED) == [f"head[0, {h}]" for h in range(4)]


def test_a_sweep_over_key_value_heads_counts_them() -> None:
    found = experiment("for g in kv.{k, v} run clean patch node g with corrupt", GROUPED)
    assert [(d.name, d.coords) for d in found.dims] == [("layer", (0, 1)), ("kv", (0, 1)), ("site", ("k", "v"))]
    assert len(found.cells) == 8
    one = experiment("for g in kv[0, *].k run clean patch node g with corrupt", GROUPED)
    assert [(d.name, d.coords) for d in one.dims] == [("layer", (0,)), ("kv", (0, 1))]


def test_a_key_value_head_is_entered_by_all_of_its_query_heads() -> None:
    body = "run clean patch path embed -> kv[1, 0].v -> logits with corrupt"
    path: Any = experiment(body, GROUPED).cells[0].patches[0].path
    assert (names(path.parts[1], GROUPED), path.parts[1].ports) == (["head[1, 0]", "head[1, 1]"], 4)


def test_key_value_heads_are_fewer_than_heads() -> None:
    found = error("run clean patch node kv[1, 2].k with corrupt", GROUPED)
    assert (found.code, "key-value heads 0..1" in found.message) == ("unknown-node", True)


def test_a_tensor_can_be_a_key_value_heads_own() -> None:
    assert starts('patch node kv[1, 0].k with tensor("t")', GROUPED, tensors={"t": (8,)})
    assert (
        error('run clean patch node kv[1, 0].k with tensor("t")', GROUPED, tensors={"t": (32,)}).code == "tensor-shape"
    )


# ---- patterns


def test_where_attention_looks_ahead_so_may_a_pattern() -> None:
    (step,) = starts("patch node head[1, 0].pattern[s2, end] with corrupt", LOOKS_AHEAD)
    assert (step.tokens, step.sources) == (1 << 9, 1 << 13)


def test_an_entry_that_looks_ahead_in_some_prompts_alone_is_none_of_them() -> None:
    rows = [{"clean": "The keys are left", "answer": " Mary", "a": 1, "b": b} for b in (0, 2)]
    body = "run clean patch node head[1, 0].pattern[a, b] with zero measure logit(answer)"
    found = experiment(body, data=rows).cells[0].patches[0].path
    assert isinstance(found, Seq)
    rows[0]["b"] = 3
    assert error(body, data=rows).code == "hidden-entry"


def test_a_cell_of_a_sweep_may_look_ahead() -> None:
    assert len(starts("for d in positions, s in positions patch node head[1, 0].pattern[d, s] with zero")) == 14 * 14


def test_rows_are_asked_at_and_entries_looked_at() -> None:
    (row,) = starts("patch node head[1, 0].pattern @ end with zero")
    (same,) = starts("patch node head[1, 0].pattern[end] with zero")
    (column,) = starts("patch node head[1, 0].scores[*, 0] with zero")
    assert row == same
    assert (row.tokens, row.sources) == (1 << 13, EVERYWHERE)
    assert (column.tokens, column.sources) == (EVERYWHERE, 1)


# ---- neurons


def test_neurons_are_one_start_however_they_are_written() -> None:
    (braces,) = starts("patch node mlp[1].post[{3, 1}] with zero")
    (union,) = starts("patch node mlp[1].post[1] | mlp[1].post[3] with zero")
    (left,) = starts("patch node mlp[1].post[1..3] - mlp[1].post[2] with zero")
    assert braces == union == left
    assert braces.neurons == 0b1010
    assert starts("patch node mlp[1].post[*] with zero") == starts("patch node mlp[1].post with zero")


def test_a_tensor_for_one_neuron_can_be_one_number() -> None:
    tensors = {"one": (1,), "all": (64,), "stream": (32,)}
    assert starts('patch node mlp[1].post[3] with tensor("one")', tensors=tensors)
    assert starts('patch node mlp[1].post[3..4] with tensor("all")', tensors=tensors)
    assert error('run clean patch node mlp[1].post[3..4] with tensor("one")', tensors=tensors).code == "tensor-shape"
    assert error('run clean patch node mlp[1].in with tensor("all")', tensors=tensors).code == "tensor-shape"


def test_a_model_without_mlps_has_no_neurons() -> None:
    assert error("run clean patch node mlp[0].post[0] with corrupt", ATTENTION_ONLY).code == "unknown-node"
    assert error("run clean patch node mlp.post[0] with corrupt", ATTENTION_ONLY).code in ("unknown-node", "empty-set")


def test_many_neurons_are_taken_from_many() -> None:
    steps = starts("patch node mlp[11].post[*] - mlp[11].post[0..3070] with zero", GPT2)
    assert [s.neurons for s in steps] == [1 << 3071]
    nothing = "experiment e { run clean patch node mlp[..1].post[*] - mlp.post[*] with zero measure diff }"
    with_other = errors(nothing, GPT2)
    assert [d.code for d in with_other] == ["empty-set"]


# ---- sweeps


def test_a_sweep_of_entries_makes_each_step_once() -> None:
    found = starts("for h in head[1, *], d in positions, s in positions patch node h.pattern[d, s] with zero")
    again = starts("for h in head[1, *], d in positions patch node h.pattern[d, end] with zero")
    assert len({id(s) for s in found}) == len(set(found)) == 4 * 14 * 14
    assert set(again) <= set(found)


@pytest.mark.parametrize("name", ["a | b", "b | a"])
def test_a_variable_over_two_entries_of_a_head_keeps_both(name: str) -> None:
    lets = "let a = head[1, 0].pattern[end, s2]\nlet b = head[1, 0].pattern[end, 0]\n"
    text = f"{lets} experiment e {{ for h in {name} run clean patch node h with zero measure diff }}"
    (found,) = resolved(text).study.experiments
    assert len({c.index for c in found.cells}) == len(found.cells) == 2


def test_a_whole_layers_neurons_are_no_neuron() -> None:
    text = "for n in {} run clean patch node n with zero"
    whole = experiment(text.format("mlp[0].post | mlp[1].post")).dims
    assert [(d.name, d.coords) for d in whole] == [("n", ("mlp[0].post", "mlp[1].post"))]
    single = experiment(text.format("mlp[0].post[3]")).dims
    assert [(d.name, d.coords) for d in single] == [("layer", (0,)), ("neuron", (3,))]
