"""Clean activations from anywhere: whole, edited, filtered and broadcast caches, tokens; and setters of any kind."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformer_lens import patching as theirs
from transformer_lens.model_bridge.sources import build_bridge_from_module

import patchc
from patchc import transformer_lens as ours
from patchc.api import Model
from patchc.ir.experiment import ModelChoice
from patchc.transformer_lens import runs as running
from patchc.transformer_lens import traced as tracing
from patchc.transformer_lens.traced import Traced, traced
from tests.models import gpt2, olmo2
from tests.transformer_lens_bridges import Setting, bridge, metric, setting
from tests.unit.test_transformer_lens_arguments import TOLERANCE, assert_equal

KINDS = ("gpt2", "llama")
NAMES = {
    "resid_pre": ("hook_resid_pre", "get_act_patch_resid_pre"),
    "resid_mid": ("hook_resid_mid", "get_act_patch_resid_mid"),
    "attn_out": ("hook_attn_out", "get_act_patch_attn_out"),
    "mlp_out": ("hook_mlp_out", "get_act_patch_mlp_out"),
    "z": ("attn.hook_z", "get_act_patch_attn_head_out_by_pos"),
    "q": ("attn.hook_q", "get_act_patch_attn_head_q_all_pos"),
    "k": ("attn.hook_k", "get_act_patch_attn_head_k_by_pos"),
    "v": ("attn.hook_v", "get_act_patch_attn_head_v_all_pos"),
    "pattern": ("attn.hook_pattern", "get_act_patch_attn_head_pattern_by_pos"),
}


def filtered(s: Setting, name: str) -> dict[str, Tensor]:
    """The cache with one activation alone: nothing says what the clean tokens were."""
    return {k: v.clone() for k, v in s.clean_cache.items() if k.endswith(NAMES[name][0])}


def compared(s: Setting, name: str, cache: Any) -> None:
    given = (s.bridge, s.corrupted, cache, metric)
    assert_equal(getattr(theirs, NAMES[name][1])(*given), getattr(ours, NAMES[name][1])(*given))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_filtered_cache(kind: str, name: str) -> None:
    compared(setting(kind), name, filtered(setting(kind), name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_an_edited_cache(kind: str, name: str) -> None:
    """The tokens are in the cache still, and what it has is no longer what they give."""
    s = setting(kind)
    cache = {k: v.clone() for k, v in s.clean_cache.items()}
    for hook, x in cache.items():
        if hook.endswith(NAMES[name][0]):
            x *= 1.5
            if name != "pattern":
                x += 0.1 * x.mean(0, keepdim=True)
    compared(s, name, cache)
    assert not torch.equal(cache["blocks.1." + NAMES[name][0]], s.clean_cache["blocks.1." + NAMES[name][0]])


def test_one_edited_number_is_noticed() -> None:
    s = setting("gpt2")
    cache = {k: v.clone() for k, v in s.clean_cache.items()}
    cache["blocks.1.attn.hook_z"][1, 4, 2, 3] += 1.0
    whole = ours.get_act_patch_attn_head_out_by_pos(s.bridge, s.corrupted, s.clean_cache, metric)
    edited = ours.get_act_patch_attn_head_out_by_pos(s.bridge, s.corrupted, cache, metric)
    assert (whole != edited).nonzero().tolist().count([1, 4, 2]) == 1
    assert float((whole - edited).abs()[1, 4, 2]) > 1e-4
    compared(s, "z", cache)


@pytest.mark.parametrize("name", ["resid_pre", "z"])
def test_a_cache_of_one_prompt_is_broadcast(name: str) -> None:
    s = setting("gpt2")
    compared(s, name, {k: v[:1] for k, v in s.clean_cache.items()})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_clean_tokens_in_place_of_a_cache(kind: str, name: str) -> None:
    s = setting(kind)
    sweep = getattr(ours, NAMES[name][1])
    want = getattr(theirs, NAMES[name][1])(s.bridge, s.corrupted, s.clean_cache, metric)
    assert_equal(want, sweep(s.bridge, s.corrupted, s.clean, metric))


def test_a_cache_is_the_clean_runs_own_where_its_tokens_say_so() -> None:
    """Then positions before the first difference need not be computed."""
    s = setting("gpt2")
    with_tokens = running.runs(s.bridge, s.corrupted, s.clean_cache)
    x = with_tokens.activation("blocks.1.hook_resid_pre")
    assert with_tokens.is_own(x)
    without = running.runs(s.bridge, s.corrupted, filtered(s, "resid_pre"))
    assert not without.is_own(x)


def test_equal_runs_change_nothing() -> None:
    s = setting("gpt2")
    got = ours.get_act_patch_resid_pre(s.bridge, s.corrupted, s.corrupted_cache, metric)
    assert torch.equal(got, torch.full_like(got, float(got[0, 0])))
    with torch.no_grad():
        want = metric(s.bridge(s.corrupted))
    assert float(got[0, 0]) == pytest.approx(float(want), abs=1e-5)


def test_a_missing_entry() -> None:
    s = setting("gpt2")
    with pytest.raises(KeyError, match=r"no 'blocks\.0\.hook_resid_pre'"):
        ours.get_act_patch_resid_pre(s.bridge, s.corrupted, {}, metric)


# ---- setters


def mean_over_heads(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    corrupted[:, index[1]] = (corrupted + clean)[:, index[1]].mean(1, keepdim=True)
    return corrupted


def halves(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    return torch.cat([corrupted[..., : corrupted.shape[-1] // 2], clean[..., clean.shape[-1] // 2 :]], -1)


def swapped_rows(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    corrupted[:, index[1], 3, :3] = clean[:, index[1], 4, :3].flip(-1)
    return corrupted


def knocked_out(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    corrupted[:, index[1], 4, 2] = float("-inf")
    return corrupted


SETTERS = (
    ("z", ("layer", "pos"), mean_over_heads),
    ("k", ("layer", "pos"), mean_over_heads),
    ("v", ("layer",), halves),
    ("resid_pre", ("layer",), halves),
    ("mlp_out", ("layer",), halves),
    ("post", ("layer",), halves),
    ("pattern", ("layer", "head"), swapped_rows),
    ("attn_scores", ("layer", "head"), knocked_out),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "axes", "setter"), SETTERS)
def test_any_function_is_a_setter(kind: str, name: str, axes: tuple[str, ...], setter: Any) -> None:
    s = setting(kind)
    given = (s.bridge, s.corrupted, s.clean_cache, metric, setter, name, axes)
    assert_equal(theirs.generic_activation_patch(*given), ours.generic_activation_patch(*given))


def in_place(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    corrupted[:, index[1]] = 2 * clean[:, index[1]]
    return corrupted


def in_place_and_copied(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    return in_place(corrupted, index, clean).clone()


def anew(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    return in_place(corrupted.clone(), index, clean)


def both_ways(corrupted: Tensor, index: Any, clean: Tensor) -> Tensor:
    return in_place(corrupted, index, clean) + 1


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_resid_mid_of_a_bridge_is_set_as_its_hook_sets_it(kind: str, gradients: bool) -> None:
    """Without gradients the tensor that the setter is given is the stream's own."""
    s = setting(kind)
    given: tuple[Any, ...] = (s.bridge, s.corrupted, s.clean_cache, metric)
    there: Any = ("resid_mid", ("layer", "pos"))
    found = list[Tensor]()
    with torch.set_grad_enabled(gradients):
        for setter in (in_place, in_place_and_copied, anew):
            found.append(ours.generic_activation_patch(*given, setter, *there))
            assert_equal(theirs.generic_activation_patch(*given, setter, *there).detach(), found[-1])
        if gradients:
            want = theirs.generic_activation_patch(*given, both_ways, *there).detach()
            assert_equal(want, ours.generic_activation_patch(*given, both_ways, *there))
        else:
            with pytest.raises(ValueError, match="the first is the stream, the second what the MLP reads"):
                ours.generic_activation_patch(*given, both_ways, *there)
    stream, _, mlp = found
    assert (float((stream - mlp).abs().max()) > 1e-3) != gradients


