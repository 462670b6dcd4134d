"""What is compared: calls of each public function of `transformer_lens.patching`, and the spec that does the same.

A call is given the module that has the function, TransformerLens' or patchc's, so that both get the same arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import transformer_lens.patching
from torch import Tensor

from patchc.report.results import Results
from tests.parity.subjects import SUBJECTS, Subject

Call = Callable[[Any, Subject], Any]
"""Of a patching module and a model: what its function gives."""
Arrange = Callable[[Results, Subject], Tensor]
"""What a spec's run found, as the tensor that TransformerLens gives."""

BRIDGES = SUBJECTS[:-1]
FEW = ("GPT-2, compatibility mode", "Llama GQA")
"""Models enough for what is about the form of the result; one has fewer key-value heads than heads."""


@dataclass(frozen=True)
class Work:
    """`variant`: what is given beyond the usual arguments. `spec`: the example that does the same; None where only the
    function can be compared, because it is about the form of what comes back."""

    function: str
    call: Call
    variant: str = ""
    spec: str | None = None
    arrange: Arrange | None = None
    subjects: tuple[str, ...] = BRIDGES

    @property
    def name(self) -> str:
        return f"{self.function} ({self.variant})" if self.variant else self.function


def public_names() -> set[str]:
    """Every function and class that `transformer_lens.patching` defines and does not call private."""
    patching = transformer_lens.patching

    def is_its_own(found: object) -> bool:
        return isinstance(found, functools.partial) or getattr(found, "__module__", None) == patching.__name__

    kinds = (functools.partial, type(lambda: None), type)
    found = {name: x for name, x in vars(patching).items() if isinstance(x, kinds) and is_its_own(x)}
    return {name for name in found if not name.startswith("_")}


# ---- from a spec's results to TransformerLens' axes


def grid(experiment: str, *dims: str, metric: str = "diff", **chosen: str) -> Arrange:
    """One experiment's numbers along these dims, where the others have the value that is `chosen`; 0 where there is no
    cell."""

    def arrange(results: Results, _: Subject) -> Tensor:
        found = results[experiment][metric].sel(**chosen).transpose(*dims)
        return torch.from_numpy(found.fillna(0.0).values)

    return arrange


def stacked(*parts: Arrange) -> Arrange:
    """Several along a new first axis; where there are fewer key-value heads than heads, 0 stands for the rest."""

    def arrange(results: Results, subject: Subject) -> Tensor:
        tensors = [part(results, subject) for part in parts]
        width = max(t.shape[-1] for t in tensors)
        return torch.stack([torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors])

    return arrange


# ---- calls


def sweep(name: str, **more: Any) -> Call:
    """A function that takes a model, tokens, a cache and a metric."""
    return lambda m, s: getattr(m, name)(s.bridge, s.corrupt, s.clean_cache, s.diff, **more)


def typed(name: str, metrics: Sequence[str] = (), **more: Any) -> Call:
    """The same with a metric a prompt, or several by name."""

    def call(m: Any, s: Subject) -> Any:
        known = {"diff": s.each_diff, "nats": s.each_nats}
        metric = {k: known[k] for k in metrics} if metrics else s.each_diff
        return getattr(m, name)(s.bridge, s.corrupt, s.clean_cache, metric, **more)

    return call


def direct(name: str, component: str, **source: int) -> Call:
    def call(m: Any, s: Subject) -> Any:
        given = (s.bridge, s.corrupt, s.clean_cache, s.corrupt_cache, s.diff)
        return getattr(m, name)(*given, **source, component=component, verbose=False)

    return call


def generic(activation: str, setter: str | Callable[..., Tensor], axes: Sequence[str] | None, **more: Any) -> Call:
    def call(m: Any, s: Subject) -> Any:
        put = getattr(m, setter) if isinstance(setter, str) else setter
        given = {"metric": s.diff, **more}
        metric = given.pop("metric") if callable(given["metric"]) else getattr(s, given.pop("metric"))
        return m.generic_activation_patch(
            s.bridge, s.corrupt, s.clean_cache, metric, put, activation, index_axis_names=axes, **given
        )

    return call


def of_results(m: Any, s: Subject) -> Any:
    """What each head writes, `result` there: a bridge has to be told to keep it, where it can; patchc is given the
    clean tokens in place of a cache."""

    def call(cache: Any) -> Any:
        setter = m.layer_head_vector_patch_setter
        return m.generic_activation_patch(s.bridge, s.corrupt, cache, s.diff, setter, "result", ("layer", "head"))

    if m is not transformer_lens.patching:
        return call(s.clean)
    s.bridge.set_use_attn_result(True)
    try:
        return call(s.bridge.run_with_cache(s.clean)[1])
    finally:
        s.bridge.set_use_attn_result(False)


