"""Where a given module's weights are and in what form: one device, plain numbers, nothing wrapped around them.

Everything else is refused by name before it is traced: what dispatching, wrapping, compiling or quantising does would
become part of the traced model, or could not be traced.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.model.configs import DTYPES
from patchc.model.state import tensors

PLACEMENT = RULES.add("model-placement", "a model's weights are on several devices, or have no values", exit=3)
WRAPPED = RULES.add("model-wrapped", "a module is wrapped around the model, or the model is compiled", exit=3)
QUANTISED = RULES.add("quantised-weights", "a model's weights are not plain floating-point numbers", exit=3)

WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
"""Classes that stand around a model, and where they hold it."""


def refuse_placement(model: nn.Module) -> None:
    """Refuse a model that is wrapped, compiled, quantised, dispatched to several devices or without values, naming the
    module or the weight. Errors: `model-wrapped`, `quantised-weights`, `model-placement`."""
    for name, module in model.named_modules():
        _refuse_module(name, module)
    _refuse_dispatched(model)
    _refuse_numbers(model)
    _refuse_places(model)


def _refuse_module(name: str, module: nn.Module) -> None:
    where, kind = f"module `{name}`" if name else "the model", type(module).__name__
    if kind in WRAPPERS:
        inside = f"model.{name}.{WRAPPERS[kind]}" if name else f"model.{WRAPPERS[kind]}"
        raise WRAPPED.error(f"{where} is a `{kind}`, a wrapper around another module", fix=f"load `{inside}` instead")
    if module._compiled_call_impl is not None:  # pyright: ignore[reportPrivateUsage]
        raise WRAPPED.error(f"{where} was compiled in place by `compile()`", fix="load the model before it is compiled")


def _refuse_dispatched(model: nn.Module) -> None:
    """Refuse what accelerate has taken apart: hooks that move values between devices, and weights kept elsewhere."""
    places: dict[str, Any] = getattr(model, "hf_device_map", None) or {}
    found = sorted({str(place) for place in places.values()})
    hooked = next((name for name, module in model.named_modules() if hasattr(module, "_hf_hook")), None)
    if len(found) > 1:
        message = f"the model is dispatched to {', '.join(found)} (its `hf_device_map`)"
    elif hooked is not None:
        message = f"accelerate has put a hook on {f'module `{hooked}`' if hooked else 'the model'}"
    else:
        return
    raise PLACEMENT.error(f"{message}; patchc runs a model on one device", fix="load it without `device_map`")


def _refuse_numbers(model: nn.Module) -> None:
    """Refuse parameters that are not plain tensors of known types; buffers may be of whole numbers and truth values."""
    known = DTYPES.values()
    for name, weight in model.named_parameters():
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype not in known:
            raise _quantised("weight", name, weight)
    for name, buffer in model.named_buffers():
        if (buffer.is_complex() or buffer.is_floating_point()) and buffer.dtype not in known:
            raise _quantised("buffer", name, buffer)


def _quantised(what: str, name: str, tensor: Tensor) -> PatchcError:
    kind, dtype = type(tensor).__name__, str(tensor.dtype).removeprefix("torch.")
    message = f"{what} `{name}` is a {kind} of {dtype}; patchc computes with plain tensors of {', '.join(DTYPES)}"
    return QUANTISED.error(message, fix="load the model without quantisation, with `dtype=torch.float32`")


def _refuse_places(model: nn.Module) -> None:
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors(model):
        if tensor.is_meta:
            raise PLACEMENT.error(f"`{name}` is on the device meta: it has a shape and no values", fix=_FILLED)
        first = first or (name, tensor)
        if tensor.device != first[1].device:
            message = f"`{first[0]}` is on {first[1].device}, `{name}` on {tensor.device}"
            fix = f'move all of it to one device: `model.to("{first[1].device}")`'
            raise PLACEMENT.error(f"{message}; patchc runs a model on one device", fix=fix)


_FILLED = "fill it with weights first: `from_pretrained(...)`, or `load_state_dict(..., assign=True)`"
