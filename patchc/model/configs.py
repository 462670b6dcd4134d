"""What a model's config says, and the TransformerLens-native module that one describes.

`load` fills such a module with weights; `blank` leaves it without.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from patchc.diagnostics import RULES
from patchc.model.folders import BAD_CONFIG

BAD_OPTION = RULES.add("model-option", "an option of the model has a value that does not exist")

DTYPES = {
    "float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
"""The types of numbers that models compute with."""
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def config_layers(module: nn.Module) -> int | None:
    """How many layers a module's config says it has."""
    return _number(module, LAYER_COUNTS)


def config_context(module: nn.Module) -> int:
    """How many positions a module's config says it can read, 0 where it does not."""
    return _number(module, CONTEXTS) or 0


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """The first of these entries that the config has."""
    config = getattr(module, "config", None) or getattr(module, "cfg", None)
    found = (getattr(config, n, None) for n in names)
    return next((int(n) for n in found if isinstance(n, int) and n > 0), None)


def dtype_named(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of that name. Errors: `model-option`."""
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise BAD_OPTION.error(f'no dtype is called "{dtype}"; there are {", ".join(DTYPES)}')
    return DTYPES[dtype]


def native_model(folder: Path, config: dict[str, Any]) -> nn.Module:
    """The TransformerLens-native module of `folder`, as it is made: `config["config"]` are the arguments of its
    configuration. Errors: `model-config`."""
    import transformer_lens.model_bridge.sources.native as native
    from transformer_lens.config import TransformerBridgeConfig

    try:
        return native.NativeModel(TransformerBridgeConfig(**config["config"]))
    except (KeyError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        message = f"{folder / 'config.json'} describes no model: {type(error).__name__}: {error}"
        raise BAD_CONFIG.error(message) from None