def with_gradients(call: Call) -> Call:
    """Other calls are made under `torch.no_grad()`."""

    def graded(m: Any, s: Subject) -> Any:
        with torch.enable_grad():
            return call(m, s)

    return graded


def half(corrupted: Tensor, index: Sequence[int], clean: Tensor) -> Tensor:
    """A setter of one's own, of `[layer, head]`."""
    _, head = index
    corrupted[:, head] = 0.5 * clean[:, head] + 0.5 * corrupted[:, head]
    return corrupted


def set_by(name: str, shape: Sequence[int], index: Sequence[int]) -> Call:
    """A setter on random tensors."""

    def call(m: Any, _: Subject) -> Any:
        corrupted, clean = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
        return getattr(m, name)(corrupted, index, clean)

    return call


def statistics(m: Any, s: Subject) -> Any:
    """What the methods of a `PatchingResult` give."""
    given = {"reduce": "none", "baseline": True}
    metrics = {"diff": s.each_diff, "nats": s.each_nats}
    found = m.get_act_patch_resid_pre(s.bridge, s.corrupt, s.clean_cache, metrics, **given)
    clean = found.baseline + 1
    low, high = found.bootstrap_ci(n_resamples=20)
    one = found["diff"]
    return (
        found.mean(), found.stderr(), found.effect(), found.normalized(clean), low, high,
        found.permutation_pvalue(n_permutations=20), found.to_dataframe(), one.values, one.baseline, one.mean(),
    )  # fmt: skip


# ---- all of them

LAYER_POS, BY_POS, ALL_POS = ("layer", "position"), ("layer", "position", "head"), ("layer", "head")
BY_POS_THERE = ("layer", "pos", "head")
KV_BY_POS, KV_ALL_POS = ("layer", "position", "kv"), ("layer", "kv")
ROWS = pd.DataFrame([[0, 1], [0, 5], [1, 1], [1, 5]], columns=["layer", "pos"])
"""The cells of the example of `generic_activation_patch`: its `s2` is position 1 of these prompts, `end` 5."""
SPARSE = pd.DataFrame([[1, 5], [0, 3], [1, 1]], columns=["layer", "pos"])


def _simple(stem: str, experiment: str, *dims: str) -> Work:
    name = f"get_act_patch_{stem}"
    return Work(name, sweep(name), spec=stem, arrange=grid(experiment, *dims))


SWEEPS = (
    *(_simple(stem, stem, *LAYER_POS) for stem in ("resid_pre", "resid_mid", "attn_out", "mlp_out")),
    *(_simple(f"attn_head_{s}_by_pos", f"head_{s}", *BY_POS) for s in ("out", "q")),
    *(_simple(f"attn_head_{s}_by_pos", f"head_{s}", *KV_BY_POS) for s in ("k", "v")),
    _simple("attn_head_pattern_by_pos", "head_pattern", "layer", "head", "position"),
    _simple("attn_head_pattern_dest_src_pos", "head_pattern", "layer", "head", "dest", "src"),
    *(_simple(f"attn_head_{s}_all_pos", f"head_{s}", *ALL_POS) for s in ("out", "q", "pattern")),
    *(_simple(f"attn_head_{s}_all_pos", f"head_{s}", *KV_ALL_POS) for s in ("k", "v")),
)
MID = "get_act_patch_resid_mid"
GRADED = Work(MID, with_gradients(sweep(MID)), "gradients on", "resid_mid", grid("mlp_in", *LAYER_POS))


def _typed_sites(own: Sequence[str], shared: Sequence[str]) -> Arrange:
    """Output, query, key, value and pattern, one after the other."""
    kinds = {"z": own, "q": own, "k": shared, "v": shared, "pattern": own}
    parts = [grid("shared" if kind in "kv" else "own", *dims, site=kind) for kind, dims in kinds.items()]
    return stacked(*parts)


def _every(stem: str, arrange: Arrange) -> Work:
    name = f"get_act_patch_{stem}"
    return Work(name, sweep(name), spec=stem, arrange=arrange)


EVERY = (
    _every("attn_head_all_pos_every", _typed_sites(ALL_POS, KV_ALL_POS)),
    _every("attn_head_by_pos_every", _typed_sites(BY_POS, KV_BY_POS)),
    _every("block_every", stacked(*(grid(e, *LAYER_POS) for e in ("resid_pre", "attn_out", "mlp_out")))),
)

_COMPONENTS = {"q": "to_queries", "k": "to_keys", "v": "to_values"}


def _direct(component: str) -> tuple[Work, Work]:
    one, every = "get_act_patch_direct_path", "get_act_patch_direct_path_all_sources"
    experiment, variant = _COMPONENTS[component], f"component={component!r}"
    pairs = grid(experiment, "s.layer", "s.head", "r.layer", "r.head")
    return (
        Work(one, direct(one, component, src_layer=0, src_head=1), variant, "direct_path", grid(experiment, *ALL_POS)),
        Work(every, direct(every, component), variant, "direct_path_all_sources", pairs),
    )


