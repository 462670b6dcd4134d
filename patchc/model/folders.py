"""Where a model's files are (a built-in's folder, a package's file, a directory, a snapshot of the hub), its config
and its tokenizer.

Needs neither torch nor weights: `load` reads the weights, `outline` does without.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Generator
from functools import lru_cache
from pathlib import Path
from typing import Any

from patchc.diagnostics import RULES, PatchcError, closest
from patchc.model.gguf_files import gguf_config, gguf_tokenizer, is_gguf
from patchc.model.packaged import PACKAGED, packaged_file
from patchc.resources import builtin_model, builtin_models

NOT_FOUND = RULES.add("model-not-found", "no built-in model, directory or hub model of that name")
BAD_CONFIG = RULES.add("model-config", "a model directory's config.json cannot be used")

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
NATIVE_VERSION = 1
"""Of the `config.json` of a TransformerLens-native model."""
TEXTS: tuple[str, ...] = ("*.json", "*.model", "*.txt")
WEIGHTS = "*.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")


def is_native(config: dict[str, Any]) -> bool:
    """Whether it describes a TransformerLens-native model."""
    return config.get("format") == "patchc-native"


def model_folder(model: str | Path, base: Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a built-in model, a directory (relative to `base`) or a hub id, or the GGUF file of a model that
    comes in a package. Of a hub model what is missing is fetched: all but the weights without `weights`.
    Errors: `model-not-found`, `model-not-installed`."""
    folder = (builtin_model(model) or packaged_file(model)) if isinstance(model, str) else None
    if folder is not None:
        return folder
    folder = base / model
    if os.path.isdir(folder):
        return folder
    if isinstance(model, Path) or os.path.exists(folder) or not HUB_NAME.fullmatch(model):
        raise NOT_FOUND.error(f"there is no model directory {folder}", fix=_suggestion(str(model)))
    return _snapshot(model, revision, weights)


def named_models() -> tuple[str, ...]:
    """The names that stand for a model by themselves: those of built-in models, and of models that come in packages."""
    return (*builtin_models(), *PACKAGED)


def _suggestion(name: str) -> str:
    close = closest(name, named_models())
    known = ", ".join(f"`{n}`" for n in named_models())
    return f"did you mean `{close}`?" if close else f"the models that have a name are {known}"


def _snapshot(name: str, revision: str | None, weights: bool) -> Path:
    """A model of the Hugging Face hub, from its local cache where all that is wanted is there."""
    close = closest(name, named_models())
    if close and "/" not in name:
        raise NOT_FOUND.error(f'no model is called "{name}"', fix=f"did you mean `{close}`?")
    from huggingface_hub import snapshot_download

    wanted = [*TEXTS, WEIGHTS] if weights else [*TEXTS]
    found = None
    for local in (True, False):
        with contextlib.suppress(Exception):
            found = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=local))
            if _is_complete(found, weights):
                break
    if found is None:
        message = f'"{name}" is no built-in model, no directory, and cannot be fetched from the Hugging Face hub'
        raise NOT_FOUND.error(message, fix=_suggestion(name))
    return found


def _is_complete(folder: Path, weights: bool) -> bool:
    """Whether a snapshot has its config and, if wanted, its weights. The cache gives the folder of a snapshot of which
    only some files were ever fetched."""
    return (folder / "config.json").exists() and (not weights or any(folder.glob(WEIGHTS)))


def read_config(folder: Path) -> dict[str, Any]:
    """The object in a model directory's `config.json`, of a kind that patchc reads, or what a GGUF file's header says.
    Errors: `model-config`."""
    if is_gguf(folder):
        return _read_gguf(folder, gguf_config)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BAD_CONFIG.error(f"{folder} has no config.json, so it is no model directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BAD_CONFIG.error(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise BAD_CONFIG.error(f"{path} does not hold an object")
    if not is_native(config) and "model_type" not in config:
        raise BAD_CONFIG.error(f"{path} has neither `model_type` (Hugging Face) nor `format` (patchc)")
    if is_native(config) and config.get("version") != NATIVE_VERSION:
        version = config.get("version")
        raise BAD_CONFIG.error(f"{path} has version {version}; this patchc reads version {NATIVE_VERSION}")
    return config


def read_tokenizer(folder: Path) -> Any | None:
    """The tokenizer beside a model or in its GGUF file, None where there is none. Errors: `model-config`."""
    if is_gguf(folder):
        return _read_gguf(folder, gguf_tokenizer)
    if not any((folder / name).exists() for name in TOKENIZERS):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BAD_CONFIG.error(f"the tokenizer in {folder} cannot be loaded: {first_line(error)}") from None


def _read_gguf(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except Exception as error:
        raise BAD_CONFIG.error(f"{file} cannot be read: {first_line(error)}") from None


def shared_tokenizer(folder: Path) -> Any | None:
    """As `read_tokenizer`, but read once a process while its files stay as they are. Not to be changed."""
    files = [folder] if is_gguf(folder) else sorted(path for pattern in TEXTS for path in folder.glob(pattern))
    stats = ((path.name, path.stat()) for path in files)
    return _shared(folder.resolve(), tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats))


@lru_cache(maxsize=8)
def _shared(folder: Path, _files: tuple[tuple[str, int, int], ...]) -> Any | None:
    with silent_transformers():
        return read_tokenizer(folder)


def unbuildable(folder: Path, error: Exception) -> PatchcError:
    """`model-config`: why transformers does not build a directory's model."""
    why = first_line(error)
    if "AutoModelForCausalLM" in why:  # and a list of every class that it would have taken
        why = "its config.json is not that of a decoder of token ids (a causal language model), which patchc traces"
    return BAD_CONFIG.error(f"transformers cannot build the model of {folder}: {why}")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def silent_transformers() -> Generator[None]:
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
