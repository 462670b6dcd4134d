"""The record of a run: what tells whether two runs were of the same spec, data, weights and software.

As a dict in `Results`, and as a file beside each file of results, with when and how the run went.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchc.ir.experiment import Prompts
from patchc.writing import write_whole

if TYPE_CHECKING:
    from patchc.report.results import Results

PLANNED = ("cells", "passes", "flops", "bytes")
PACKAGES = ("patchc", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True, slots=True)
class Timed:
    """When a run started and finished; and by experiment, how many passes it had from an earlier start."""

    started: datetime
    finished: datetime
    resumed: Mapping[str, int]


def run_record(
    spec: str,
    prompts: Prompts,
    weights: str,
    seeds: Sequence[tuple[str, int]] = (),
    parameters: Mapping[str, str | int | float] | None = None,
    *,
    model: str,
    settings: Mapping[str, Any],
    memory: int,
    plan: Mapping[str, tuple[int, int, int, int]],
) -> dict[str, Any]:
    """Hashes of the spec's text, the data as tokenised and the weights' fingerprint; the values of its `${NAME}`;
    versions; the seeds of what is random, by what it is; the model's name and how it is run (`settings`); the bytes
    that a pass aims at; and of each experiment's plan cells, passes, FLOPs and bytes."""
    by_use: dict[str, list[int]] = {}
    for use, seed in seeds:
        by_use.setdefault(use, []).append(seed)
    return {
        "spec": sha256(spec),
        "parameters": dict(sorted((parameters or {}).items())),
        "data": data_hash(prompts),
        "model": model,
        "weights": sha256(weights),
        "versions": versions(),
        "seeds": by_use,
        "settings": dict(settings),
        "memory": memory,
        "plan": {name: dict(zip(PLANNED, numbers, strict=True)) for name, numbers in plan.items()},
    }


# ---- beside results


def record_path(result: Path) -> Path:
    """Where the record of a result file is written: beside it, under its name without suffix."""
    return result.with_name(f"{result.stem}.record.json")


def write_records(results: Results, spec: str, timed: Timed) -> None:
    """Write the record of a run beside each file of its results; files of one directory and one name but for the suffix
    have one record."""
    groups: dict[Path, list[Path]] = {}
    for path in (path for result in results.values() for path in result.files):
        groups.setdefault(record_path(path), []).append(path)
    run = {
        "started": timed.started.isoformat(timespec="seconds"),
        "finished": timed.finished.isoformat(timespec="seconds"),
        "resumed_passes": dict(timed.resumed),
        "checks": {name: None if r.check is None else asdict(r.check) for name, r in results.items()},
        **results.record,
        "spec_text": spec,
    }
    for place, files in groups.items():
        content = {"format_version": 1, "files": {path.name: file_hash(path) for path in files}, **run}
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
        write_whole(place, lambda path, text=text: path.write_text(text, encoding="utf-8"))


# ---- hashes and versions


def file_hash(path: Path) -> str:
    """`sha256:` and the hash of a file's bytes, in hex."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def data_hash(prompts: Prompts) -> str:
    """Of the data as tokenised."""
    return sha256(_canonical(prompts))


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
