"""The device that is asked for by name, and whether there is one.

Where a module that is given stands is for `placed`.
"""

from __future__ import annotations

import torch

from patchc.diagnostics import PatchcError
from patchc.model.configs import BAD_OPTION


def device_named(device: str | torch.device | None) -> torch.device:
    """The device of that name, the CPU without one. Errors: `model-option`."""
    try:
        found = torch.device(device or "cpu")
    except RuntimeError:
        raise _unusable(device, f"there {'is' if len(_here()) == 1 else 'are'} {', '.join(_here())}") from None
    if found.type not in ("cpu", "cuda"):
        raise _unusable(device, "patchc runs on cpu and cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise _unusable(device, "torch finds no CUDA device on this machine")
    if f"{found.type}:{found.index or 0}" not in (*_here(), "cpu:0"):
        raise _unusable(device, f"this machine has {', '.join(_here())}")
    return found


def _unusable(device: str | torch.device | None, why: str) -> PatchcError:
    return BAD_OPTION.error(f'device "{device}" cannot be used: {why}', fix="leave `device` out: the model runs on cpu")


def _here() -> list[str]:
    return ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
