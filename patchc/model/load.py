"""From a name, a directory or a module to a traced and proved model: the entry of this stage.

Directories hold safetensors and a config, nothing that runs. What a model computes is `trace`'s matter.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from patchc.diagnostics import RULES, closest
from patchc.ir.graph import ResidualGraph
from patchc.model.export import export
from patchc.model.pieces import TracedPieces
from patchc.model.prove import is_causal, prove, prove_parts
from patchc.model.state import (
    CHANGED,
    content_fingerprint,
    files_fingerprint,
    refuse_hooks,
    refuse_non_finite,
    untouched,
)
from patchc.model.trace import trace
from patchc.resources import builtin_model, builtin_models

NOT_FOUND = RULES.add("model-not-found", "no built-in model, directory or hub model of that name")
BAD_CONFIG = RULES.add("model-config", "a model directory's config.json cannot be used")
BAD_WEIGHTS = RULES.add("model-weights", "a model directory's weights are missing, incomplete or damaged", exit=3)
BAD_OPTION = RULES.add("model-option", "an option of the model has a value that does not exist")

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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

    def check_unchanged(self) -> None:
        """Raise `model-changed` or `model-has-hooks` where it is no longer the module that was traced."""
        refuse_hooks(self.eager)
        same = content_fingerprint(self.eager) == self.content
        if not same:
            raise CHANGED.error(
                f"the weights of {self.name} were changed after it was traced", fix="load the model again"
            )


@dataclass(frozen=True)
class _Source:
    """A module and where it came from."""

    name: str
    module: nn.Module
    folder: Path | None = None
    tokenizer: Any | None = None


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
) -> LoadedModel:
    """Load, trace and prove a model.

    `model`: the name of a built-in model, a model directory (relative to `base`), a hub id, or a module,
    which is left exactly as it was. `attention` is transformers' kind of attention, `sdpa` or `eager`.
    Errors: `model-not-found`, `model-config`, `model-weights`, `nan-in-weights`, `model-has-hooks`,
    `model-not-understood` (the first place that is not a pre-norm decoder), `trace-differs`."""
    with _silent_transformers():
        if isinstance(model, nn.Module):
            source = _given(model, dtype, device)
        elif not isinstance(model, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise NOT_FOUND.error(f"a model is a name, a path or a torch.nn.Module, not a {type(model).__name__}")
        else:
            source = _named(model, _Options(_dtype(dtype), revision, attention), base or Path())
            source = replace(source, module=source.module.to(_device(device)))
    source = replace(source, tokenizer=tokenizer if tokenizer is not None else source.tokenizer)
    return _traced(source, bos)


def _traced(source: _Source, bos: bool | None) -> LoadedModel:
    module = source.module
    refuse_hooks(module)
    refuse_non_finite(module)
    content = content_fingerprint(module)
    with torch.inference_mode(False), untouched(module):
        structure = trace(export(module))
        config = getattr(module, "config", None) or getattr(module, "cfg", None)
        n_ctx = _number(config, CONTEXTS) or 0
        pieces = TracedPieces(structure, structure.graph(source.name, n_ctx, causal=False))
        prove(pieces, module, _number(config, LAYER_COUNTS))
        pieces.graph = replace(pieces.graph, causal=is_causal(pieces))
        prove_parts(pieces)
    fingerprint = content if source.folder is None else files_fingerprint(source.folder)
    return LoadedModel(
        source.name,
        module,
        source.tokenizer,
        pieces.graph,
        pieces,
        fingerprint,
        bos,
        content,
    )


def _number(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these entries that a config has."""
    found = (getattr(config, n, None) for n in names)
    return next((int(n) for n in found if isinstance(n, int) and n > 0), None)


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


def _named(model: str | Path, options: _Options, base: Path) -> _Source:
    folder = builtin_model(model) if isinstance(model, str) else None
    folder = folder or base / model
    if folder.is_dir():
        return _directory(str(model), folder, options)
    if isinstance(model, Path) or folder.exists() or not HUB_NAME.fullmatch(model):
        raise NOT_FOUND.error(f"there is no model directory {folder}", fix=_suggestion(str(model)))
    return _hub(model, options)


def _suggestion(name: str) -> str:
    close = closest(name, builtin_models())
    known = ", ".join(f"`{n}`" for n in builtin_models()) or "none"
    return f"did you mean `{close}`?" if close else f"the built-in models are {known}"