@pytest.mark.parametrize(
    ("name", "axes", "setter"),
    [
        ("z", ("layer", "pos"), "layer_pos_patch_setter"),
        ("post", ("layer", "pos"), "layer_pos_patch_setter"),
        ("attn_scores", ("layer", "head_index"), "layer_head_pattern_patch_setter"),
        ("attn_scores", ("layer", "head_index", "dest_pos"), "layer_head_pos_pattern_patch_setter"),
        ("resid_pre", ("layer", "pos", "head"), "layer_pos_head_vector_patch_setter"),
        ("pattern", ("layer", "pos"), "layer_head_vector_patch_setter"),
    ],
)
def test_known_setters_on_other_activations(name: str, axes: tuple[str, ...], setter: str) -> None:
    """Where the index means something else than usual too: a neuron of the stream, a row of all heads' patterns."""
    s = setting("gpt2")
    given = (s.bridge, s.corrupted, s.clean_cache, metric)
    want = theirs.generic_activation_patch(*given, getattr(theirs, setter), name, axes)
    for known in (getattr(theirs, setter), getattr(ours, setter)):
        assert_equal(want, ours.generic_activation_patch(*given, known, name, axes), effect=1e-5)


def test_our_setters_are_theirs() -> None:
    x, y = torch.randn(2, 3, 3, 3), torch.randn(2, 3, 3, 3)
    for name, index in {
        "layer_pos_patch_setter": [0, 1],
        "layer_pos_head_vector_patch_setter": [0, 1, 2],
        "layer_head_vector_patch_setter": [0, 1],
        "layer_head_pattern_patch_setter": [0, 1],
        "layer_head_pos_pattern_patch_setter": [0, 1, 2],
        "layer_head_dest_src_pos_pattern_patch_setter": [0, 1, 2, 0],
    }.items():
        want, got = (getattr(m, name)(x.clone(), index, y) for m in (theirs, ours))
        assert torch.equal(want, got)
        assert not torch.equal(got, x)


