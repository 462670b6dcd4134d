"""How the machine computes: what decides the last bits of a number beside the spec, the data and the weights."""

from __future__ import annotations

from typing import Any

import torch

from patchc.model.load import LoadedModel


def settings(model: LoadedModel) -> dict[str, Any]:
    """The model's dtype, its device and what that is, its kind of attention (None: it has one only), torch's threads
    and its precision of float32 products."""
    device = model.pieces.device
    cuda = device.type == "cuda"
    return {
        "dtype": str(model.pieces.dtype).removeprefix("torch."),
        "device": str(device),
        "processor": torch.cuda.get_device_name(device) if cuda else torch.backends.cpu.get_cpu_capability(),
        "attention": getattr(getattr(model.eager, "config", None), "_attn_implementation", None),
        "threads": torch.get_num_threads(),
        "float32_products": torch.get_float32_matmul_precision(),
    }
