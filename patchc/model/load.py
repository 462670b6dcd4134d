"""From a name, a directory or a module to a traced and proved model: the entry of this stage.

Directories hold safetensors and a config, nothing that runs. What a model computes is `trace`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from patchc.diagnostics import RULES
from patchc.ir.graph import ResidualGraph
from patchc.model.configs import BAD_OPTION, config_context, config_layers, dtype_named, native_model
from patchc.model.devices import device_named
from patchc.model.export import export
from patchc.model.folders import (
    NOT_FOUND,
    first_line,
    is_native,
    model_folder,
    read_config,
    read_tokenizer,
    silent_transformers,
    unbuildable,
)
from patchc.model.gguf_files import gguf_model, is_gguf
from patchc.model.identity import identity
from patchc.model.packaged import PACKAGED, Packaged
from patchc.model.pieces import TracedPieces
from patchc.model.placed import refuse_placement
from patchc.model.probe import probe, probes_alike
from patchc.model.prove import is_causal, prove, prove_insides, prove_parts
from patchc.model.state import (
    CHANGED,
    content_fingerprint,
    files_fingerprint,
    refuse_hooks,
    refuse_non_finite,
    untouched,
)
from patchc.model.trace import trace
from patchc.model.trace_cache import keep_trace, read_trace, trace_key
from patchc.progress import Progress, silent

BAD_WEIGHTS = RULES.add("model-weights", "a model directory's weights are missing, incomplete or damaged", exit=3)


@dataclass
class LoadedModel:
    """A traced model. `eager` is the module itself, as it was given; `bos`: whether texts get a
    beginning-of-sequence token, None where the tokenizer decides."""

    name: str
    eager: nn.Module
    tokenizer: Any | None
    graph: ResidualGraph
    pieces: TracedPieces
    fingerprint: str
    bos: bool | None
    content: str
    settings: str | None
    """Its classes and settings, hashed; None where they may compute anything."""
    packaged: str | None = None
    """The file of an installed package that its weights are from, by its path there; `fingerprint` is that file's."""
    probed: Tensor | None = None
    """Where `settings` is None: its own logits of a short prompt, `[pos, d_vocab]`, as they were when it was traced."""

    @property
    def element(self) -> int:
        """The bytes of a number in the model's dtype."""
        return self.pieces.dtype.itemsize

    def check_unchanged(self) -> None:
        """Raise `model-changed` or `model-has-hooks` where it is no longer the module that was traced."""
        refuse_hooks(self.eager)
        refuse_placement(self.eager)
        device = next(self.eager.parameters()).device
        if device != self.pieces.device:
            moved = f"{self.name} was moved from {self.pieces.device} to {device} after it was traced"
            raise CHANGED.error(moved, fix="load the model again")
        if content_fingerprint(self.eager) != self.content:
            raise CHANGED.error(
                f"the weights of {self.name} were changed after it was traced", fix="load the model again"
            )
        if identity(self.eager) != self.settings or not self._computes_as_before():
            changed = f"the settings or the code of {self.name} were changed after it was traced"
            raise CHANGED.error(changed, fix="load the model again")

    def _computes_as_before(self) -> bool:
        """Where the settings cannot be told: whether the logits of a short prompt are still what they were."""
        if self.probed is None:
            return True
        try:
            return probes_alike(self.probed, probe(self.eager, self.graph.d_vocab, self.graph.n_ctx))
        except Exception:  # a module that was edited may raise anything
            return False


@dataclass(frozen=True)
class _Source:
    """A module and where it came from."""

    name: str
    module: nn.Module
    folder: Path | None = None
    tokenizer: Any | None = None
    packaged: str | None = None
    fingerprint: str | None = None
    """Of its files, where it is from any."""