DIRECT = tuple(work for component in _COMPONENTS for work in _direct(component))


def _generic(variant: str, call: Call, arrange: Arrange) -> Work:
    return Work("generic_activation_patch", call, variant, "generic_activation_patch", arrange)


def _flat(arrange: Arrange) -> Arrange:
    return lambda results, subject: arrange(results, subject).flatten()


GENERIC = (
    _generic(
        "index_df",
        generic("resid_post", "layer_pos_patch_setter", None, index_df=ROWS),
        _flat(grid("chosen", "l", "position")),
    ),
    _generic("a setter of one's own", generic("attn_scores", half, ("layer", "head")), grid("halfway", *ALL_POS)),
    _generic(
        "'post'", generic("post", "layer_pos_patch_setter", ("layer", "pos")), grid("neurons", *LAYER_POS)
    ),
    _generic(
        "reduce='mean'",
        generic("post", "layer_pos_patch_setter", ("layer", "pos"), metric="each_nats", reduce="mean"),
        grid("neurons", *LAYER_POS, metric="nats"),
    ),
    Work(
        "generic_activation_patch", of_results, "'result'", "attn_head_out_all_pos", grid("head_out", *ALL_POS),
        subjects=SUBJECTS,
    ),
)  # fmt: skip

_RESID, _BLOCKS, _HEADS = "get_act_patch_resid_pre", "get_act_patch_block_every", "get_act_patch_attn_head_by_pos_every"
_BOTH = ("diff", "nats")
_PER_PROMPT = {"reduce": "none", "baseline": True}


def _form(function: str, variant: str, call: Call) -> Work:
    return Work(function, call, variant, subjects=FEW)


_SPARSE = {"index_axis_names": None, "index_df": SPARSE}
FORMS = (
    _form(_RESID, "return_index_df", sweep(_RESID, return_index_df=True)),
    _form(_RESID, "index_df", sweep(_RESID, **_SPARSE)),
    _form(_RESID, "index_df, return_index_df", sweep(_RESID, **_SPARSE, return_index_df=True)),
    _form(_RESID, "reduce='mean'", typed(_RESID, reduce="mean")),
    _form(_RESID, "reduce='none'", typed(_RESID, reduce="none")),
    _form(_RESID, "reduce='none', baseline", typed(_RESID, reduce="none", baseline=True)),
    _form(_RESID, "baseline", sweep(_RESID, baseline=True)),
    _form(_RESID, "two metrics, reduce='mean'", typed(_RESID, _BOTH, reduce="mean")),
    _form(_RESID, "two metrics, reduce='none', baseline", typed(_RESID, _BOTH, reduce="none", baseline=True)),
    _form(
        "generic_activation_patch",
        "reduce='none', baseline",
        generic("q", "layer_pos_head_vector_patch_setter", BY_POS_THERE, metric="each_diff", **_PER_PROMPT),
    ),
    _form(
        "generic_activation_patch",
        "index_df, reduce='none'",
        generic("resid_mid", "layer_pos_patch_setter", None, index_df=SPARSE, metric="each_diff", reduce="none"),
    ),
    _form(_BLOCKS, "baseline", sweep(_BLOCKS, baseline=True)),
    _form(_BLOCKS, "reduce='none', baseline", typed(_BLOCKS, **_PER_PROMPT)),
    _form(_HEADS, "two metrics, reduce='none', baseline", typed(_HEADS, _BOTH, **_PER_PROMPT)),
    _form("PatchingResult", "its methods", statistics),
)

_ONE = ("GPT-2",)
SETTERS = (
    *(
        Work(name, set_by(name, shape, index), subjects=_ONE)
        for name, shape, index in (
            ("layer_pos_patch_setter", (2, 7, 8), (0, 3)),
            ("layer_pos_head_vector_patch_setter", (2, 7, 4, 8), (0, 3, 1)),
            ("layer_head_vector_patch_setter", (2, 7, 4, 8), (0, 1)),
            ("layer_head_pattern_patch_setter", (2, 4, 7, 7), (0, 1)),
            ("layer_head_pos_pattern_patch_setter", (2, 4, 7, 7), (0, 1, 5)),
            ("layer_head_dest_src_pos_pattern_patch_setter", (2, 4, 7, 7), (0, 1, 5, 2)),
        )
    ),
    Work("make_df_from_ranges", lambda m, _: m.make_df_from_ranges((2, 3), ("layer", "pos")), subjects=_ONE),
)

WORKS = (*SWEEPS, GRADED, *EVERY, *DIRECT, *GENERIC, *FORMS, *SETTERS)


def pairs() -> list[tuple[Work, str]]:
    """Every row of the table: work and model."""
    return [(work, name) for work in WORKS for name in work.subjects]
