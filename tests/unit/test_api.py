"""patchc from Python: what can be given, what comes back, and that the user's module stays the user's."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import patchc
from patchc.api import Compiled, Model
from patchc.model import load as loading
from tests.models import gpt2, llama, logits_of

TEXTS = 'data { clean "a b c d a b c" corrupt "a b c d a e c" answer " d" wrong " e" }\n'
DIFF = "metric diff = logit(answer) - logit(wrong)\n"
HEADS = f"{DIFF}experiment heads {{ for h in head run clean patch node h with corrupt measure diff }}"
EVERYTHING = f"{DIFF}experiment whole {{ run clean patch node input with corrupt measure diff }}"
IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "corrupt": [[1, 9, 3, 4], [5, 6, 10, 8]],
    "answer": [11, 12],
    "wrong": [13, 14],
}


@cache
def small() -> Model:
    """A random GPT-2 without a tokenizer, traced once."""
    return patchc.load(gpt2())


def code_of(caught: pytest.ExceptionInfo[patchc.PatchcError]) -> str:
    (diagnostic,) = caught.value.diagnostics
    return diagnostic.code


def diffs(module: nn.Module, world: str) -> Tensor:
    """logit(answer) - logit(wrong) of each prompt of `IDS`, from the module itself."""
    last = logits_of(module, torch.tensor(IDS[world]))[:, -1]
    rows = torch.arange(len(last))
    return last[rows, IDS["answer"]] - last[rows, IDS["wrong"]]


def run(compiled: Compiled, **options: Any) -> Any:
    return compiled.run(**{"progress": False, "write": False, **options})


# ---- models


class Letters:
    """A tokenizer of one-letter tokens, `a` being 0."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - ord("a") for c in text]}

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i + ord("a")) for i in ids)


def test_a_module_and_a_tokenizer() -> None:
    module = gpt2()
    spec = 'data { clean "bcde" corrupt "bjde" answer "l" wrong "n" }\n' + EVERYTHING
    results = run(patchc.load(module, tokenizer=Letters()).compile(spec))
    last = logits_of(module, torch.tensor([[1, 9, 3, 4]]))[0, -1]
    assert results["whole"].values["diff"] == pytest.approx(float(last[11] - last[13]), abs=1e-5)


def test_a_bridge_is_what_it_computes() -> None:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    module = gpt2("eager")
    want = diffs(module, "corrupt").mean()
    bridge: Any = build_bridge_from_module(copy.deepcopy(module), "GPT2LMHeadModel", hf_config=module.config)
    results = run(patchc.load(bridge).compile(EVERYTHING, IDS), check="all")
    assert results["whole"].values["diff"] == pytest.approx(float(want), abs=1e-4)


def test_the_users_module_is_left_as_it_was() -> None:
    module = gpt2().train()
    frozen = next(module.parameters()).requires_grad_(False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    wanted = [p.requires_grad for p in module.parameters()]
    compiled = patchc.load(module).compile(HEADS, IDS)
    run(compiled, check="all")
    masks = torch.zeros(compiled.graph.mask_shape, requires_grad=True)
    (gradient,) = torch.autograd.grad(graph_diffs(compiled.graph, masks), masks)
    assert gradient.abs().max() > 0
    assert all(p.grad is None for p in module.parameters())
    assert all(m.training for m in module.modules())
    assert [p.requires_grad for p in module.parameters()] == wanted
    assert not frozen.requires_grad
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in module.modules())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_edited_weights_are_noticed_at_each_step() -> None:
    module = gpt2()
    model = patchc.load(module)
    compiled = model.compile(HEADS, IDS)
    with torch.no_grad():
        next(module.parameters()).mul_(2)
    for step in (lambda: run(compiled), lambda: model.compile(HEADS, IDS), lambda: compiled.graph):
        with pytest.raises(patchc.PatchcError) as caught:
            step()
        assert code_of(caught) == "model-changed"