def load(
    model: str | Path | nn.Module,
    *,
    tokenizer: Any | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    attention: str | None = None,
    bos: bool | None = None,
    base: Path | None = None,
    progress: Progress = silent,
) -> LoadedModel:
    """Load, trace and prove a model.

    `model`: the name of a built-in model or of one that comes in a package, a model directory (relative to `base`),
    a hub id, or a module, which is left exactly as it was. `attention` is transformers' kind of attention, `sdpa` or
    `eager`. `progress` is told of what takes seconds: dequantising, and tracing what was not traced before.
    Errors: `model-not-found`, `model-not-installed`, `model-config`, `model-weights`, `model-option`, `nan-in-weights`,
    `model-has-hooks`, `model-placement`, `model-wrapped`, `quantised-weights`,
    `model-not-understood` (the first place where it is not built so), `trace-differs`."""
    with silent_transformers():
        if isinstance(model, nn.Module):
            source = _given(model, dtype, device)
        elif not isinstance(model, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NOT_FOUND.error(f"a model is a name, a path or a torch.nn.Module, not a {type(model).__name__}")
        else:
            source = _named(model, _Options(dtype_named(dtype), revision, attention, progress), base or Path())
            source = replace(source, module=source.module.to(device_named(device)))
    source = replace(source, tokenizer=tokenizer if tokenizer is not None else source.tokenizer)
    return _traced(source, bos, progress)


def _traced(source: _Source, bos: bool | None, progress: Progress) -> LoadedModel:
    module = source.module
    refuse_placement(module)
    refuse_hooks(module)
    content = content_fingerprint(module)
    with torch.inference_mode(False), untouched(module):
        key = trace_key(module, content)
        pieces = None if key is None else read_trace(key, module, source.name)
        if pieces is None:
            pieces = _proved(module, source.name, progress)
            if key is not None:
                keep_trace(key, pieces, module)
    fingerprint = source.fingerprint or content
    settings = None if key is None else key["module"]
    probed = probe(module, pieces.graph.d_vocab, pieces.graph.n_ctx) if settings is None else None
    return LoadedModel(
        source.name,
        module,
        source.tokenizer,
        pieces.graph,
        pieces,
        fingerprint,
        bos,
        content,
        settings,
        source.packaged,
        probed,
    )


def _proved(module: nn.Module, name: str, progress: Progress) -> TracedPieces:
    """The pieces of a module in eval mode, traced and proved."""

    def step(done: int) -> None:
        progress(f"{name}: tracing", done, 5)

    step(0)
    refuse_non_finite(module)
    exported = export(module)
    step(1)
    structure = trace(exported)
    pieces = TracedPieces(structure, structure.graph(name, config_context(module), causal=False))
    step(2)
    prove(pieces, module, config_layers(module))
    pieces.graph = replace(pieces.graph, causal=is_causal(pieces))
    step(3)
    prove_parts(pieces)
    step(4)
    prove_insides(pieces)
    step(5)
    return pieces


# ---- modules


def _given(module: nn.Module, dtype: object, device: object) -> _Source:
    if dtype is not None or device is not None:
        raise BAD_OPTION.error("dtype and device are options of models loaded by name; move the module itself instead")
    original = _unbridged(module)
    config = getattr(original, "config", None) or getattr(original, "cfg", None)
    name = getattr(config, "name_or_path", None) or type(original).__name__
    tokenizer = getattr(module, "tokenizer", None) if original is not module else None
    return _Source(str(name), original, None, tokenizer)


def _unbridged(module: nn.Module) -> nn.Module:
    """The module that a TransformerLens bridge runs: the one it was put around, with the bridge's parts in it.

    With processed weights it is that module that computes with them."""
    if type(module).__name__ != "TransformerBridge":
        return module
    refuse_hooks(module)
    return module.original_model  # type: ignore[return-value]


# ---- names


@dataclass(frozen=True)
class _Options:
    dtype: torch.dtype | None
    revision: str | None
    attention: str | None
    progress: Progress


def _named(model: str | Path, options: _Options, base: Path) -> _Source:
    folder = model_folder(model, base, options.revision)
    packaged = PACKAGED.get(str(model)) if is_gguf(folder) else None
    fingerprint = files_fingerprint(folder)
    if packaged is not None:
        _check_file(packaged, folder, fingerprint)
    config = read_config(folder)
    if is_native(config):
        module = _native(folder, config)
        module = module if options.dtype is None else module.to(options.dtype)
    else:
        module = _gguf(str(model), folder, config, options) if is_gguf(folder) else _hf(folder, options)
    return _Source(str(model), module.eval(), folder, read_tokenizer(folder), packaged and packaged.file, fingerprint)


def _check_file(package: Packaged, file: Path, fingerprint: str) -> None:
    """Refuse a file that is not the one the package came with."""
    if fingerprint != f"sha256:{package.sha256}":
        message = f"{file} is not the file of {package.distribution} {package.version}: its hash is another"
        raise BAD_WEIGHTS.error(message, fix=f"`{package.install('--force-reinstall ')}`")


def _native(folder: Path, config: dict[str, Any]) -> nn.Module:
    module = native_model(folder, config)
    path = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise BAD_WEIGHTS.error(f"{path} is missing") from None
    except (SafetensorError, RuntimeError) as error:
        raise BAD_WEIGHTS.error(f"{path} does not hold the model's weights: {first_line(error)}") from None
    return module


def _hf(folder: Path, options: _Options) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=options.dtype or "auto",
            attn_implementation=options.attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BAD_WEIGHTS.error(f"the weights in {folder} cannot be loaded: {first_line(error)}") from None
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise unbuildable(folder, error) from None
    module, info = loaded
    _complete(folder, info)
    return module


def _gguf(name: str, file: Path, config: dict[str, Any], options: _Options) -> nn.Module:
    """The module of a GGUF file in float32, unless told."""
    try:
        module, info = gguf_model(
            file,
            config,
            lambda done, total: options.progress(f"{name}: reading weights", done, total),
            dtype=options.dtype or torch.float32,
            attn_implementation=options.attention,
        )
    except Exception as error:
        raise BAD_WEIGHTS.error(f"the weights in {file} cannot be loaded: {first_line(error)}") from None
    _complete(file, info)
    return module


def _complete(folder: Path, info: dict[str, Any]) -> None:
    """Refuse weights that transformers would have made up or misread."""
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have another shape for")):
        if names := sorted(str(n) for n in info.get(key) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BAD_WEIGHTS.error(f"the weights in {folder} {what} `{names[0]}`{more}")
