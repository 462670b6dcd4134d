"""A model built from its config alone: its modules and tables, and weights that have shapes but no values.

What it is like is found as `load` finds it, by tracing; what only values can show (that the traced parts compute what
the model computes) is not tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from patchc.model.configs import config_context, config_layers, dtype_named, native_model
from patchc.model.export import export
from patchc.model.folders import is_native, silent_transformers, unbuildable
from patchc.model.gguf_files import is_gguf
from patchc.model.outline_cache import Facts
from patchc.model.pieces import TracedPieces
from patchc.model.prove import count_layers, is_causal
from patchc.model.rates import rates
from patchc.model.trace import trace

UNFILLED = {torch.empty, torch.empty_like, torch.rand, torch.rand_like, torch.randn, torch.randn_like}
"""What weights are made with before they are read from a file; tables of positions and masks are made otherwise."""


def blank_facts(folder: Path, config: dict[str, Any], dtype: str | None, attention: str | None) -> Facts:
    """The residual graph of the model in `folder`, which `load` would give, without a name and without its weights, and
    what its parts cost.

    `causal` is False where it could only be told from weights (a mask that is learned). Without a dtype in the options
    or the config it is float32. Errors: `model-config`, `model-option`, `model-not-understood`.
    """
    with silent_transformers():
        module = blank_model(folder, config, dtype_named(dtype), attention)
    with torch.inference_mode(False):
        structure = trace(export(module, blank=True))
        pieces = TracedPieces(structure, structure.graph("", config_context(module), causal=False))
        count_layers(pieces, config_layers(module))
        graph = replace(pieces.graph, causal=_is_surely_causal(pieces))
        return Facts(graph, rates(pieces), pieces.dtype.itemsize)


def _is_surely_causal(pieces: TracedPieces) -> bool:
    try:
        return is_causal(pieces)
    except DataDependentOutputException:  # a mask that is made of weights
        return False


def blank_model(folder: Path, config: dict[str, Any], dtype: torch.dtype | None, attention: str | None) -> nn.Module:
    """The module in eval mode. Its weights are fake tensors; buffers that no file holds are as the model makes them."""
    with _Unfilled():
        if is_native(config):
            module = native_model(folder, config)
            module = module if dtype is None else module.to(dtype)
        else:
            module = _hf(folder, config, dtype, attention)
    _forget_values(module)
    return module.eval()


def _hf(folder: Path, given: dict[str, Any], dtype: torch.dtype | None, attention: str | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": False}
    if dtype is not None:
        options["dtype"] = dtype
    try:
        if is_gguf(folder):
            config = AutoConfig.for_model(**given)
        else:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention, **options)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError) as error:
        raise unbuildable(folder, error) from None


class _Unfilled(TorchFunctionMode):
    """Gives no memory to tensors that are made without values or with random ones: weights, before they are read."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in UNFILLED:
            given["device"] = "meta"
        return func(*args, **given)


def _forget_values(module: nn.Module) -> None:
    """Put fake tensors in the place of every weight, and of every buffer that a file of weights holds.

    Fake and not `meta`: they say that they are on the CPU, so they mix with the tables, and the model takes the path
    that it takes there.
    """
    fake, made = FakeTensorMode(allow_non_fake_inputs=True), dict[Tensor, Any]()

    def of(tensor: Tensor) -> Any:
        if tensor not in made:  # tied weights stay one tensor
            with fake:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            made[tensor] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[tensor]

    for part in module.modules():
        buffers = set(part._buffers) - part._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        for held, names in ((part._parameters, set(part._parameters)), (part._buffers, buffers)):  # pyright: ignore[reportPrivateUsage]
            held.update({name: of(t) for name in names if (t := held[name]) is not None})
