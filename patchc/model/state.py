"""A model that belongs to somebody else: looked at in eval mode, left as it was, and watched for edits.

Hooks and edited weights are refused here, by name; nothing here knows what the model computes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from patchc.diagnostics import RULES

HOOKED = RULES.add("model-has-hooks", "forward hooks on a model would be baked into the trace", exit=3)
NOT_FINITE = RULES.add("nan-in-weights", "a model's weights hold NaN or infinity", exit=3)
CHANGED = RULES.add("model-changed", "a model was edited after it was traced", exit=3)

HARMLESS = ("transformers.utils.output_capturing", "transformer_lens.model_bridge.generalized_components")
"""Libraries' own hooks: transformers leaves some behind that record hidden states when they are asked for, a
bridge has some that hand values on to its hook points. They change nothing unless a hook of the user's
does."""


@contextlib.contextmanager
def untouched(model: nn.Module) -> Generator[None]:
    """The model in eval mode; afterwards every module has the flags, attributes and hooks it had before."""
    before = [(m.__dict__, dict(m.__dict__), _contents(m)) for m in model.modules()]
    try:
        for m in model.modules():
            m.training = False
        yield
    finally:
        for attributes, kept, contents in before:
            attributes.clear()
            attributes.update(kept)
            for container, content in contents:
                _refill(container, content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """The containers among a module's attributes (its hooks, buffers and submodules too), with copies."""
    return [(v, v.copy()) for v in module.__dict__.values() if type(v) in (dict, OrderedDict, list, set)]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    if isinstance(container, list):
        container.extend(content)
    else:
        container.update(content)


def refuse_hooks(model: nn.Module) -> None:
    """Refuse a model with forward hooks, naming the module that has one."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:  # pyright: ignore[reportPrivateUsage]
        raise HOOKED.error("a global forward hook is registered with torch", fix="remove it before tracing")
    for name, module in model.named_modules():
        where = f"module `{name}`" if name else "the model itself"
        if "forward" in vars(module):
            raise HOOKED.error(f"`forward` of {where} was replaced on the object itself; such a model is not traced")
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]  # pyright: ignore[reportPrivateUsage]
        if not all(str(getattr(h, "__module__", "")).startswith(HARMLESS) for h in hooks):
            raise HOOKED.error(
                f"a forward hook is registered on {where}; what it does would become part of the traced model",
                fix="remove the handle that `register_forward_hook` (or `add_hook`) gave",
            )


def tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, each once, by its first name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def refuse_non_finite(model: nn.Module) -> None:
    """Refuse weights with NaN or infinity. Buffers may hold infinity: masks do."""
    for name, parameter in model.named_parameters():
        if not all(math.isfinite(x) for x in _extremes(parameter)):
            raise NOT_FINITE.error(f"weight `{name}` holds NaN or infinity")
    for name, buffer in model.named_buffers():
        if any(math.isnan(x) for x in _extremes(buffer)):
            raise NOT_FINITE.error(f"buffer `{name}` holds NaN")


def _extremes(tensor: Tensor) -> tuple[float, ...]:
    """The least and the greatest entry, both NaN where one is; of floating-point tensors alone."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ()
    return tuple(float(x) for x in tensor.detach().aminmax())


# ---- fingerprints


def content_fingerprint(model: nn.Module) -> str:
    """A hash of every parameter and buffer: names, types, shapes and bytes.

    Every byte is read each time, so however a weight was changed, it is noticed: two contents that differ have equal
    hashes with a chance of 2^-128. Not proof against weights that are made to collide: XXH3 is no cryptographic hash.
    """
    digest = xxhash.xxh3_128()
    for name, tensor in tensors(model):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return digest.hexdigest()


def files_fingerprint(folder: Path) -> str:
    """A hash of a model directory: its config, and the size, time and header of each weight file; of a model that is
    one file, all of it, as `sha256:` and hex."""
    if folder.is_file():
        with folder.open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("config.json"), *folder.glob("*.safetensors*")]):
        stat = path.stat()
        digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        digest.update(_header(path))
    return digest.hexdigest()


def _header(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), 1 << 26))
