"""Loading: names, directories and modules; what is wrong with them; and that a user's module stays as it
was."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from patchc.diagnostics import PatchcError
from patchc.model import folders
from patchc.model.load import load
from patchc.model.probe import probes_alike
from patchc.model.state import content_fingerprint, files_fingerprint
from tests.models import D_VOCAB, gpt2, llama, logits_of, native

NATIVE_CONFIG = {
    "d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 32, "d_vocab": D_VOCAB, "d_mlp": 64,
    "act_fn": "gelu", "normalization_type": "LN", "architecture": "TransformerLensNative", "seed": 0,
}  # fmt: skip


def code_of(caught: pytest.ExceptionInfo[PatchcError]) -> str:
    (diagnostic,) = caught.value.diagnostics
    return diagnostic.code


def save_hf(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    return folder


def save_native(folder: Path, module: nn.Module, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    content = {"format": "patchc-native", "version": 1, "config": NATIVE_CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(content))
    save_file({k: v.contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors")
    return folder


# ---- modules


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a user could notice: flags, attributes, hooks, weights, gradients wanted."""
    return {
        name: (
            module.training,
            sorted(k for k in module.__dict__),
            [list(d) for d in (module._forward_hooks, module._forward_pre_hooks, module._buffers, module._modules)],
            [(n, id(p), p.requires_grad, p._version, p.grad) for n, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("build", [gpt2, llama, native])
def test_a_users_module_stays_as_it_was(build: Any) -> None:
    module = build()
    module.train()
    next(iter(module.children())).eval()  # a flag of its own
    before, config = state_of(module), copy.deepcopy(vars(getattr(module, "config", None) or module.cfg))
    weights = {k: v.clone() for k, v in module.state_dict().items()}
    loaded = load(module)
    assert loaded.eager is module
    assert state_of(module) == before
    assert vars(getattr(module, "config", None) or module.cfg) == config
    assert all(torch.equal(v, weights[k]) for k, v in module.state_dict().items())


def test_a_module_in_train_mode_is_traced_as_in_eval_mode() -> None:
    module: Any = gpt2()
    prompt = torch.tensor([[1, 2, 3]])
    want = logits_of(module, prompt)
    pieces = load(module.train()).pieces
    assert torch.allclose(pieces.modules["embed"](prompt), module.transformer.wte(prompt))
    assert torch.equal(logits_of(module.eval(), prompt), want)


def test_hooks_are_refused_by_name() -> None:
    module: Any = gpt2()
    handle = module.transformer.h[1].mlp.register_forward_hook(lambda m, a, o: o * 0)
    with pytest.raises(PatchcError, match=r"`transformer\.h\.1\.mlp`") as caught:
        load(module)
    assert code_of(caught) == "model-has-hooks"
    handle.remove()
    load(module).check_unchanged()


def test_a_replaced_forward_is_refused() -> None:
    module: Any = gpt2()
    mlp = module.transformer.h[0].mlp
    mlp.forward = lambda x: x
    with pytest.raises(PatchcError, match=r"`forward` of module `transformer\.h\.0\.mlp`"):
        load(module)


def test_hooks_that_transformers_leaves_behind_do_no_harm() -> None:
    module = gpt2("eager")
    module(torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=True)
    assert any(m._forward_hooks for m in module.modules())
    assert load(module).graph.n_layers == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(number: float) -> None:
    module: Any = gpt2()
    with torch.no_grad():
        module.transformer.h[0].mlp.c_fc.weight[3, 4] = number
    with pytest.raises(PatchcError, match=r"`transformer\.h\.0\.mlp\.c_fc\.weight`") as caught:
        load(module)
    assert code_of(caught) == "nan-in-weights"


def test_edits_after_tracing_are_noticed() -> None:
    module: Any = llama()
    loaded = load(module)
    loaded.check_unchanged()
    module.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1  # `.data`: not even torch's own counter sees it
    with pytest.raises(PatchcError) as caught:
        loaded.check_unchanged()
    assert code_of(caught) == "model-changed"


SETTINGS: dict[str, Callable[[Any], object]] = {
    "a norm's epsilon": lambda m: setattr(m.transformer.ln_f, "eps", 1e-2),
    "an activation": lambda m: setattr(m.transformer.h[0].mlp, "act", torch.nn.ReLU()),
    "a class of the user's own": lambda m: setattr(m.transformer.h[0].mlp, "act", type("Mine", (torch.nn.ReLU,), {})()),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_settings_changed_after_tracing_are_noticed(change: str) -> None:
    module: Any = gpt2()
    loaded = load(module)
    SETTINGS[change](module)
    with pytest.raises(PatchcError, match="the settings or the code of") as caught:
        loaded.check_unchanged()
    assert code_of(caught) == "model-changed"


class Scaled(torch.nn.Module):
    """A class of the user's own, with a setting that is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.by = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * self.by


def test_settings_of_code_that_cannot_be_told_are_noticed() -> None:
    module: Any = gpt2()
    module.transformer.h[0].mlp.act = scaled = Scaled()
    loaded = load(module)
    assert loaded.settings is None
    module.train()
    loaded.check_unchanged()
    assert scaled.training
    for changed in (1.01, "no number"):
        scaled.by = changed  # type: ignore[assignment]
        with pytest.raises(PatchcError, match="the settings or the code of") as caught:
            loaded.check_unchanged()
        assert code_of(caught) == "model-changed"
    scaled.by = 1.0
    loaded.check_unchanged()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_probe_allows_for_rounding_alone(dtype: torch.dtype) -> None:
    one, eps = torch.linspace(-3, 3, 60).reshape(2, 30).to(dtype), torch.finfo(dtype).eps
    assert probes_alike(one, one * (1 + 2 * eps))
    hidden = one.index_fill(1, torch.tensor([3]), -torch.inf)
    assert probes_alike(hidden, hidden * (1 + 2 * eps))
    assert not probes_alike(one, hidden)
    assert not probes_alike(one, one * 1.5)
    assert not probes_alike(one, one[:1])


@pytest.mark.parametrize("make", [gpt2, llama])
def test_using_a_model_does_not_change_it(make: Callable[..., Any]) -> None:
    module = make("eager")
    loaded, ids = load(module), torch.tensor([[1, 2, 3]])
    module(ids, output_hidden_states=True, output_attentions=True)
    module.generate(ids, max_new_tokens=2, do_sample=False)
    module.train()
    loaded.check_unchanged()


def test_hooks_after_tracing_are_noticed() -> None:
    module: Any = llama()
    loaded = load(module)
    module.model.norm.register_forward_pre_hook(lambda m, a: None)
    with pytest.raises(PatchcError) as caught:
        loaded.check_unchanged()
    assert code_of(caught) == "model-has-hooks"


def test_fingerprints_follow_content() -> None:
    first, again, other = gpt2(), gpt2(), gpt2()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-3
    assert content_fingerprint(first) == content_fingerprint(again) != content_fingerprint(other)


def test_a_directorys_fingerprint_follows_its_files(tmp_path: Path) -> None:
    folder = save_hf(gpt2(), tmp_path)
    before = files_fingerprint(folder)
    assert files_fingerprint(folder) == before
    edit_weights(folder, lambda w: w.update({"transformer.ln_f.bias": torch.ones(32)}))
    assert files_fingerprint(folder) != before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_of_numbers(dtype: torch.dtype) -> None:
    loaded = load(llama().to(dtype))
    assert loaded.pieces.dtype is dtype
    assert loaded.pieces.mlp(0, torch.zeros(2, 32, dtype=dtype)).dtype is dtype


# ---- bridges


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize(("build", "architecture"), [(gpt2, "GPT2LMHeadModel"), (llama, "LlamaForCausalLM")])
def test_a_bridge_is_traced_as_it_computes(build: Any, architecture: str, processed: bool) -> None:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    module = build("eager")
    bridge = build_bridge_from_module(module, architecture, hf_config=module.config)
    if processed:
        bridge.enable_compatibility_mode()
    loaded = load(bridge)
    assert (loaded.graph.n_layers, loaded.graph.n_heads, loaded.graph.causal) == (2, 4, True)
    ids = torch.tensor([[4, 8, 15, 16]])
    assert torch.equal(bridge(ids), logits_of(loaded.eager, ids))  # the bridge still works, and is what was proved
    with (
        bridge.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: x)]),
        pytest.raises(PatchcError) as caught,
    ):
        load(bridge)
    assert code_of(caught) == "model-has-hooks"


def test_a_native_bridge() -> None:
    import transformer_lens.model_bridge.sources.native as sources
    from transformer_lens.config import TransformerBridgeConfig

    loaded = load(sources.boot(TransformerBridgeConfig(**NATIVE_CONFIG)))
    assert type(loaded.eager) is sources.NativeModel
    assert loaded.graph.n_edges == load(native()).graph.n_edges


# ---- directories


def test_an_hf_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    module = gpt2()
    folder = save_hf(module, tmp_path / "model")
    capfd.readouterr()
    loaded = load("model", base=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (loaded.name, loaded.tokenizer, loaded.fingerprint) == ("model", None, files_fingerprint(folder))
    assert (loaded.graph.n_ctx, loaded.graph.d_mlp) == (32, 128)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(logits_of(loaded.eager, ids), logits_of(module, ids))
    loaded.check_unchanged()


def test_options_of_a_directory(tmp_path: Path) -> None:
    folder = save_hf(llama(), tmp_path)
    loaded = load(folder, dtype="float64", attention="eager", device="cpu", bos=True)
    assert loaded.pieces.dtype is torch.float64
    assert loaded.eager.config._attn_implementation == "eager"  # type: ignore[union-attr]
    assert loaded.bos is True


@pytest.mark.parametrize("options", [{"dtype": "float23"}, {"device": "abacus"}])
def test_options_that_do_not_exist(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(PatchcError) as caught:
        load(save_hf(gpt2(), tmp_path), **options)
    assert code_of(caught) == "model-option"


def test_attention_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(PatchcError, match="eagre"):
        load(save_hf(gpt2(), tmp_path), attention="eagre")


def test_a_native_directory(tmp_path: Path) -> None:
    module = native()
    loaded = load(save_native(tmp_path, module))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(logits_of(loaded.eager, ids), logits_of(module, ids))
    assert loaded.graph.n_ctx == 32


def edit_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["hf", "native"])
@pytest.mark.parametrize("fault", ["no file", "cut short", "a weight missing", "another shape"])
def test_damaged_weights(tmp_path: Path, kind: str, fault: str) -> None:
    folder = save_hf(llama(), tmp_path) if kind == "hf" else save_native(tmp_path, native())
    path, name = folder / "model.safetensors", "model.norm.weight" if kind == "hf" else "ln_out.weight"
    if fault == "no file":
        path.unlink()
    elif fault == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "a weight missing":
        edit_weights(folder, lambda w: w.pop(name))
    else:
        edit_weights(folder, lambda w: w.update({name: torch.ones(7)}))
    with pytest.raises(PatchcError) as caught:
        load(folder)
    assert code_of(caught) == "model-weights"
    assert caught.value.exit == 3


@pytest.mark.parametrize(
    "config",
    [
        "no json {",
        "[1]",
        "{}",
        '{"model_type": "no-such-family"}',
        '{"format": "patchc-native", "version": 2, "config": {}}',
        '{"format": "patchc-native", "version": 1, "config": {"d_model": 32}}',
        '{"format": "patchc-native", "version": 1}',
    ],
)
def test_configs_that_cannot_be_used(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(PatchcError) as caught:
        load(tmp_path)
    assert code_of(caught) == "model-config"
    assert caught.value.exit == 1


@pytest.mark.parametrize("kind", ["t5", "vit"])
def test_a_directory_of_no_decoder_says_so(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    with pytest.raises(PatchcError, match="a decoder of token ids") as caught:
        load(tmp_path)
    assert code_of(caught) == "model-config"


def test_a_directory_without_config(tmp_path: Path) -> None:
    with pytest.raises(PatchcError, match=r"no config\.json") as caught:
        load(tmp_path)
    assert code_of(caught) == "model-config"


# ---- names


def test_a_misspelt_built_in_is_not_looked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "builtin_models", lambda: ("ioi-tiny", "induction-2l"))
    with pytest.raises(PatchcError) as caught:
        load("ioi-tny")
    assert code_of(caught) == "model-not-found"
    assert caught.value.diagnostics[0].fix == "did you mean `ioi-tiny`?"


def test_a_hub_model_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[bool] = []

    def unreachable(name: str, *, local_files_only: bool, **_: Any) -> str:
        asked.append(local_files_only)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(PatchcError, match="cannot be fetched") as caught:
        load("somebody/some-model")
    assert code_of(caught) == "model-not-found"
    assert asked == [True, False]  # what is on disk first, the network after it


def test_a_hub_model_from_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    save_hf(gpt2(), tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert load("somebody/some-model").name == "somebody/some-model"


@pytest.mark.parametrize("name", ["../nowhere", "no such model", "", "a/b/c"])
def test_a_path_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(PatchcError) as caught:
        load(name, base=tmp_path)
    assert code_of(caught) in ("model-not-found", "model-config")