def test_a_second_spec_does_not_trace_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHC_CACHE", str(tmp_path))
    traced: list[object] = []
    trace = loading.trace
    monkeypatch.setattr(loading, "trace", lambda exported: traced.append(exported) or trace(exported))
    model = patchc.load(gpt2())
    for spec in (HEADS, EVERYTHING, HEADS):
        run(model.compile(spec, IDS))
    assert len(traced) == 1


# ---- data


def tensors() -> dict[str, Any]:
    return {k: torch.tensor(v) for k, v in IDS.items()}


def records() -> list[dict[str, Any]]:
    return [{k: v[i] for k, v in IDS.items()} for i in range(2)]


@pytest.mark.parametrize("data", [IDS, tensors(), records(), pd.DataFrame(records())], ids=lambda d: type(d).__name__)
def test_data_in_any_form(data: Any) -> None:
    result = run(small().compile(EVERYTHING, data))["whole"]
    assert result.n == 2
    want = diffs(small().loaded.eager, "corrupt")
    assert result.values["diff"] == pytest.approx(float(want.mean()), abs=1e-5)
    assert result.stderr["diff"] == pytest.approx(float(want.std() / 2**0.5), abs=1e-5)
    assert result.baselines["diff"]["clean"] == pytest.approx(
        float(diffs(small().loaded.eager, "clean").mean()), abs=1e-5
    )


def test_text_records_take_the_place_of_the_specs_data(induction: Model) -> None:
    other = {"clean": "f g h f g", "corrupt": "f g h f k", "answer": " h", "wrong": " k"}
    given = run(induction.compile(TEXTS + HEADS, [other]))["heads"]
    columns = " ".join(f'{name} "{text}"' for name, text in other.items())
    own = run(induction.compile(f"data {{ {columns} }}\n{HEADS}"))["heads"]
    assert np.array_equal(given.values["diff"], own.values["diff"])


@pytest.mark.parametrize(
    ("data", "code"),
    [
        ([], "empty-data"),
        (3, "bad-data"),
        ({**IDS, "answer": [11]}, "bad-data"),
        ({**IDS, "clean": [[1, 2, 3], [5, 6, 7, 8]]}, "unequal-lengths"),
        ({**IDS, "clean": [[1, 2, 3, 400], [5, 6, 7, 8]]}, "bad-token-id"),
    ],
)
def test_data_that_cannot_be_used(data: Any, code: str) -> None:
    with pytest.raises(patchc.PatchcError) as caught:
        small().compile(HEADS, data)
    assert code_of(caught) == code
    assert caught.value.exit == 1


def test_every_error_of_a_spec_is_raised_at_once() -> None:
    spec = f"{HEADS} experiment b {{ run clear patch node head[9, 9] with corrupt measure dif }}"
    with pytest.raises(patchc.PatchcError) as caught:
        small().compile(spec, IDS)
    assert len(caught.value.diagnostics) == 3


# ---- tensors and metrics of Python


def test_a_tensor_is_added() -> None:
    vector = torch.linspace(-2, 2, 32)
    spec = f'{DIFF}experiment steer {{ run clean patch node mlp[0] with self + 3 * tensor("v") measure diff }}'
    result = run(small().compile(spec, IDS, tensors={"v": vector}), check=True)["steer"]
    module: Any = copy.deepcopy(small().loaded.eager)
    module.transformer.h[0].mlp.register_forward_hook(lambda m, a, out: out + 3 * vector)
    assert result.values["diff"] == pytest.approx(float(diffs(module, "clean").mean()), abs=1e-4)


def test_a_given_tensor_is_as_it_was_when_given() -> None:
    vector = torch.linspace(-2, 2, 32)
    spec = f'{DIFF}experiment steer {{ run clean patch node mlp[0] with self + tensor("v") measure diff }}'
    made = small().compile(spec, IDS, tensors={"v": vector})
    before = run(made)["steer"].values["diff"]
    vector.zero_()
    again = run(made, check=True)["steer"].values["diff"]
    assert again == before


def test_a_tensor_that_was_not_given() -> None:
    spec = f'{DIFF}experiment e {{ run clean patch node mlp[0] with tensor("v") measure diff }}'
    with pytest.raises(patchc.PatchcError) as caught:
        small().compile(spec, IDS, tensors={"w": torch.zeros(32)})
    assert code_of(caught) == "unknown-tensor"


