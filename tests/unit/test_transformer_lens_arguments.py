"""The functions of `patchc.transformer_lens`: their arguments and what they return, held against TransformerLens'."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import patching as theirs

import patchc
from patchc import transformer_lens as ours
from tests.transformer_lens_bridges import BATCH, POS, Setting, metric, per_prompt, setting

TOLERANCE = 1e-5
SWEEP = "get_act_patch_attn_head_out_by_pos"


@pytest.fixture
def gpt2() -> Setting:
    return setting("gpt2")


def both(name: str, s: Setting, *args: Any, **options: Any) -> tuple[Any, Any]:
    """TransformerLens' result and patchc's."""
    given = (s.bridge, s.corrupted, s.clean_cache, *args)
    return getattr(theirs, name)(*given, **options), getattr(ours, name)(*given, **options)


def assert_equal(want: Tensor, got: Tensor, effect: float = 1e-4) -> None:
    assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)
    assert float(want.max() - want.min()) > effect


def assert_same_result(want: Any, got: Any) -> None:
    """Two `PatchingResult`s, field by field."""
    assert type(got) is type(want)
    assert_equal(want.values, got.values)
    if want.baseline is None:
        assert got.baseline is None
    else:
        assert got.baseline.shape == want.baseline.shape
        torch.testing.assert_close(got.baseline, want.baseline, atol=TOLERANCE, rtol=0)
    pd.testing.assert_frame_equal(got.index_df, want.index_df)
    for name in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(got, name) == getattr(want, name), name


# ---- the names


def test_every_public_name_is_there() -> None:
    public = {
        name
        for name, value in vars(theirs).items()
        if getattr(value, "__module__", None) == theirs.__name__ or name.startswith("get_act_patch")
    }
    public = {name for name in public if not name.startswith("_")}
    assert public <= set(ours.__all__)
    assert all(hasattr(ours, name) for name in ours.__all__)
    assert ours.PatchingResult is theirs.PatchingResult
    with pytest.raises(AttributeError):
        _ = ours.get_act_patch_nothing


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, patchc.transformer_lens; print([m for m in ('torch', 'transformer_lens') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_range_for_each_column() -> None:
    want = theirs.make_df_from_ranges([2, 3, 2], ["layer", "pos", "head"])
    pd.testing.assert_frame_equal(ours.make_df_from_ranges([2, 3, 2], ["layer", "pos", "head"]), want)


# ---- indices


def test_rows_of_an_index_in_any_order(gpt2: Setting) -> None:
    rows = pd.DataFrame([[1, 4, 0], [0, 2, 3], [1, 3, 2], [0, 2, 3], [1, -1, -4]], columns=["layer", "pos", "head"])
    setters = (theirs.layer_pos_head_vector_patch_setter, ours.layer_pos_head_vector_patch_setter)
    want, got = (
        f(gpt2.bridge, gpt2.corrupted, gpt2.clean_cache, metric, s, "z", index_df=rows)
        for f, s in zip((theirs.generic_activation_patch, ours.generic_activation_patch), setters, strict=True)
    )
    assert_equal(want, got)
    assert got[1] == got[3]


def test_the_index_is_returned(gpt2: Setting) -> None:
    want, got = both("get_act_patch_resid_pre", gpt2, metric, return_index_df=True)
    assert_equal(want[0], got[0])
    pd.testing.assert_frame_equal(got[1], want[1])


def test_an_empty_index(gpt2: Setting) -> None:
    rows = pd.DataFrame([], columns=["layer", "pos"])
    given = (gpt2.bridge, gpt2.corrupted, gpt2.clean_cache, metric, ours.layer_pos_patch_setter, "resid_pre")
    assert ours.generic_activation_patch(*given, index_df=rows).shape == (0,)


# ---- results

OPTIONS: tuple[tuple[dict[str, Any], bool], ...] = (
    ({"reduce": "none"}, True),
    ({"reduce": "none", "baseline": True}, True),
    ({"reduce": "mean", "baseline": True}, True),
    ({"baseline": True}, False),
)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("options", "by_prompt"), OPTIONS)
@pytest.mark.parametrize("name", [SWEEP, "get_act_patch_block_every", "get_act_patch_attn_head_all_pos_every"])
def test_results(name: str, options: dict[str, Any], by_prompt: bool, several: bool) -> None:
    one = per_prompt if by_prompt else metric
    measured = {"a": one, "b": lambda x: 2 * one(x) + 1} if several else one
    want, got = both(name, setting("llama"), measured, **options)
    assert_same_result(want, got)
    if "baseline" in options and options.get("reduce") == "none":
        torch.testing.assert_close(got.effect(), want.effect(), atol=TOLERANCE, rtol=0)


def test_a_mean_and_a_mapping_of_one(gpt2: Setting) -> None:
    assert_equal(*both(SWEEP, gpt2, per_prompt, reduce="mean"))
    assert_same_result(*both(SWEEP, gpt2, {"only": metric}))


def test_a_result_of_an_index_is_flat(gpt2: Setting) -> None:
    rows = pd.DataFrame([[1, 4], [0, 2]], columns=["layer", "pos"])
    given = (gpt2.bridge, gpt2.corrupted, gpt2.clean_cache, per_prompt)
    want, got = (
        module.generic_activation_patch(
            *given, module.layer_pos_patch_setter, "resid_post", index_df=rows, reduce="none"
        )
        for module in (theirs, ours)
    )
    assert_same_result(want, got)


def test_a_metric_that_reads_other_logits_in_other_cells(gpt2: Setting) -> None:
    def strange(logits: Tensor) -> Tensor:
        return logits[0, int(logits[0, -1, 3] * 1000) % POS, 4]

    want, got = both("get_act_patch_attn_head_out_all_pos", gpt2, strange)
    assert_equal(want, got)


def test_a_metric_that_writes_into_its_logits(gpt2: Setting) -> None:
    def writing(logits: Tensor) -> Tensor:
        logits[:, -1] *= 2
        return per_prompt(logits).mean()

    want, got = both("get_act_patch_attn_head_out_all_pos", gpt2, writing)
    assert_equal(want, got)


# ---- misuse


def refused(s: Setting, kind: type[Exception], **changed: Any) -> Exception:
    """The error for arguments of which some are changed, of a kind that TransformerLens raises too."""
    given: dict[str, Any] = {
        "model": s.bridge,
        "corrupted_tokens": s.corrupted,
        "clean_cache": s.clean_cache,
        "patching_metric": metric,
        "patch_setter": ours.layer_pos_patch_setter,
        "activation_name": "resid_pre",
        "index_axis_names": ("layer", "pos"),
    }
    with pytest.raises(kind) as caught:
        ours.generic_activation_patch(**{**given, **changed})
    return caught.value


def test_misuse_is_said(gpt2: Setting) -> None:
    rows = ours.make_df_from_ranges([2, 2], ["layer", "pos"])
    assert "reduce must be one of" in str(refused(gpt2, ValueError, reduce="sum"))
    assert "at least one" in str(refused(gpt2, ValueError, patching_metric={}))
    assert "either index_axis_names or an index_df" in str(refused(gpt2, ValueError, index_df=rows))
    assert "either index_axis_names or an index_df" in str(refused(gpt2, ValueError, index_axis_names=None))
    assert "return_index_df" in str(refused(gpt2, ValueError, return_index_df=True, baseline=True))
    assert "no axis 'heads'" in str(refused(gpt2, KeyError, index_axis_names=("layer", "heads")))
    assert "a tensor of token ids" in str(refused(gpt2, ValueError, corrupted_tokens=gpt2.corrupted[0]))
    assert "of equal shape" in str(refused(gpt2, ValueError, clean_cache=gpt2.clean[:, :3]))


@pytest.mark.parametrize("name", ["pre", "scale", "nonsense", "rot_q"])
def test_an_activation_without_a_site(gpt2: Setting, name: str) -> None:
    assert "activations that can be set are resid_pre" in str(refused(gpt2, KeyError, activation_name=name))


def test_in_inference_mode(gpt2: Setting) -> None:
    with torch.inference_mode():
        want, got = both(SWEEP, gpt2, metric)
    assert_equal(want, got)


def test_autocast_is_refused(gpt2: Setting) -> None:
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="autocast"):
        ours.get_act_patch_resid_pre(gpt2.bridge, gpt2.corrupted, gpt2.clean_cache, metric)


def test_what_is_no_cache_and_no_token(gpt2: Setting) -> None:
    with pytest.raises(ValueError, match="not a str"):
        ours.get_act_patch_resid_pre(gpt2.bridge, gpt2.corrupted, "cache", metric)
    with pytest.raises(IndexError, match="id 9999"):
        ours.get_act_patch_resid_pre(gpt2.bridge, gpt2.corrupted.clone().fill_(9999), gpt2.clean_cache, metric)


def test_an_index_outside(gpt2: Setting) -> None:
    late = pd.DataFrame([[0, POS]], columns=["layer", "pos"])
    refused(gpt2, IndexError, index_axis_names=None, index_df=late)
    high = pd.DataFrame([[2, 0]], columns=["layer", "pos"])
    assert "layers 0..1" in str(refused(gpt2, KeyError, index_axis_names=None, index_df=high))
    long = pd.DataFrame([[0, 0, 0]], columns=["layer", "pos", "head"])
    refused(gpt2, AssertionError, index_axis_names=None, index_df=long)


@pytest.mark.parametrize(("reduce", "function"), [("scalar", per_prompt), ("mean", metric), ("none", metric)])
def test_a_metric_of_another_shape(gpt2: Setting, reduce: str, function: Any) -> None:
    error = refused(gpt2, ValueError, patching_metric=function, reduce=reduce)
    assert isinstance(error, patchc.PatchcError)
    assert [d.code for d in error.diagnostics] == ["metric-shape"]


def test_what_a_metric_raises_is_raised_and_leaves_the_model_alone(gpt2: Setting) -> None:
    class OwnError(Exception):
        pass

    def failing(_: Tensor) -> Tensor:
        raise OwnError

    before = gpt2.bridge(gpt2.corrupted)
    with pytest.raises(OwnError):
        ours.get_act_patch_resid_pre(gpt2.bridge, gpt2.corrupted, gpt2.clean_cache, failing)
    assert torch.equal(gpt2.bridge(gpt2.corrupted), before)
    assert_equal(*both("get_act_patch_resid_pre", gpt2, metric))


def test_every_takes_its_options_alone(gpt2: Setting) -> None:
    with pytest.raises(ValueError, match="no argument `verbose`"):
        ours.get_act_patch_block_every(gpt2.bridge, gpt2.corrupted, gpt2.clean_cache, metric, verbose=True)


def test_one_prompt() -> None:
    s = setting("gpt2")
    cache = {name: x[:1] for name, x in s.clean_cache.items()}
    want = theirs.get_act_patch_resid_pre(s.bridge, s.corrupted[:1], cache, per_prompt, reduce="none")
    got = ours.get_act_patch_resid_pre(s.bridge, s.corrupted[:1], cache, per_prompt, reduce="none")
    assert_same_result(want, got)
    assert got.values.shape[-1] == 1 < BATCH
