"""What patchc can make again, kept on disk: one JSON file an entry, and one of safetensors where it has tensors.

In the user's cache directory, or in `PATCHC_CACHE` (`0` or `off` keeps nothing). An entry that cannot be read, or was
written for anything else, counts as absent. Needs no torch; what entries hold is their owners' matter.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

import patchc

LIBRARIES = ("torch", "transformers", "transformer-lens")
OFF = ("0", "off")


def cache_folder() -> Path | None:
    """Where patchc keeps what it can make again; None where it is to keep nothing."""
    chosen = os.environ.get("PATCHC_CACHE")
    if chosen and chosen.lower() in OFF:
        return None
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("patchc"))


def makers() -> dict[str, Any]:
    """The part of a key that says by what an entry was made: versions, and patchc's own code."""
    versions = {"patchc": patchc.__version__, **{name: metadata.version(name) for name in LIBRARIES}}
    return {"versions": versions, "tracer": _tracer()}


@cache
def _tracer() -> str:
    """A hash of the code that takes models apart: a checkout changes while its version stays."""
    package = Path(patchc.__file__).parent
    sources = sorted([*(package / "model").glob("*.py"), *(package / "ir").glob("graph*.py")])
    found = hashlib.blake2b(digest_size=16)
    for path in sources:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def digest(content: object) -> str:
    """A hash of plain data."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_entry(kind: str, key: dict[str, Any]) -> tuple[Any, bytes] | None:
    """The content and the tensors (a safetensors file's bytes, maybe none) kept under a key; None where there is no
    entry or it is damaged."""
    path = _path(kind, key)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_bytes())
        tensors = path.with_suffix(".safetensors").read_bytes() if entry["has_tensors"] else b""
        if entry["key"] != key or entry["digest"] != _sealed(entry["content"], tensors):
            return None
        return entry["content"], tensors
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep_entry(kind: str, key: dict[str, Any], content: Any, tensors: bytes = b"") -> None:
    """Keep an entry under a key. Several processes may at once; where nothing can be written nothing is kept."""
    path = _path(kind, key)
    if path is None:
        return
    entry = {"key": key, "content": content, "has_tensors": bool(tensors), "digest": _sealed(content, tensors)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        if tensors:
            _replace(path.with_suffix(".safetensors"), tensors)
        _replace(path, json.dumps(entry).encode())


def _replace(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    beside = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _path(kind: str, key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / kind / f"{digest(key)}.json"


def _sealed(content: Any, tensors: bytes) -> str:
    return digest([content, hashlib.blake2b(tensors, digest_size=16).hexdigest()])
