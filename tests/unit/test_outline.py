"""Outlines: the graph that loading gives, from a config alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, modeling_utils

from patchc.diagnostics import PatchcError
from patchc.ir.graph import ResidualGraph
from patchc.model import blank
from patchc.model import load as loading
from patchc.model.blank import blank_facts
from patchc.model.load import load
from patchc.model.outline import outline
from tests.models import MODELS, gpt2, llama, loaded_model, native
from tests.unit.test_model_refusals import Model

NATIVE = (
    "d_model d_head n_heads n_layers n_ctx d_vocab d_mlp act_fn normalization_type architecture seed attn_only "
    "positional_embedding_type n_key_value_heads gated_mlp attention_dir"
).split()


def saved_config(module: Any, folder: Path) -> Path:
    """A directory with a model's config, a file that holds no weights, and nothing else."""
    folder.mkdir(exist_ok=True)
    if hasattr(module, "cfg"):
        config = {name: getattr(module.cfg, name) for name in NATIVE}
        content = {"format": "patchc-native", "version": 1, "config": config}
        (folder / "config.json").write_text(json.dumps(content))
    else:
        module.config.save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def unnamed(graph: ResidualGraph) -> ResidualGraph:
    return replace(graph, model="")


@pytest.fixture(autouse=True)
def _no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHC_CACHE", "off")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever reads weights fails."""

    def refuse(*_: Any, **__: Any) -> Any:
        pytest.fail("weights were read")

    for place in (safetensors, modeling_utils):
        monkeypatch.setattr(place, "safe_open", refuse)
    for place in (safetensors.torch, loading):
        monkeypatch.setattr(place, "load_file", refuse)
    monkeypatch.setattr(torch, "load", refuse)


# ---- the same graph


@pytest.mark.parametrize("kind", MODELS)
def test_an_outline_has_the_graph_that_loading_gives(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    loaded = loaded_model(kind)  # First: it is kept for other tests, and knows the libraries by their own functions.
    request.getfixturevalue("no_weights")
    folder = saved_config(loaded.eager, tmp_path / "model")
    found = outline("model", base=tmp_path, attention="eager" if kind.endswith("eager") else None)
    assert (found.name, found.graph.model, found.tokenizer, found.bos) == ("model", "model", None, None)
    assert unnamed(found.graph) == unnamed(loaded.graph)
    assert (folder / "model.safetensors").read_bytes() == b"no weights"


@pytest.mark.parametrize(
    "build",
    [
        lambda: native(attention_dir="bidirectional"),
        lambda: gpt2(n_layer=3, n_head=2, n_inner=24, tie_word_embeddings=False, n_positions=9),
        lambda: llama(num_key_value_heads=1, attention_bias=True, sliding_window=4),
    ],
    ids=["looks ahead", "other sizes", "one kv head"],
)
def test_outlines_differ_as_models_do(build: Any, tmp_path: Path) -> None:
    module = build()
    found = outline(saved_config(module, tmp_path)).graph
    assert unnamed(found) == unnamed(load(module).graph)
    assert found.causal == (getattr(getattr(module, "cfg", None), "attention_dir", "causal") == "causal")
    assert all(unnamed(found) != unnamed(loaded_model(kind).graph) for kind in ("gpt2-sdpa", "llama-sdpa", "native-ln"))


@pytest.mark.parametrize(("build", "dtype"), [(llama, "bfloat16"), (native, "float64")])
def test_a_dtype_changes_no_structure(build: Any, dtype: str, tmp_path: Path) -> None:
    module = build().to(getattr(torch, dtype))
    assert unnamed(outline(saved_config(module, tmp_path), dtype=dtype).graph) == unnamed(load(module).graph)


def test_a_built_in_model(induction: Any) -> None:
    found = outline("induction-2l", bos=False)
    assert found.graph == induction.graph
    assert (found.name, found.bos) == ("induction-2l", False)
    assert found.tokenizer("a b")["input_ids"] == induction.loaded.tokenizer("a b")["input_ids"]
    assert outline("induction-2l").tokenizer is found.tokenizer  # read once


def test_weights_take_no_memory(tmp_path: Path) -> None:
    """A model of 10^12 parameters in its two layers."""
    sizes = {"hidden_size": 2**18, "intermediate_size": 2**20, "head_dim": 2**9, "vocab_size": 2**20}
    LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes).save_pretrained(tmp_path)
    graph = outline(tmp_path).graph
    assert (graph.d_model, graph.d_mlp, graph.d_vocab, graph.d_head) == (2**18, 2**20, 2**20, 2**9)
    assert graph.causal


