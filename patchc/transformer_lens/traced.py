"""The traced model of a bridge, a module or a name: traced once, and again where it has changed since.

What a sweep does with it is for `sweeps`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from patchc.api import Model, load
from patchc.diagnostics import PatchcError
from patchc.ir.experiment import ModelChoice
from patchc.model.folders import model_folder, silent_transformers
from patchc.model.load import LoadedModel
from patchc.model.state import CHANGED, files_fingerprint, refuse_hooks
from patchc.transformer_lens.errors import BAD_SWEEP, SweepError, failure

ANY_MODEL = Model | nn.Module | str | Path

_named: dict[tuple[Path, str], Model] = {}
"""The last model that was asked for by name, by where its files are and their fingerprint."""

NOTHING = nn.Identity()
FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@dataclass(frozen=True)
class Traced:
    """A traced model, and the bridge that it was given as, if it was one. `loaded` is the same object as long as the
    model has not changed."""

    loaded: LoadedModel
    bridge: Any | None = None
    checked: set[str] = field(default_factory=set[str])
    """The bridge's hooks that have been found to stand where the sites of their names do."""


_traced: WeakKeyDictionary[nn.Module, Traced] = WeakKeyDictionary()
"""What is known of each module, without the module itself: it is not kept alive."""


def traced(model: ANY_MODEL) -> Traced:
    """The traced model of whatever a sweep was given. Errors: those of `patchc.load`, and a module in training mode."""
    if isinstance(model, Model):
        model.loaded.check_unchanged()
        return Traced(model.loaded)
    if isinstance(model, nn.Module):
        return _of_module(model)
    return Traced(_of_name(model))


def _of_name(model: str | Path) -> LoadedModel:
    with silent_transformers():
        folder = model_folder(model, Path()).resolve()
    key = (folder, files_fingerprint(folder))
    if key not in _named:
        _named.clear()
        _named[key] = load(ModelChoice(str(model)))
    return _named[key].loaded


def _of_module(module: nn.Module) -> Traced:
    is_bridge = type(module).__name__ == "TransformerBridge"
    inner: nn.Module = module.original_model if is_bridge else module  # pyright: ignore[reportAssignmentType]
    _refuse_training(module, inner)
    if not is_bridge:
        return _kept(module, inner, None)
    refuse_hooks(module)
    with _without_copies(module):
        return _kept(module, inner, module)


def _kept(module: nn.Module, inner: nn.Module, bridge: Any | None) -> Traced:
    kept = _traced.get(module)
    if kept is not None and (loaded := _unchanged(replace(kept.loaded, eager=inner))) is not None:
        return Traced(loaded, bridge, kept.checked)
    loaded = load(module).loaded
    kept = _traced[module] = Traced(replace(loaded, eager=NOTHING))
    return Traced(loaded, bridge, kept.checked)


@contextmanager
def _without_copies(bridge: Any) -> Generator[None]:
    """A bridge that computes as the model does: with these flags it copies what heads read, or adds up what each
    writes, for hooks to be put there. The numbers are the same."""
    flags = [flag for flag in FLAGS if getattr(bridge.cfg, flag, False)]
    try:
        for flag in flags:
            getattr(bridge, f"set_{flag}")(False)
        yield
    finally:
        for flag in flags:
            getattr(bridge, f"set_{flag}")(True)


def _unchanged(loaded: LoadedModel) -> LoadedModel | None:
    """A model that is still the one that was traced, or None."""
    try:
        loaded.check_unchanged()
    except PatchcError as error:
        if any(d.code != CHANGED.code for d in error.diagnostics):
            raise
        return None
    return loaded


def _refuse_training(*modules: nn.Module) -> None:
    for module in modules:
        found = next((name for name, m in module.named_modules() if m.training), None)
        if found is not None:
            where = f"module `{found}`" if found else "the model itself"
            message = f"{where} is in training mode, in which dropout would be part of what is measured"
            raise failure(SweepError, BAD_SWEEP, message, "call `model.eval()`")
