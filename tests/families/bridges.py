"""TransformerLens bridges around the families' models, of one layer, which is what they take least time with."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from patchc.execute.hook_taps import BODIES, LAYERS, found


def first_layer(model: nn.Module) -> nn.Module:
    """A copy with its first layer alone."""
    copied: Any = copy.deepcopy(model)
    del found(found(copied, BODIES) or copied, LAYERS)[1:]
    if hasattr(copied, "config"):
        copied.config.num_hidden_layers = 1
    else:
        copied.cfg.n_layers = 1
    return copied


def bridge(model: nn.Module, compatible: bool) -> Any:
    """A bridge around a copy of a model; `compatible`: norms folded into weights and these centred."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    copied: Any = copy.deepcopy(model)
    if hasattr(copied, "config"):
        made: Any = build_bridge_from_module(copied, type(copied).__name__, hf_config=copied.config)
    else:
        made = build_bridge_from_module(copied, "TransformerLensNative", tl_config=copy.deepcopy(copied.cfg))
    if compatible:
        made.enable_compatibility_mode()
    return made.eval()
