"""A device that there is not: numbers are on the CPU, and every tensor knows whether it would be.

Operations that a GPU would refuse, because some tensors are on it and others are not, are refused here; what would make
the CPU wait for the GPU is counted. So code for GPUs is tested where there is none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_flatten, tree_map

from patchc.model.load import LoadedModel
from patchc.model.pieces import TracedPieces

DEVICE = torch.device("cuda", 77)
"""No machine has as many: what is kept by device is not taken for a real GPU's."""


class Elsewhere(Tensor):
    """A tensor of that device."""


class MixedDevicesError(AssertionError):
    """An operation on tensors of both devices."""


INDEXING = {Tensor.__getitem__, Tensor.__setitem__}
WAITING = {
    Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.item, Tensor.tolist, Tensor.cpu,
    Tensor.nonzero, torch.nonzero, torch.unique, Tensor.unique, Tensor.numpy,
}  # fmt: skip


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, Elsewhere) else x


def _there(x: Any) -> Any:
    return x.as_subclass(Elsewhere) if type(x) is Tensor else x


class OnDevice(TorchFunctionMode):
    """While it is entered, tensors made on `DEVICE` are `Elsewhere`. `waits`: operations that wait for the device, by
    name; `copied`: index tensors of the CPU that an operation had to copy to it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copied: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        there = any(isinstance(x, Elsewhere) for x in tensors)
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        if getattr(func, "__self__", None) is Tensor.device and name.endswith("__get__"):
            return DEVICE if there else func(*args)
        asked = self._asked(func, args, kwargs)
        if there and asked is None:
            self._compare(func, name, tensors)
        if there and (func in WAITING or asked == torch.device("cpu")):
            self.waits[name] += 1
        args, kwargs = tree_map(_plain, (args, kwargs))
        args, kwargs = self._on_cpu((args, kwargs))
        if asked == DEVICE and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        out = func(*args, **kwargs)
        on_device = asked == DEVICE or (there and asked is None)
        return tree_map(_there, out) if on_device and func not in (Tensor.cpu, Tensor.numpy) else out

    def _asked(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> torch.device | None:
        """The device that the operation names, if it does."""
        given = kwargs.get("device")
        if given is None and func is Tensor.to:
            given = next((DEVICE for x in args[1:] if isinstance(x, Elsewhere)), None)
            given = given or next((x for x in args[1:] if isinstance(x, torch.device)), None)
            given = given or next((x for x in args[1:] if isinstance(x, str)), None)
            if given is None and len(args) > 1 and type(args[1]) is Tensor:
                given = "cpu"
        return None if given is None else torch.device(given)

    def _on_cpu(self, given: Any) -> Any:
        return tree_map(lambda x: torch.device("cpu") if x == DEVICE else x, given)

    def _compare(self, func: Callable[..., Any], name: str, tensors: list[Tensor]) -> None:
        """A tensor of the CPU may stand beside the device's where it is one number; as an index it is copied."""
        for x in tensors:
            if type(x) is Tensor and x.dim():
                if func not in INDEXING or x.is_floating_point():
                    raise MixedDevicesError(f"{name} of tensors on both devices: one of the CPU's is {list(x.shape)}")
                self.copied[name] += 1


def moved(model: LoadedModel) -> LoadedModel:
    """The same model, its pieces on `DEVICE`: to be used while `OnDevice` is entered. `model` is spoilt by it."""
    structure = model.pieces.structure
    root = structure.exported.module
    for module in root.modules():
        for name, x in module._parameters.items():
            if x is not None:
                there = x.detach().as_subclass(Elsewhere)
                module._parameters[name] = nn.Parameter(there, requires_grad=False)
        for name, x in module._buffers.items():
            module._buffers[name] = None if x is None else x.as_subclass(Elsewhere)
    for node in root.graph.nodes:
        node.kwargs = {k: DEVICE if isinstance(v, torch.device) else v for k, v in node.kwargs.items()}
        node.args = tuple(DEVICE if isinstance(a, torch.device) else a for a in node.args)
    with OnDevice():
        pieces = TracedPieces(structure, model.graph)
    assert pieces.device == DEVICE
    return replace(model, pieces=pieces)