def entropy(logits: Tensor) -> Tensor:
    """Of the prediction after the second token, a number a prompt."""
    return torch.distributions.Categorical(logits=logits[:, 1]).entropy()


MINE = "experiment e { run clean patch node input with corrupt measure entropy, 2 * entropy + 1 as more }"


def test_a_metric_in_python() -> None:
    result = run(small().compile(MINE, IDS, metrics={"entropy": entropy}), check="all")["e"]
    want = entropy(logits_of(small().loaded.eager, torch.tensor(IDS["corrupt"])))
    assert result.values["entropy"] == pytest.approx(float(want.mean()), abs=1e-5)
    assert result.stderr["entropy"] == pytest.approx(float(want.std() / 2**0.5), abs=1e-5)
    assert result.values["more"] == pytest.approx(2 * float(want.mean()) + 1, abs=1e-5)


def test_a_metric_in_python_of_all_prompts_together() -> None:
    result = run(small().compile(MINE, IDS, metrics={"entropy": lambda x: entropy(x).mean()}))["e"]
    want = entropy(logits_of(small().loaded.eager, torch.tensor(IDS["corrupt"]))).mean()
    assert result.values["entropy"] == pytest.approx(float(want), abs=1e-5)


def test_a_metric_in_python_that_gives_no_number_a_prompt() -> None:
    with pytest.raises(patchc.PatchcError, match=r"`entropy`.*\[2, 50\]") as caught:
        run(small().compile(MINE, IDS, metrics={"entropy": lambda logits: logits[:, -1]}))
    assert code_of(caught) == "metric-shape"


def test_a_metric_in_python_needs_prompts_of_one_length() -> None:
    uneven = {**IDS, "clean": [[1, 2, 3], [5, 6, 7, 8]], "corrupt": [[1, 9, 3], [5, 6, 10, 8]]}
    with pytest.raises(patchc.PatchcError) as caught:
        small().compile(MINE, uneven, metrics={"entropy": entropy})
    assert {d.code for d in caught.value.diagnostics} == {"metric-needs-one-length"}


# ---- plans and runs


def test_a_plan_is_the_same_each_time_and_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchc.pipeline.execute", lambda *_: pytest.fail("something ran"))
    once, again = (small().compile(HEADS, IDS).plan() for _ in range(2))
    assert once == again
    assert str(once) == str(again)
    (plan,) = once
    assert (plan.experiment, plan.n_cells, plan.n_passes) == ("heads", 8, 1)
    assert plan.worlds == ("clean", "corrupt")


def test_a_run_is_the_same_each_time() -> None:
    compiled = small().compile(HEADS, IDS)
    once, again = (run(compiled)["heads"].values["diff"] for _ in range(2))
    fresh = run(small().compile(HEADS, IDS))["heads"].values["diff"]
    assert np.array_equal(once, again)
    assert np.array_equal(once, fresh)


@pytest.mark.parametrize(("asked", "cells"), [("all", 8), (True, 8), (3, 3), (1, 1), (100, 8)])
def test_a_check_recomputes_as_many_cells_as_asked(asked: Any, cells: int) -> None:
    check = run(small().compile(HEADS, IDS), check=asked)["heads"].check
    assert check.cells == cells
    assert check.max_abs_diff < 1e-4
    assert check.largest_effect > 100 * check.max_abs_diff


@pytest.mark.parametrize("asked", ["everything", -1, 0, 2.5])
def test_a_check_of_what_is_no_number(asked: Any) -> None:
    with pytest.raises(ValueError, match="check"):
        run(small().compile(HEADS, IDS), check=asked)


def test_progress_is_told_to_a_callback() -> None:
    told: list[tuple[str, int, int]] = []
    run(small().compile(HEADS, IDS), check=2, progress=lambda *call: told.append(call))
    assert told[-1] == ("heads: check", 2, 2)
    assert ("heads", 8, 8) in told