def refused_setter(setter: Any, name: str = "resid_pre") -> str:
    s = setting("gpt2")
    with pytest.raises(ValueError, match=r"sweep-arguments") as caught:
        ours.generic_activation_patch(s.bridge, s.corrupted, s.clean_cache, metric, setter, name, ("layer",))
    return str(caught.value)


def test_what_a_setter_gives_is_checked() -> None:
    assert "gave shape [3, 5]" in refused_setter(lambda x, i, c: x[:, :, 0])
    assert "gave NoneType" in refused_setter(lambda x, i, c: None)
    assert "where the model's mask lets nothing look" in refused_setter(lambda x, i, c: x + 0.1, "pattern")


def test_many_rows_of_a_setter_are_cut_into_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    s = setting("gpt2")
    given = (s.bridge, s.corrupted, s.clean_cache, metric, mean_over_heads, "z", ("layer", "pos"))
    whole = ours.generic_activation_patch(*given)
    monkeypatch.setattr("patchc.transformer_lens.sweeps.GROUP_BYTES", 5000)
    assert_equal(whole, ours.generic_activation_patch(*given))


# ---- models


def test_modules_and_traced_models_are_swept_as_bridges_are() -> None:
    s = setting("llama")
    want = theirs.get_act_patch_attn_head_v_by_pos(s.bridge, s.corrupted, s.clean_cache, metric)
    model = Model(traced(s.bridge).loaded, ModelChoice("traced"))
    for given in (model, s.bridge.original_model):
        for clean in (s.clean_cache, s.clean):
            assert_equal(want, ours.get_act_patch_attn_head_v_by_pos(given, s.corrupted, clean, metric))


def test_a_name_is_a_model_too() -> None:
    clean, corrupted = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 9, 3, 4]])
    got = ours.get_act_patch_resid_pre("induction-2l", corrupted, clean, lambda x: x[0, -1, 2])
    assert got.shape[1] == 4
    assert torch.equal(got[:, 0], got[:1, 0].expand(len(got)))


def test_a_model_is_traced_once_and_again_when_it_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made, s, traces = bridge("gpt2"), setting("gpt2"), list[Any]()
    load = tracing.load

    def counted(model: Any) -> Any:
        traces.append(model)
        return load(model)

    monkeypatch.setattr(tracing, "load", counted)
    sweep = ours.get_act_patch_resid_pre
    first = sweep(made, s.corrupted, s.clean, metric)
    sweep(made, s.corrupted, s.clean, metric)
    assert len(traces) == 1
    with torch.no_grad():
        made.original_model.lm_head.weight.mul_(2)
    _, cache = made.run_with_cache(s.clean)
    second = sweep(made, s.corrupted, cache, metric)
    assert len(traces) == 2
    assert not torch.allclose(first, second)
    assert_equal(theirs.get_act_patch_resid_pre(made, s.corrupted, cache, metric), second)
    alive = weakref.ref(made)  # and what is known of it does not keep it alive
    del made, cache, traces[:]
    gc.collect()
    assert alive() is None


def test_a_setting_of_a_bridge_that_is_edited_is_followed() -> None:
    made, s = bridge("llama"), setting("llama")
    sweep = ours.get_act_patch_mlp_out
    before, loaded = sweep(made, s.corrupted, s.clean, metric), traced(made).loaded
    for module in made.original_model.modules():
        if isinstance(getattr(module, "variance_epsilon", None), float):
            module.variance_epsilon = 0.5
    with torch.no_grad():
        _, cache = made.run_with_cache(s.clean)
    want = theirs.get_act_patch_mlp_out(made, s.corrupted, cache, metric)
    assert float((want - before).abs().max()) > 0.01
    assert_equal(want, sweep(made, s.corrupted, s.clean, metric))
    assert_equal(want, sweep(made, s.corrupted, cache, metric))
    with pytest.raises(patchc.PatchcError, match="model-changed"):
        loaded.check_unchanged()


