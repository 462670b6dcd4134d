"""Activation patching with TransformerLens' arguments: `generic_activation_patch`, and a function for each activation.

The direct path is `direct_path`'s matter, several activations in one tensor `every`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, cast

import pandas as pd
from torch import Tensor

from patchc.progress import bars
from patchc.transformer_lens.cells import Cells, Rows
from patchc.transformer_lens.errors import BAD_SWEEP, SweepError, SweepNameError, failure
from patchc.transformer_lens.numbers import Found, MetricFn, Metrics, joined, measured
from patchc.transformer_lens.runs import Cache, Runs, runs
from patchc.transformer_lens.setters import (
    Setter,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from patchc.transformer_lens.traced import ANY_MODEL

if TYPE_CHECKING:
    from transformer_lens.patching import PatchingResult

REDUCE = ("scalar", "mean", "none")
GROUP_BYTES = 256 << 20
"""Tensors that the cells of one program may name together."""


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pd.DataFrame:
    """A row for each choice of a number below each range, the last column running fastest."""
    rows = list(itertools.product(*map(range, column_max_ranges)))
    return pd.DataFrame(rows, columns=list(column_names))


@dataclass(frozen=True)
class Sweep:
    """What is swept and how it is reported, checked."""

    setter: Setter
    activation: str
    axes: tuple[str, ...] | None
    index_df: pd.DataFrame
    metrics: dict[str, MetricFn]
    has_metric_axis: bool
    reduce: str
    baseline: bool
    return_index_df: bool

    @property
    def wants_result(self) -> bool:
        """Whether a `PatchingResult` is returned, rather than a tensor."""
        return self.has_metric_axis or self.reduce == "none" or self.baseline


def generic_activation_patch(
    model: ANY_MODEL,
    corrupted_tokens: Tensor,
    clean_cache: Cache | Tensor,
    patching_metric: MetricFn | Mapping[str, MetricFn],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
) -> Tensor | tuple[Tensor, pd.DataFrame] | PatchingResult:
    """The metric of the corrupted run with an activation patched, for each row of an index.

    Takes what `transformer_lens.patching.generic_activation_patch` takes and returns the same, from one fused sweep.

    `model`: a `TransformerBridge`, a module, a name, or a `patchc.Model`; traced once, and again when it has changed.
    `corrupted_tokens` `[batch, pos]`. `clean_cache`: activations by hook name (an `ActivationCache`, edited and partial
    ones too), or clean token ids `[batch, pos]`. `patching_metric`: a function of the logits `[batch, pos, d_vocab]`
    that gives a scalar, with `reduce` "mean" or "none" `[batch]`; or a mapping of such functions. It may be called in
    any order, for the unpatched runs too, and first with logits that are all zero, to see which of them it reads; only
    those are computed. `patch_setter(corrupted_activation, index, clean_activation)` gives the
    patched activation. `activation_name`: `resid_pre`, `z`, `pattern`, ...; its layer is the index's first number.
    `resid_mid` of a bridge is what its hook sets, which stands on what the MLP reads: with gradients on, that alone,
    and the stream beside the MLP stays as it is. Under `torch.no_grad()` both are one tensor, so that a setter that
    writes in place (each of TransformerLens' own) sets the stream too, and one that gives a new tensor does not. Of
    anything but a bridge `resid_mid` is the stream itself.
    `index_axis_names`: the axes to go over in full (`layer`, `pos`, `head`, `head_index`, `src_pos`, `dest_pos`);
    or `index_df`: a row for each cell.

    Returns one number a cell, in the axes' shape, of an `index_df` flat; with `return_index_df` the index too; a
    `PatchingResult` where `reduce` is "none", with `baseline`, or of a mapping.
    Errors: `sweep-arguments` and `metric-shape` (each a `ValueError`), `unknown-activation` (a `KeyError`),
    `other-activation`, those of `patchc.load`, and whatever a metric or a setter raises.
    """
    found = runs(model, corrupted_tokens, clean_cache)
    sweep = checked_sweep(
        found,
        patching_metric,
        patch_setter,
        activation_name,
        index_axis_names,
        index_df,
        return_index_df,
        reduce,
        baseline,
    )
    return swept(found, sweep)


def checked_sweep(
    found: Runs,
    patching_metric: MetricFn | Mapping[str, MetricFn],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    reduce: str = "scalar",
    baseline: bool = False,
) -> Sweep:
    """The arguments of a sweep, checked."""
    if reduce not in REDUCE:
        raise failure(SweepError, BAD_SWEEP, f"reduce must be one of {REDUCE}, not {reduce!r}")
    has_metric_axis = isinstance(patching_metric, Mapping)
    metrics = dict(cast("Mapping[str, MetricFn]", patching_metric)) if has_metric_axis else {"metric": patching_metric}
    if not metrics:
        raise failure(SweepError, BAD_SWEEP, "the mapping of metrics must hold at least one")
    axes = None if index_axis_names is None else tuple(index_axis_names)
    if (axes is None) == (index_df is None):
        raise failure(SweepError, BAD_SWEEP, "a sweep takes either index_axis_names or an index_df")
    rows = _grid(found, activation_name, axes or ()) if index_df is None else index_df
    out = Sweep(patch_setter, activation_name, axes, rows, metrics, has_metric_axis, reduce, baseline, return_index_df)
    if out.wants_result and return_index_df:
        message = "return_index_df goes with the tensor return; a PatchingResult has its index_df"
        raise failure(SweepError, BAD_SWEEP, message, "leave `return_index_df` out")
    return out


def _grid(found: Runs, activation_name: str, axes: Sequence[str]) -> pd.DataFrame:
    """The index of axes gone over in full."""
    graph, pos = found.pieces.graph, found.layout.lengths[0]
    heads = graph.n_kv_heads if activation_name in ("k", "v") else graph.n_heads
    sizes = {"layer": graph.n_layers, "head": heads, "head_index": heads, "pos": pos, "src_pos": pos, "dest_pos": pos}
    unknown = [axis for axis in axes if axis not in sizes]
    if unknown:
        raise failure(SweepNameError, BAD_SWEEP, f"no axis {unknown[0]!r}; there are {', '.join(sizes)}")
    return make_df_from_ranges([sizes[axis] for axis in axes], axes)


@lru_cache
def _hook_name(activation_name: str, layer: Any) -> str:
    """TransformerLens' full name of an activation. It takes seconds to import where nothing else has."""
    from transformer_lens.utilities.components_utils import get_act_name

    return get_act_name(activation_name, layer=layer)


# ---- running


def swept(found: Runs, sweep: Sweep) -> Tensor | tuple[Tensor, pd.DataFrame] | PatchingResult:
    """A sweep's numbers in the form that is asked for."""
    numbers = values_of(found, sweep)
    if sweep.wants_result:
        return _result(sweep, numbers)
    return (numbers.values[0], sweep.index_df) if sweep.return_index_df else numbers.values[0]


def values_of(found: Runs, sweep: Sweep) -> Found:
    """A sweep's numbers, `[metric, *axes]` or of an `index_df` `[metric, row]`, with a batch axis more where it is
    kept; `baseline` without the axes."""
    numbers = _measured(found, sweep)
    axes = [len(sweep.index_df)] if sweep.axes is None else [int(sweep.index_df[a].iloc[-1]) + 1 for a in sweep.axes]
    values = numbers.values.unflatten(1, axes)
    return (
        Found(values.mean(-1), numbers.baseline.mean(-1)) if sweep.reduce == "mean" else Found(values, numbers.baseline)
    )


def _result(sweep: Sweep, numbers: Found) -> PatchingResult:
    from transformer_lens.patching import PatchingResult

    whole, baseline = sweep.has_metric_axis, numbers.baseline if sweep.baseline else None
    return PatchingResult(
        values=numbers.values if whole else numbers.values[0],
        axis_names=list(sweep.axes or ()),
        index_df=sweep.index_df,
        metric_names=list(sweep.metrics),
        reduced=sweep.reduce != "none",
        baseline=None if baseline is None else baseline if whole else baseline[0],
        has_metric_axis=whole,
    )


def _measured(found: Runs, sweep: Sweep) -> Found:
    """Every row's numbers, some rows together as long as their tensors fit."""
    cells = Cells(found, sweep.setter, partial(_hook_name, sweep.activation))
    metrics = Metrics(sweep.metrics, found.layout.n_prompts, sweep.reduce != "scalar")
    shown = _Shown(sweep.activation, len(sweep.index_df))
    parts: list[Found] = []
    rows = Rows()
    for _, row in sweep.index_df.iterrows():
        cells.add(row.to_list(), rows)
        if rows.bytes > GROUP_BYTES:
            parts.append(shown.measured(found, rows, metrics))
            rows = Rows()
    if rows.patches or not parts:
        parts.append(shown.measured(found, rows, metrics))
    return joined(parts)


@dataclass
class _Shown:
    """The sweep's progress bar."""

    name: str
    total: int
    done: int = 0
    tell: Callable[[str, int, int], None] = field(default_factory=bars)

    def measured(self, found: Runs, rows: Rows, metrics: Metrics) -> Found:
        before = self.done
        self.done += len(rows.patches)
        return measured(
            found, rows.patches, rows.tensors, metrics, lambda n: self.tell(self.name, before + n, self.total)
        )


# ---- an activation each


def _of(activation: str, setter: Setter, *axes: str) -> partial[Any]:
    """A sweep of one activation; called as TransformerLens' function of the same name."""
    out = partial(
        generic_activation_patch, patch_setter=setter, activation_name=activation, index_axis_names=tuple(axes)
    )
    out.__doc__ = f"""`generic_activation_patch` of `{activation}`, by {" and ".join(axes)}.

    Arguments: `model`, `corrupted_tokens` [batch, pos], `clean_cache`, `patching_metric`; `return_index_df`, `reduce`
    and `baseline` as keywords. Returns [{", ".join(axes)}]{_KV if activation in "kv" else ""}.
    """
    return out


_KV = ", over KV heads"

get_act_patch_resid_pre = _of("resid_pre", layer_pos_patch_setter, "layer", "pos")
get_act_patch_resid_mid = _of("resid_mid", layer_pos_patch_setter, "layer", "pos")
get_act_patch_attn_out = _of("attn_out", layer_pos_patch_setter, "layer", "pos")
get_act_patch_mlp_out = _of("mlp_out", layer_pos_patch_setter, "layer", "pos")

_BY_POS = (layer_pos_head_vector_patch_setter, "layer", "pos", "head")
get_act_patch_attn_head_out_by_pos = _of("z", *_BY_POS)
get_act_patch_attn_head_q_by_pos = _of("q", *_BY_POS)
get_act_patch_attn_head_k_by_pos = _of("k", *_BY_POS)
get_act_patch_attn_head_v_by_pos = _of("v", *_BY_POS)

_ALL_POS = (layer_head_vector_patch_setter, "layer", "head")
get_act_patch_attn_head_out_all_pos = _of("z", *_ALL_POS)
get_act_patch_attn_head_q_all_pos = _of("q", *_ALL_POS)
get_act_patch_attn_head_k_all_pos = _of("k", *_ALL_POS)
get_act_patch_attn_head_v_all_pos = _of("v", *_ALL_POS)

get_act_patch_attn_head_pattern_all_pos = _of("pattern", layer_head_pattern_patch_setter, "layer", "head_index")
get_act_patch_attn_head_pattern_by_pos = _of(
    "pattern", layer_head_pos_pattern_patch_setter, "layer", "head_index", "dest_pos"
)
get_act_patch_attn_head_pattern_dest_src_pos = _of(
    "pattern", layer_head_dest_src_pos_pattern_patch_setter, "layer", "head_index", "dest_pos", "src_pos"
)