# ---- what cannot be told, and what is refused


class Masked(nn.Module):
    """A model whose attention is masked by a table that is learned, or by a buffer."""

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.model, table = Model("plain"), torch.full((64, 64), -1e9).triu(1)
        if learned:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        mask, plain = self.table[: ids.shape[1], : ids.shape[1]], nn.functional.scaled_dot_product_attention

        def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
            return plain(q, k, v, attn_mask=mask)

        nn.functional.scaled_dot_product_attention = attend  # type: ignore[assignment]
        try:
            return self.model(ids)
        finally:
            nn.functional.scaled_dot_product_attention = plain


@pytest.mark.parametrize("learned", [False, True])
def test_a_mask_that_is_learned_is_not_taken_to_be_causal(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blank, "native_model", lambda *_: Masked(learned))
    graph = blank_facts(Path(), {"format": "patchc-native"}, None, None).graph
    assert graph.causal is not learned
    assert load(Masked(learned)).graph.causal


def test_a_model_that_is_no_decoder_is_refused_as_by_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blank, "native_model", lambda *_: Model("post-norm stream"))
    said: list[str] = []
    for attempt in (
        lambda: blank_facts(Path(), {"format": "patchc-native"}, None, None),
        lambda: load(Model("post-norm stream")),
    ):
        with pytest.raises(PatchcError) as caught:
            attempt()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "model-not-understood" in said[0]


@pytest.mark.parametrize("config", ["{", "[]", "{}", '{"model_type": "no-such-model"}', '{"format": "patchc-native"}'])
def test_configs_that_cannot_be_used(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(PatchcError) as caught:
        outline(tmp_path)
    assert [d.code for d in caught.value.diagnostics] == ["model-config"]


def test_options_that_do_not_exist(tmp_path: Path) -> None:
    folder = saved_config(gpt2(), tmp_path)
    for options, code in (({"dtype": "float31"}, "model-option"), ({"attention": "eagre"}, "model-config")):
        with pytest.raises(PatchcError) as caught:
            outline(folder, **options)  # type: ignore[arg-type]
        assert [d.code for d in caught.value.diagnostics] == [code]


# ---- the hub


def snapshots(monkeypatch: pytest.MonkeyPatch, local: Path | None, remote: Path) -> list[tuple[bool, bool]]:
    """What is asked of the hub: whether of the local cache alone, and whether for weights."""
    asked: list[tuple[bool, bool]] = []

    def download(_: str, *, local_files_only: bool, allow_patterns: list[str], **__: Any) -> str:
        asked.append((local_files_only, "*.safetensors" in allow_patterns))
        if local_files_only and local is None:
            raise OSError("not cached")
        return str(local if local_files_only else remote)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_only_the_small_files_of_a_hub_model_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = snapshots(monkeypatch, None, saved_config(gpt2(), tmp_path))
    assert outline("somebody/some-model").graph.model == "somebody/some-model"
    assert asked == [(True, False), (False, False)]


def test_a_hub_model_of_which_only_the_config_is_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small = saved_config(gpt2(), tmp_path / "small")
    (small / "model.safetensors").unlink()
    gpt2().save_pretrained(tmp_path / "whole")  # type: ignore[operator]
    asked = snapshots(monkeypatch, small, tmp_path / "whole")
    assert outline("somebody/some-model").graph.n_layers == 2
    assert asked == [(True, False)]
    assert load("somebody/some-model").graph.n_layers == 2
    assert asked[1:] == [(True, True), (False, True)]