def test_files_are_written_when_asked(tmp_path: Path) -> None:
    (tmp_path / "a.patch").write_text(HEADS.replace("measure diff", 'measure diff save "out.csv" show heatmap'))
    compiled = small().compile(tmp_path / "a.patch", IDS)
    run(compiled)
    assert [p.name for p in tmp_path.iterdir()] == ["a.patch"]
    result = run(compiled, write=True)["heads"]
    records = {"out.record.json", "a.heads.record.json"}
    assert {p.name for p in tmp_path.iterdir()} == {"a.patch", "out.csv", "a.heads.png"} | records
    assert result.files == [tmp_path / "out.csv", tmp_path / "a.heads.png"]


def test_a_lone_patch_that_changes_nothing_is_refused() -> None:
    module: Any = gpt2()
    with torch.no_grad():
        module.transformer.h[1].attn.c_proj.weight[:8] = 0  # head[1, 0] writes nothing, in any world
    spec = HEADS.replace("for h in head", "").replace("node h", "path head[1, 0] -> logits")
    with pytest.raises(patchc.PatchcError) as caught:
        run(patchc.load(module).compile(spec, IDS))
    assert code_of(caught) == "no-effect"


# ---- results


def test_results_in_other_forms() -> None:
    results = run(small().compile(HEADS, IDS))
    result = results["heads"]
    array = result["diff"]
    assert array.dims == ("layer", "head")
    assert array.coords["head"].values.tolist() == [0, 1, 2, 3]
    assert float(array.sel(layer=1, head=2)) == result.values["diff"][1, 2]
    frame = result.to_pandas()
    assert list(frame.columns) == ["layer", "head", "diff", "diff_stderr", "n"]
    assert frame["diff"].tolist() == result.values["diff"].flatten().tolist()
    assert len(result.plot().axes) == 2  # the map and its colours
    for page in (result._repr_html_(), results._repr_html_()):
        assert "heads" in page
        assert "data:image/png;base64," in page
    assert list(results) == ["heads"]
    assert set(results.record) == {
        "spec",
        "parameters",
        "data",
        "inputs",
        "model",
        "weights",
        "versions",
        "seeds",
        "settings",
        "plan",
    }


# ---- graphs


IN = [torch.tensor(IDS["clean"]), torch.tensor(IDS["corrupt"])]


def graph_diffs(graph: nn.Module, masks: Tensor) -> Tensor:
    """logit(answer) - logit(wrong), mean over prompts."""
    last = graph(*IN, masks)[0][:, -1]
    rows = torch.arange(2)
    return (last[rows, IDS["answer"]] - last[rows, IDS["wrong"]]).mean()


def test_a_mask_of_one_cell_is_that_cell() -> None:
    compiled = small().compile(HEADS, IDS)
    graph, values = compiled.graph, run(compiled)["heads"].values["diff"]
    assert (graph.mask_shape, graph.worlds) == ((2, 4), ("clean", "corrupt"))
    for index in np.ndindex(graph.mask_shape):
        masks = torch.zeros(graph.mask_shape)
        masks[index] = 1
        assert graph_diffs(graph, masks).item() == pytest.approx(values[index], abs=1e-5)
    plain = graph_diffs(graph, torch.zeros(graph.mask_shape))
    assert plain.item() == pytest.approx(float(diffs(small().loaded.eager, "clean").mean()), abs=1e-5)


def test_the_gradient_of_masks_is_the_slope() -> None:
    graph = small().compile(HEADS, IDS).graph
    masks = torch.full(graph.mask_shape, 0.3, requires_grad=True)
    (gradient,) = torch.autograd.grad(graph_diffs(graph, masks), masks)
    with torch.no_grad():
        for index in np.ndindex(graph.mask_shape):
            step = torch.zeros(graph.mask_shape)
            step[index] = 0.02
            slope = (graph_diffs(graph, masks + step) - graph_diffs(graph, masks - step)) / 0.04
            assert float(gradient[index]) == pytest.approx(float(slope), abs=2e-3)


