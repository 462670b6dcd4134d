"""The record of a run: what tells whether two runs were of the same spec, data, weights and software.

As a dict in `Results`, and as a file beside each file of results, with when and how the run went.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchc.ir.experiment import Continuation, Read, Study
from patchc.ir.leaves import leaves
from patchc.writing import write_whole

if TYPE_CHECKING:
    from patchc.report.results import Results

PLANNED = ("cells", "passes", "flops", "bytes")
PACKAGES = ("patchc", "torch", "transformers", "transformer-lens")


@dataclass(frozen=True, slots=True)
class Course:
    """When a run started and finished; the bytes that a pass aimed at; and by experiment, how many passes it had from
    an earlier start."""

    started: datetime
    finished: datetime
    memory: int
    resumed: Mapping[str, int]


def run_record(
    spec: str,
    study: Study,
    weights: str,
    parameters: Mapping[str, str | int | float] | None = None,
    *,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    plan: Mapping[str, tuple[int, int, int, int]],
) -> dict[str, Any]:
    """What a run was of, and how it was computed.

    Hashes of the spec's text, the data, the files that the spec names and the weights; the values of its `${NAME}`;
    versions; the seeds of what is random, by what it is; the model's name and how it is run (`settings`); of each
    experiment's plan cells, passes, FLOPs and bytes."""
    by_use: dict[str, list[int]] = {}
    for use, seed in study.seeds:
        by_use.setdefault(use, []).append(seed)
    return {
        "spec": sha256(spec),
        "parameters": dict(sorted((parameters or {}).items())),
        "data": data_hash(study),
        "inputs": dict(inputs),
        "model": study.model.name,
        "weights": sha256(weights),
        "versions": versions(),
        "seeds": by_use,
        "settings": dict(settings),
        "plan": {name: dict(zip(PLANNED, numbers, strict=True)) for name, numbers in plan.items()},
    }


# ---- beside results


def record_path(result: Path) -> Path:
    """Where the record of a result file is written: beside it, under its name without suffix."""
    return result.with_name(f"{result.stem}.record.json")


def write_records(results: Results, spec: str, course: Course) -> None:
    """Write the record of a run beside each file of its results; files of one directory and one name but for the suffix
    have one record."""
    groups: dict[Path, list[Path]] = {}
    for path in (path for result in results.values() for path in result.files):
        groups.setdefault(record_path(path), []).append(path)
    run = {
        "started": course.started.isoformat(timespec="seconds"),
        "finished": course.finished.isoformat(timespec="seconds"),
        "memory": course.memory,
        "resumed_passes": dict(course.resumed),
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


def data_hash(study: Study) -> str:
    """Of the data as tokenised, from whatever file or block they came: worlds by name, each prompt's ids; and the
    answers that metrics read."""
    found = (leaf for e in study.experiments for m in e.metrics for leaf in leaves(m.expression))
    answers = [leaf.answers for leaf in found if isinstance(leaf, Read | Continuation)]
    worlds = [[w.name, w.ids] for w in study.prompts.worlds]
    return sha256(json.dumps([worlds, answers], separators=(",", ":")))


def input_hashes(paths: Iterable[Path], base: Path) -> dict[str, str]:
    """Of each file that a spec names, by its path from the spec's directory; directories are left out."""
    return {Path(os.path.relpath(path, base)).as_posix(): file_hash(path) for path in paths if path.is_file()}


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
