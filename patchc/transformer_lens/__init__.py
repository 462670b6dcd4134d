"""Every function of `transformer_lens.patching` under the same name and with the same arguments, as fused sweeps.

from patchc.transformer_lens import get_act_patch_resid_pre
get_act_patch_resid_pre(bridge, corrupted_tokens, clean_cache, metric)    # [layer, pos], as TransformerLens gives it

One exception: `get_act_patch_attn_head_q_*` and `..._k_*` of an OLMo 2 bridge are refused (`other-activation`), since
its hooks stand before the norm over all heads, and the sites after it. Nothing is imported until a name is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformer_lens.patching import PatchingResult

    from patchc.transformer_lens.direct_path import (
        get_act_patch_direct_path,
        get_act_patch_direct_path_all_sources,
    )
    from patchc.transformer_lens.every import (
        get_act_patch_attn_head_all_pos_every,
        get_act_patch_attn_head_by_pos_every,
        get_act_patch_block_every,
    )
    from patchc.transformer_lens.setters import (
        layer_head_dest_src_pos_pattern_patch_setter,
        layer_head_pattern_patch_setter,
        layer_head_pos_pattern_patch_setter,
        layer_head_vector_patch_setter,
        layer_pos_head_vector_patch_setter,
        layer_pos_patch_setter,
    )
    from patchc.transformer_lens.sweeps import (
        generic_activation_patch,
        get_act_patch_attn_head_k_all_pos,
        get_act_patch_attn_head_k_by_pos,
        get_act_patch_attn_head_out_all_pos,
        get_act_patch_attn_head_out_by_pos,
        get_act_patch_attn_head_pattern_all_pos,
        get_act_patch_attn_head_pattern_by_pos,
        get_act_patch_attn_head_pattern_dest_src_pos,
        get_act_patch_attn_head_q_all_pos,
        get_act_patch_attn_head_q_by_pos,
        get_act_patch_attn_head_v_all_pos,
        get_act_patch_attn_head_v_by_pos,
        get_act_patch_attn_out,
        get_act_patch_mlp_out,
        get_act_patch_resid_mid,
        get_act_patch_resid_pre,
        make_df_from_ranges,
    )

__all__ = [
    "PatchingResult",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_home(name)), name)


def _home(name: str) -> str:
    """The module that a name stands in."""
    if name == "PatchingResult":
        return "transformer_lens.patching"
    if name.endswith("_patch_setter"):
        return f"{__name__}.setters"
    if name.endswith("_every"):
        return f"{__name__}.every"
    return f"{__name__}.direct_path" if "_direct_path" in name else f"{__name__}.sweeps"