def test_a_graph_is_a_part_of_anyones_module() -> None:
    class Learnt(nn.Module):
        def __init__(self, graph: nn.Module) -> None:
            super().__init__()
            self.graph, self.masks = graph, nn.Parameter(torch.zeros(2, 4))

        def forward(self) -> Tensor:
            return graph_diffs(self.graph, self.masks.sigmoid())

    learnt = Learnt(small().compile(HEADS, IDS).graph)
    optimiser = torch.optim.SGD([learnt.masks], lr=5.0)
    first = learnt().item()
    for _ in range(5):
        optimiser.zero_grad()
        learnt().backward()
        optimiser.step()
    assert learnt().item() < first
    small().loaded.check_unchanged()
    for p in small().loaded.eager.parameters():
        p.grad = None


def test_a_graph_reads_like_the_experiment() -> None:
    code = small().compile(HEADS, IDS).graph.code
    assert "def forward(self, clean, corrupt, masks):" in code
    for word in ("clean_stream_1", "corrupt_z_0", "self.layer1_mlp", "masks_from_0", "logits = self.unembed("):
        assert word in code


def test_captures_are_what_nodes_write() -> None:
    spec = f"{DIFF}experiment e {{ run clean patch node head[0, 1] with corrupt measure diff }}"
    graph = small().compile(spec, IDS, captures=True).graph
    assert graph.mask_shape == ()
    logits, captures = graph(*IN, torch.tensor(0.0))
    assert {"stream", "mlp[0]", "mlp[1]"} <= set(captures)
    assert set(small().compile(spec, IDS).graph(*IN, torch.tensor(0.0))[1]) == {"stream"}
    pieces = small().loaded.pieces
    assert torch.allclose(pieces.unembed(captures["stream"].flatten(0, 1)).view_as(logits), logits, atol=1e-5)


def test_several_experiments_have_graphs_by_name() -> None:
    compiled = small().compile(f"{HEADS} {EVERYTHING.removeprefix(DIFF)}", IDS)
    assert list(compiled.graphs) == ["heads", "whole"]
    assert compiled.graphs["whole"] is compiled.graphs["whole"]
    whole = graph_diffs(compiled.graphs["whole"], torch.tensor(1.0))
    assert whole.item() == pytest.approx(float(diffs(small().loaded.eager, "corrupt").mean()), abs=1e-5)
    with pytest.raises(patchc.PatchcError) as caught:
        _ = compiled.graph
    assert code_of(caught) == "several-experiments"
    with pytest.raises(KeyError, match="heads, whole"):
        compiled.graphs["none"]


@pytest.mark.parametrize("name", ["class", "masks", "torch", "lambda", "print"])
def test_a_world_may_have_any_name(name: str, tmp_path: Path) -> None:
    spec = f"{DIFF}experiment e {{ run clean patch node input with {name} measure diff }}"
    compiled = small().compile(spec, {(name if k == "corrupt" else k): v for k, v in IDS.items()})
    whole = graph_diffs(compiled.graph, torch.tensor(1.0))
    assert compiled.graph.worlds == ("clean", name)
    assert whole.item() == pytest.approx(float(diffs(small().loaded.eager, "corrupt").mean()), abs=1e-5)
    loaded = patchc.load_graph(compiled.save(tmp_path), small())
    assert torch.equal(graph_diffs(loaded, torch.tensor(1.0)), whole)


def test_grouped_keys_and_values_in_a_graph() -> None:
    model = patchc.load(llama())
    compiled = model.compile(HEADS.replace("node h", "node h.k"), IDS)
    values = run(compiled, check="all")["heads"].values["diff"]
    masks = torch.zeros(compiled.graph.mask_shape)
    masks[0, 2] = 1
    assert graph_diffs(compiled.graph, masks).item() == pytest.approx(values[0, 2], abs=1e-5)


def test_a_tensor_file_is_opened_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({"c#d": torch.ones(small().graph.d_model)}, "a#b.safetensors")
    text = 'experiment e { run clean patch node mlp[0] with tensor("a#b.safetensors", "c#d") measure diff }'
    Path("a.patch").write_text(DIFF + text)
    compiled = small().compile("a.patch", data=IDS)
    assert compiled.given.tensors["a#b.safetensors#c#d"].tolist() == [1.0] * small().graph.d_model
