"""Several activations in one tensor: TransformerLens' `*_every`, whose sweeps share the plain runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchc.transformer_lens import sweeps
from patchc.transformer_lens.errors import BAD_SWEEP, SweepError, failure
from patchc.transformer_lens.numbers import MetricFn
from patchc.transformer_lens.runs import Cache, Runs, runs
from patchc.transformer_lens.sweeps import Sweep, checked_sweep, make_df_from_ranges, values_of
from patchc.transformer_lens.traced import ANY_MODEL

if TYPE_CHECKING:
    from transformer_lens.patching import PatchingResult

AnyMetric = MetricFn | Mapping[str, MetricFn]

BLOCK = {
    "resid_pre": sweeps.get_act_patch_resid_pre,
    "attn_out": sweeps.get_act_patch_attn_out,
    "mlp_out": sweeps.get_act_patch_mlp_out,
}
HEAD_ALL_POS = {
    "out": sweeps.get_act_patch_attn_head_out_all_pos,
    "q": sweeps.get_act_patch_attn_head_q_all_pos,
    "k": sweeps.get_act_patch_attn_head_k_all_pos,
    "v": sweeps.get_act_patch_attn_head_v_all_pos,
    "pattern": sweeps.get_act_patch_attn_head_pattern_all_pos,
}
HEAD_BY_POS = {
    "out": sweeps.get_act_patch_attn_head_out_by_pos,
    "q": sweeps.get_act_patch_attn_head_q_by_pos,
    "k": sweeps.get_act_patch_attn_head_k_by_pos,
    "v": sweeps.get_act_patch_attn_head_v_by_pos,
    "pattern": sweeps.get_act_patch_attn_head_pattern_by_pos,
}
OTHER_NAMES = {"head_index": "head", "dest_pos": "pos"}
OPTIONS = ("reduce", "baseline")


def get_act_patch_block_every(
    model: ANY_MODEL, corrupted_tokens: Tensor, clean_cache: Cache | Tensor, metric: AnyMetric, **kwargs: Any
) -> Tensor | PatchingResult:
    """The residual stream before each block, each attention output and each MLP output, patched position by position.

    Arguments and `kwargs` (`reduce`, `baseline`): see `generic_activation_patch`. Returns [3, layer, pos].
    """
    return _every(BLOCK, ("layer", "pos"), runs(model, corrupted_tokens, clean_cache), metric, kwargs)


def get_act_patch_attn_head_all_pos_every(
    model: ANY_MODEL, corrupted_tokens: Tensor, clean_cache: Cache | Tensor, metric: AnyMetric, **kwargs: Any
) -> Tensor | PatchingResult:
    """Each head's output, q, k, v and pattern, patched at every position.

    Arguments and `kwargs` (`reduce`, `baseline`): see `generic_activation_patch`. Returns [5, layer, head]; k and v of
    a model with fewer KV heads are followed by zeros.
    """
    return _every(HEAD_ALL_POS, ("layer", "head"), runs(model, corrupted_tokens, clean_cache), metric, kwargs)


def get_act_patch_attn_head_by_pos_every(
    model: ANY_MODEL, corrupted_tokens: Tensor, clean_cache: Cache | Tensor, metric: AnyMetric, **kwargs: Any
) -> Tensor | PatchingResult:
    """Each head's output, q, k, v and pattern, patched position by position (of patterns the one that asks).

    Arguments and `kwargs` (`reduce`, `baseline`): see `generic_activation_patch`. Returns [5, layer, pos, head]; k and
    v of a model with fewer KV heads are followed by zeros.
    """
    return _every(HEAD_BY_POS, ("layer", "pos", "head"), runs(model, corrupted_tokens, clean_cache), metric, kwargs)


def _every(
    types: Mapping[str, partial[Any]], axes: Sequence[str], found: Runs, metric: AnyMetric, kwargs: Mapping[str, Any]
) -> Tensor | PatchingResult:
    if unknown := [name for name in kwargs if name not in OPTIONS]:
        raise failure(SweepError, BAD_SWEEP, f"no argument `{unknown[0]}`; there are {' and '.join(OPTIONS)}")
    checked = [checked_sweep(found, metric, **sweep.keywords, **kwargs) for sweep in types.values()]
    numbers = [values_of(found, sweep) for sweep in checked]
    n_heads = found.pieces.graph.n_heads
    parts = [_laid_out(n.values, sweep, axes, n_heads) for n, sweep in zip(numbers, checked, strict=True)]
    values, first = torch.stack(parts, 1), checked[0]
    if not first.wants_result:
        return values[0]
    return _result(values, numbers[0].baseline, first, axes, list(types))


def _laid_out(values: Tensor, sweep: Sweep, axes: Sequence[str], n_heads: int) -> Tensor:
    """`[metric, *axes, ...]` in the order of `axes`, with zeros after the last KV head."""
    names = [OTHER_NAMES.get(axis, axis) for axis in sweep.axes or ()]
    order = [0, *(1 + names.index(axis) for axis in axes), *range(1 + len(names), values.dim())]
    values = values.permute(order)
    if "head" not in axes:
        return values
    at = 1 + axes.index("head")
    lacking = [*values.shape]
    lacking[at] = n_heads - values.shape[at]
    return torch.cat([values, values.new_zeros(lacking)], at) if lacking[at] else values


def _result(values: Tensor, baseline: Tensor, first: Sweep, axes: Sequence[str], names: list[str]) -> PatchingResult:
    from transformer_lens.patching import PatchingResult

    whole = first.has_metric_axis
    sizes = values.shape[1 : 2 + len(axes)]
    return PatchingResult(
        values=values if whole else values[0],
        axis_names=["patch_type", *axes],
        index_df=make_df_from_ranges(sizes, ["patch_type", *axes]),
        metric_names=list(first.metrics),
        reduced=first.reduce != "none",
        baseline=(baseline if whole else baseline[0]) if first.baseline else None,
        has_metric_axis=whole,
        patch_type_names=names,
    )
