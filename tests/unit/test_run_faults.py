"""What must stop a run, or never happen to its inputs; and the graph as networkx gives it."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import pytest
import torch

import patchc
from patchc.ir.graph import residual_graph
from tests.models import gpt2

IDS = {"clean": [[1, 2, 3, 4]], "corrupt": [[1, 5, 3, 6]], "answer": [7], "wrong": [8]}


def codes(error: patchc.PatchcError) -> list[str]:
    return [d.code for d in error.diagnostics]


def spec(patch: str, measure: str = "logit(answer)") -> str:
    return f"experiment e {{ run clean {patch} measure {measure} }}"


def test_values_that_come_out_as_the_runs_own_are_no_result() -> None:
    module = gpt2()
    with torch.no_grad():
        module.transformer.h[0].attn.c_proj.weight[:8] = 0  # head 0 writes nothing, in whichever world
    m = patchc.load(module)
    with pytest.raises(patchc.PatchcError) as found:
        m.compile(spec("patch node head[0, 0] with corrupt"), data=IDS).run(progress=False)
    assert codes(found.value) == ["no-effect"]
    swept = m.compile(spec("for h in head[0, *] patch node h with corrupt"), data=IDS).run(progress=False)["e"]
    assert swept.no_effect == 1
    effects = swept.effects("logit(answer)")[0]
    assert abs(effects[0]) < 1e-6 < abs(effects[1])


def test_a_run_that_is_not_finite_has_no_rank() -> None:
    m = patchc.load(gpt2())
    far = {"x": torch.full((32,), 1e38)}
    compiled = m.compile(spec('patch node mlp[0] with 10 * tensor("x")', "rank(answer)"), data=IDS, tensors=far)
    with pytest.raises(patchc.PatchcError) as found:
        compiled.run(progress=False)
    assert codes(found.value) == ["non-finite"]


def test_a_python_metric_that_fails_is_named() -> None:
    def broken(logits: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("by hand")

    compiled = patchc.load(gpt2()).compile(
        spec("patch node head[0, 1] with corrupt", "mine"), data=IDS, metrics={"mine": broken}
    )
    with pytest.raises(patchc.PatchcError, match=r"mine.*ZeroDivisionError: by hand") as found:
        compiled.run(progress=False)
    assert codes(found.value) == ["metric-failed"]


@pytest.mark.parametrize("value", [[1, 2], torch.full((32,), float("nan"))], ids=["a list", "NaN"])
def test_a_tensor_that_is_none_is_refused(value: object) -> None:
    m = patchc.load(gpt2())
    with pytest.raises(patchc.PatchcError) as found:
        m.compile(spec('patch node mlp[0] with tensor("x")'), data=IDS, tensors={"x": value})  # type: ignore[dict-item]
    assert codes(found.value) == ["bad-tensor"]


def test_results_never_take_the_place_of_what_the_run_reads(induction: patchc.Model, tmp_path: Path) -> None:
    data = tmp_path / "data.json"
    line = '[{"clean": "a b c d a b c", "answer": " d"}]\n'
    data.write_text(line, encoding="utf-8")
    path = tmp_path / "s.patch"
    path.write_text(
        'data "data.json" experiment e { run clean patch node head[1, 1] with zero '
        'measure logit(answer) save "data.json" }',
        encoding="utf-8",
    )
    with pytest.raises(patchc.PatchcError) as found:
        induction.compile(path).run(progress=False)
    assert codes(found.value) == ["overwrites-input"]
    assert data.read_text(encoding="utf-8") == line


def test_data_edits_of_a_named_models_weights_are_noticed() -> None:
    m = patchc.load("induction-2l")
    next(m.loaded.eager.parameters()).data.mul_(1.1)
    with pytest.raises(patchc.PatchcError) as found:
        m.loaded.check_unchanged()
    assert codes(found.value) == ["model-changed"]


def test_the_graph_as_networkx() -> None:
    graph = residual_graph("g", n_layers=2, n_heads=2, d_model=4, d_head=2, d_vocab=5, has_pos_embed=True)
    g = graph.to_networkx()
    assert nx.is_directed_acyclic_graph(g)
    assert g.has_edge("head[0, 1]", "mlp[0]")
    assert not g.has_edge("mlp[0]", "head[0, 1]")
    assert g.edges["head[0, 1]", "head[1, 0]"]["ports"] == ["q", "k", "v"]
    assert sum(1 for _ in nx.all_simple_paths(g, "mlp[1]", "logits")) == 1
