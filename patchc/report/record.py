"""The record of a run: what tells whether two runs were of the same spec, data, weights and software."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from patchc.ir.experiment import Prompts

PACKAGES = ("patchc", "torch", "transformers", "transformer-lens")


def run_record(
    spec: str,
    prompts: Prompts,
    weights: str,
    seeds: Sequence[tuple[str, int]] = (),
    parameters: Mapping[str, str | int | float] | None = None,
) -> dict[str, Any]:
    """Hashes of the spec's text, the data as tokenised and the weights' fingerprint; the values of its `${NAME}`;
    versions; the seeds of what is random, by what it is."""
    by_use: dict[str, list[int]] = {}
    for use, seed in seeds:
        by_use.setdefault(use, []).append(seed)
    return {
        "spec": sha256(spec),
        "parameters": dict(sorted((parameters or {}).items())),
        "data": sha256(_canonical(prompts)),
        "weights": sha256(weights),
        "versions": versions(),
        "seeds": by_use,
    }


def sha256(text: str) -> str:
    """`sha256:` and the hash of a text's UTF-8 bytes, in hex."""
    return "sha256:" + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def versions() -> dict[str, str | None]:
    """The versions of what computes the numbers, without importing it; None for what is not installed."""
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def _version(package: str) -> str | None:
    if package == "patchc":
        from patchc import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _canonical(prompts: Prompts) -> str:
    """Worlds by name, each prompt's token ids: whatever file or block they came from."""
    return json.dumps([[w.name, w.ids] for w in prompts.worlds], separators=(",", ":"))