def test_using_a_bridge_does_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, s = bridge("gpt2"), setting("gpt2")
    loaded = traced(made).loaded
    monkeypatch.setattr(tracing, "load", lambda _: pytest.fail("it was traced again"))
    made.run_with_cache(s.clean)
    made.run_with_hooks(s.clean, fwd_hooks=[("blocks.0.attn.hook_z", lambda x, hook: x * 0)])
    for flag in ("use_attn_result", "use_split_qkv_input"):
        getattr(made, f"set_{flag}")(True)
        made.run_with_cache(s.clean)
        loaded.check_unchanged()
        getattr(made, f"set_{flag}")(False)
        loaded.check_unchanged()
    assert traced(made).loaded.pieces is loaded.pieces


def test_files_that_were_written_anew_are_read_anew(tmp_path: Path) -> None:
    module, s = cast(Any, gpt2()), setting("gpt2")
    sweep = ours.get_act_patch_attn_out
    got = list[Tensor]()
    for by in (1.0, 1.3):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(by)
        module.save_pretrained(tmp_path)
        got.append(sweep(tmp_path, s.corrupted, s.clean, metric))
        assert_equal(sweep(module, s.corrupted, s.clean, metric), got[-1])
        assert traced(tmp_path).loaded is traced(str(tmp_path)).loaded
    assert float((got[0] - got[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_edited_cache_in_half_precision(dtype: torch.dtype) -> None:
    """Rounding is as large as the edit there: what the cache has is patched in, whatever the clean run has."""
    module: Any = gpt2("eager").to(dtype)
    made: Any = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config)
    made.eval()
    s = setting("gpt2")
    with torch.no_grad():
        _, whole = made.run_with_cache(s.clean)
    cache = {k: v * 1.05 if k.endswith("hook_z") else v for k, v in whole.items()}

    def per_token(logits: Tensor) -> Tensor:
        return logits[:, -1].float().square().mean()

    sweep = "get_act_patch_attn_head_out_all_pos"
    want, got = (getattr(m, sweep)(made, s.corrupted, cache, per_token) for m in (theirs, ours))
    torch.testing.assert_close(got.float(), want.float(), rtol=2 * torch.finfo(dtype).eps, atol=0)
    unedited = getattr(ours, sweep)(made, s.corrupted, whole, per_token)
    assert not torch.equal(got, unedited)
    found = running.runs(made, s.corrupted, whole)
    assert not found.is_own(found.activation("blocks.0.attn.hook_z"))


@pytest.mark.parametrize("name", ["q", "k"])
def test_a_hook_before_a_norm_over_all_heads_is_refused(name: str) -> None:
    module: Any = olmo2("eager")
    made: Any = build_bridge_from_module(module, "Olmo2ForCausalLM", hf_config=module.config)
    made.eval()
    s = setting("gpt2")
    sweep = getattr(ours, f"get_act_patch_attn_head_{name}_all_pos")
    with pytest.raises(ValueError, match="other-activation") as caught:
        sweep(made, s.corrupted, s.clean, metric)
    assert f"attn.hook_{name} of this bridge stands before the norm of {name}" in str(caught.value)
    assert f"the site {name} after it, which a spec sets by `head[l, h].{name}`" in str(caught.value)


def test_hooks_and_training_are_refused() -> None:
    made, s = bridge("gpt2"), setting("gpt2")
    made.add_hook("blocks.0.attn.hook_z", lambda x, hook: x * 0)
    with pytest.raises(patchc.PatchcError, match="model-has-hooks"):
        ours.get_act_patch_resid_pre(made, s.corrupted, s.clean, metric)
    made.reset_hooks()
    made.train()
    with pytest.raises(ValueError, match="in training mode"):
        ours.get_act_patch_resid_pre(made, s.corrupted, s.clean, metric)


def test_a_bridges_flags_change_no_number() -> None:
    made, s = bridge("gpt2"), setting("gpt2")
    for flag in ("use_attn_result", "use_split_qkv_input"):
        getattr(made, f"set_{flag}")(True)
        for name in ("get_act_patch_attn_head_out_all_pos", "get_act_patch_attn_head_q_all_pos"):
            want = getattr(ours, name)(s.bridge, s.corrupted, s.clean_cache, metric)
            assert_equal(want, getattr(ours, name)(made, s.corrupted, s.clean_cache, metric))
            assert_equal(want, getattr(ours, name)(made, s.corrupted, s.clean, metric))
        assert getattr(made.cfg, flag)


def test_a_hook_that_stands_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    s = setting("gpt2")
    found = running.runs(s.bridge, s.corrupted, s.clean)
    found.model = Traced(found.model.loaded, s.bridge)
    monkeypatch.setattr(running, "alike", lambda *_: False)
    with pytest.raises(ValueError, match="other-activation"):
        found.check_place(found.activation("blocks.1.attn.hook_q"))


# ---- direct paths


@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_direct_paths(component: str) -> None:
    s = setting("gpt2")
    given = (s.bridge, s.corrupted, s.clean_cache, s.corrupted_cache, metric)
    want = theirs.get_act_patch_direct_path_all_sources(*given, component, verbose=False)
    got = ours.get_act_patch_direct_path_all_sources(*given, component, verbose=False)
    assert_equal(want, got)
    one = ours.get_act_patch_direct_path(*given, 0, 2, component, verbose=False)
    assert_equal(got[0, 2], one)
    assert torch.equal(one[0], torch.zeros_like(one[0]))
    tokens = (s.bridge, s.corrupted, s.clean, None, metric)
    assert_equal(want, ours.get_act_patch_direct_path_all_sources(*tokens, component, verbose=False))


@pytest.mark.parametrize("edited", ["clean", "corrupted", "neither"])
def test_direct_paths_of_any_caches(edited: str) -> None:
    s = setting("llama")
    caches = [{k: v.clone() for k, v in c.items() if k.endswith("hook_z")} for c in (s.clean_cache, s.corrupted_cache)]
    for name, cache in zip(("clean", "corrupted"), caches, strict=True):
        for x in cache.values() if name == edited else ():
            x *= 3
    given = (s.bridge, s.corrupted, *caches, metric, 0, 1)
    want, got = (m.get_act_patch_direct_path(*given, verbose=False) for m in (theirs, ours))
    assert_equal(want, got)


def test_direct_paths_are_checked() -> None:
    s = setting("gpt2")
    given: tuple[Any, ...] = (s.bridge, s.corrupted, s.clean_cache, s.corrupted_cache, metric)
    with pytest.raises(ValueError, match="component must be one of"):
        ours.get_act_patch_direct_path(*given, 0, 1, "z")
    with pytest.raises(IndexError, match=r"no head \(2, 0\)"):
        ours.get_act_patch_direct_path(*given, 2, 0)
    short = {k: v[:, :3] for k, v in s.clean_cache.items()}
    with pytest.raises(ValueError, match="the tokens are"):
        ours.get_act_patch_direct_path(s.bridge, s.corrupted, short, s.corrupted_cache, metric, 0, 1)


def test_heads_that_are_normalised_together_take_no_numbers_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    s = setting("gpt2")
    found = running.runs(s.bridge, s.corrupted, s.clean_cache)
    blocks = tuple(replace(b, post_norm=b.layer == 0) for b in found.pieces.graph.blocks)
    monkeypatch.setattr(found.pieces, "graph", replace(found.pieces.graph, blocks=blocks))
    with pytest.raises(ValueError, match="normalised together"):
        ours.get_act_patch_direct_path(
            s.bridge, s.corrupted, filtered(s, "z"), s.corrupted_cache, metric, 0, 1, verbose=False
        )


def test_a_traced_models_stream_is_patched_itself() -> None:
    """A bridge's `hook_resid_mid` is what the MLP reads; a model's `resid_mid` is what a spec means by it."""
    s = setting("gpt2")
    model = Model(traced(s.bridge).loaded, ModelChoice("traced"))
    spec = "experiment e { for l in layers, p in positions run corrupted "
    spec += "patch node resid_mid[l] @ p with clean measure f }"
    data = {"clean": s.clean.tolist(), "corrupted": s.corrupted.tolist()}
    want = model.compile(spec, data, metrics={"f": metric}).run(progress=False, write=False)["e"].values["f"]
    got = ours.get_act_patch_resid_mid(model, s.corrupted, s.clean, metric)
    torch.testing.assert_close(got.double(), torch.as_tensor(want), atol=TOLERANCE, rtol=0)
    of_bridge = ours.get_act_patch_resid_mid(s.bridge, s.corrupted, s.clean_cache, metric)
    assert float((got - of_bridge).abs().max()) > 1e-3
