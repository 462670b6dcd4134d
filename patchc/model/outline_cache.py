"""Residual graphs kept on disk, so that a model whose config was seen before is not traced again.

One JSON file a config, in the user's cache directory, or in `PATCHC_CACHE` (`0` or `off` keeps nothing). A file that
cannot be read, or was written for anything else, counts as absent. Never holds weights, code or pickles.
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
from patchc.ir.graph import ResidualGraph
from patchc.ir.graph_json import graph_from_json, graph_to_json

FORMAT = 1
LIBRARIES = ("torch", "transformers", "transformer-lens")
OFF = ("0", "off")


def cache_folder() -> Path | None:
    """Where patchc keeps what it can make again; None where it is to keep nothing."""
    chosen = os.environ.get("PATCHC_CACHE")
    if chosen and chosen.lower() in OFF:
        return None
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("patchc"))


def cache_key(config: dict[str, Any], dtype: str | None, attention: str | None) -> dict[str, Any]:
    """All that a model's residual graph follows from."""
    return {
        "format": FORMAT,
        "config": config,
        "dtype": dtype,
        "attention": attention,
        "versions": {"patchc": patchc.__version__, **{name: metadata.version(name) for name in LIBRARIES}},
        "tracer": _tracer(),
    }


@cache
def _tracer() -> str:
    """A hash of the code that finds graphs: a checkout changes while its version stays."""
    package = Path(patchc.__file__).parent
    sources = sorted([*(package / "model").glob("*.py"), *(package / "ir").glob("graph*.py")])
    digest = hashlib.blake2b(digest_size=16)
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_graph(key: dict[str, Any]) -> ResidualGraph | None:
    """The graph that was kept under a key, None where there is none or it is damaged."""
    path = _path(key)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_bytes())
        if entry["key"] != key or entry["digest"] != _digest(entry["graph"]):
            return None
        return graph_from_json(entry["graph"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def keep_graph(key: dict[str, Any], graph: ResidualGraph) -> None:
    """Keep a graph under a key. Several processes may at once; where nothing can be written nothing is kept."""
    path = _path(key)
    if path is None:
        return
    content = graph_to_json(graph)
    text = json.dumps({"key": key, "graph": content, "digest": _digest(content)})
    beside = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def _path(key: dict[str, Any]) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "outlines" / f"{_digest(key)}.json"


def _digest(content: object) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
