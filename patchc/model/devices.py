"""Which devices and types of numbers a model may be on and of; what is refused is named.

Options are read here; a module is left where it is.
"""

from __future__ import annotations

import torch
from torch import nn

from patchc.diagnostics import RULES, PatchcError
from patchc.model.configs import BAD_OPTION
from patchc.model.state import tensors

BAD_NUMBERS = RULES.add(
    "model-numbers", "a module's weights are of a type or on devices that patchc does not work with"
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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


def refuse_numbers(model: nn.Module) -> None:
    """Raise `model-numbers` for weights on several devices or on none, and for types of numbers that are not computed
    with."""
    placed = dict[str, str]()
    for name, tensor in tensors(model):
        placed.setdefault(str(tensor.device), name)
        if tensor.device.type == "meta":
            raise BAD_NUMBERS.error(f"`{name}` is on the device `meta`: it has a shape and no numbers")
        if tensor.is_complex() or (tensor.is_floating_point() and tensor.dtype not in DTYPES):
            known = ", ".join(_name(d) for d in DTYPES)
            raise BAD_NUMBERS.error(f"`{name}` is of type {_name(tensor.dtype)}; patchc computes with {known}")
    if len(placed) > 1:
        where = " and ".join(f"`{name}` on {device}" for device, name in list(placed.items())[:2])
        raise BAD_NUMBERS.error(f"the model is spread over devices: {where}", fix="move it to one: `model.to(device)`")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