def _directory(name: str, folder: Path, options: _Options) -> _Source:
    config = _config(folder)
    if config.get("format") == "patchc-native":
        module = _native(folder, config)
        module = module if options.dtype is None else module.to(options.dtype)
    elif "model_type" in config:
        module = _hf(str(folder), folder, options, local=True)
    else:
        raise BAD_CONFIG.error(
            f"{folder / 'config.json'} has neither `model_type` (Hugging Face) nor `format` (patchc)"
        )
    return _Source(name, module.eval(), folder, _tokenizer(folder))


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BAD_CONFIG.error(f"{folder} has no config.json, so it is no model directory") from None
    except (OSError, ValueError) as error:
        raise BAD_CONFIG.error(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise BAD_CONFIG.error(f"{path} does not hold an object")
    return config


def _native(folder: Path, config: dict[str, Any]) -> nn.Module:
    """A TransformerLens-native model: `config` are the arguments of its configuration."""
    import transformer_lens.model_bridge.sources.native as native
    from transformer_lens.config import TransformerBridgeConfig

    if config.get("version") != 1:
        raise BAD_CONFIG.error(
            f"{folder / 'config.json'} has version {config.get('version')}; this patchc reads version 1"
        )
    try:
        module = native.NativeModel(TransformerBridgeConfig(**config["config"]))
    except (KeyError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        raise BAD_CONFIG.error(
            f"{folder / 'config.json'} describes no model: {type(error).__name__}: {error}"
        ) from None
    path = folder / "model.safetensors"
    try:
        module.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise BAD_WEIGHTS.error(f"{path} is missing") from None
    except (SafetensorError, RuntimeError) as error:
        raise BAD_WEIGHTS.error(f"{path} does not hold the model's weights: {_first_line(error)}") from None
    return module


def _hub(name: str, options: _Options) -> _Source:
    """A model of the Hugging Face hub, from its local cache where it is there."""
    close = closest(name, builtin_models())
    if close and "/" not in name:
        raise NOT_FOUND.error(f'no model is called "{name}"', fix=f"did you mean `{close}`?")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    folder = None
    for local in (True, False):
        with contextlib.suppress(Exception):
            folder = Path(
                snapshot_download(name, revision=options.revision, allow_patterns=wanted, local_files_only=local)
            )
            break
    if folder is None:
        raise NOT_FOUND.error(
            f'"{name}" is no built-in model, no directory, and cannot be fetched from the Hugging Face hub',
            fix=_suggestion(name),
        )
    return replace(_directory(name, folder, options), name=name)


def _hf(name: str, folder: Path, options: _Options, local: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=options.dtype or "auto",
            attn_implementation=options.attention,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=local,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError) as error:
        raise BAD_WEIGHTS.error(f"the weights in {folder} cannot be loaded: {_first_line(error)}") from None
    except (ValueError, KeyError, TypeError, ImportError) as error:
        raise BAD_CONFIG.error(f"transformers cannot build the model of {folder}: {_first_line(error)}") from None
    module, info = loaded
    _complete(folder, info)
    return module


def _complete(folder: Path, info: dict[str, Any]) -> None:
    """Refuse weights that transformers would have made up or misread."""
    for key, what in (("missing_keys", "lack"), ("mismatched_keys", "have another shape for")):
        if names := sorted(str(n) for n in info.get(key) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise BAD_WEIGHTS.error(f"the weights in {folder} {what} `{names[0]}`{more}")


def _tokenizer(folder: Path) -> Any | None:
    """The tokenizer beside a model, None where there is none."""
    if not any(
        (folder / n).exists() for n in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    ):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BAD_CONFIG.error(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from None


# ---- options


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    names = ("float32", "float64", "bfloat16", "float16")
    if dtype not in names:
        raise BAD_OPTION.error(f'no dtype is called "{dtype}"; there are {", ".join(names)}')
    return getattr(torch, dtype)


def _device(device: str | torch.device | None) -> torch.device:
    try:
        found = torch.device(device or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise BAD_OPTION.error(f'device "{device}" cannot be used: {_first_line(error)}') from None
    return found


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _silent_transformers() -> Generator[None]:
    """No progress bars or remarks of transformers while a model is loaded."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
