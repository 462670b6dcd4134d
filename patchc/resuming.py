"""Whether a run may go on from passes that an earlier start kept: only where everything that the numbers follow from
is the same. What differs is said, and the passes stay where they are; nothing is ever mixed.

The files themselves are for `kept_files`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import patchc
from patchc.diagnostics import RULES, Diagnostic, Severity, Source
from patchc.execute.settings import settings
from patchc.ir.experiment import ModelChoice, Study
from patchc.ir.printer import print_study
from patchc.ir.program import Program
from patchc.kept_files import NOT_KEPT, KeptRun, discard, kept_runs
from patchc.model.load import LoadedModel
from patchc.model.trace_cache import computed
from patchc.report.record import sha256, versions
from patchc.resolve.parameters import Literal

NOT_RESUMED = RULES.add("not-resumed", "kept passes are of another run, and are not used", Severity.WARNING)

EVERY = 5.0
"""Seconds of work that a killed run may lose. A run that is over sooner writes nothing."""

WORDS = {
    "tensors": "the tensors given",
    "weights": "the weights",
    "model": "what the model computes",
    "code": "the code of patchc",
    "versions": "the versions of the software",
    "plan": "the plan",
}
"""What is named without its values."""


@dataclass(frozen=True)
class Origin:
    """All that a run's numbers follow from. Hashed when it is asked for: a short run never needs it."""

    source: Source
    parameters: Mapping[str, Literal]
    study: Study
    tensors: Mapping[str, Tensor]
    model: LoadedModel

    @property
    def binding(self) -> dict[str, Any]:
        """What must be the same, to the bit. Settings are those of the moment: torch's threads may change."""
        return {**self._hashes, **settings(self.model)}

    @cached_property
    def _hashes(self) -> dict[str, Any]:
        bare = [replace(e, title=None, expects=(), saves=(), shows=()) for e in self.study.experiments]
        study = replace(self.study, model=ModelChoice(""), experiments=tuple(bare))
        return {
            "study": sha256(print_study(study, self.model.graph, whole=True)),
            "tensors": _hash_of(self.tensors),
            "weights": self.model.content,
            "model": _computed(self.model),
            "versions": versions(),
            "code": _code(),
        }

    @cached_property
    def telling(self) -> dict[str, Any]:
        """What tells where a study differs from another."""
        return {
            "spec": sha256(self.source.text),
            "parameters": dict(sorted(self.parameters.items())),
        }


@dataclass
class Resuming:
    """Where the finished passes of a spec's runs are kept: `folder`, None for nowhere, has a folder for each run."""

    folder: Path | None
    origin: Origin
    run: KeptRun | None = field(default=None, init=False)
    """The run that goes on, or went last."""

    def memory(self) -> int | None:
        """The budget of the latest kept run that this one could go on from: another one would cut its passes
        differently."""
        for _, about in self._kept():
            theirs = about.get("binding")
            if isinstance(theirs, dict) and theirs.items() >= self.origin.binding.items():
                memory = theirs.get("memory")
                return memory if isinstance(memory, int) and memory > 0 else None
        return None

    def warnings(self, programs: Sequence[Program], memory: int) -> tuple[Diagnostic, ...]:
        """Why kept passes, where there are some, are not used."""
        others = [(path, _differences(about, self._about(programs, memory))) for path, about in self._kept()]
        if not others or any(not differences for _, differences in others):
            return ()
        path, differences = min(others, key=lambda other: len(other[1]))
        message = (
            f"the passes kept in {path} are of another run and are not used; what differs: {', '.join(differences)}"
        )
        return (NOT_RESUMED.at(None, message, fix="`--fresh` (in Python `fresh=True`) discards them"),)

    def open(
        self, programs: Sequence[Program], memory: int, every: float, say: Callable[[Diagnostic], object]
    ) -> KeptRun:
        """The passes of this run: those kept before, and room for the others."""
        same = [path for path, about in self._kept() if not _differences(about, self._about(programs, memory))]
        about = partial(self._about, programs, memory)
        self.run = KeptRun(self.folder, same[0] if same else None, programs, about, every, say)
        return self.run

    def discard(self) -> None:
        """Remove what every run of the spec has kept."""
        for path, _ in self._kept():
            discard(path)

    def _kept(self) -> Sequence[tuple[Path, dict[str, Any]]]:
        return () if self.folder is None else tuple(kept_runs(self.folder))

    def _about(self, programs: Sequence[Program], memory: int) -> dict[str, Any]:
        return {
            "format_version": 1,
            "binding": {**self.origin.binding, "plan": plan_hash(programs), "memory": memory},
            "telling": self.origin.telling,
        }


def resuming(
    source: Source, chosen: str | Path | None, origin: Origin, functions: Collection[str]
) -> tuple[Resuming, tuple[Diagnostic, ...]]:
    """Where a spec's runs are kept, and a warning where they cannot be: in `chosen`, else beside the spec's file. A run
    that calls Python's `functions` is not kept: there is no telling whether another start has the same ones."""
    folder = None if source.name == "<spec>" else Path(f"{source.name}.partial")
    folder = folder if chosen is None else Path(chosen)
    if not functions:
        return Resuming(folder, origin), ()
    message = f"the finished passes cannot be kept: `{min(functions)}` is a Python function, which may change"
    return Resuming(None, origin), () if chosen is None else (NOT_KEPT.at(None, message),)


def plan_hash(programs: Sequence[Program]) -> str:
    """Of which cells each pass of each experiment has."""
    plan = [[p.experiment.name, [work.cells for work in p.passes]] for p in programs]
    return sha256(json.dumps(plan, separators=(",", ":")))


def _differences(about: Mapping[str, Any], mine: Mapping[str, Any]) -> list[str]:
    """What differs, in words; the plan only where nothing else explains it."""
    theirs, ours = about.get("binding"), mine["binding"]
    if about.get("format_version") != mine["format_version"] or not isinstance(theirs, dict):
        return ["the form of the files"]
    names = [name for name in ours if theirs.get(name) != ours[name]]
    names = [name for name in names if name != "plan"] or names
    return [_worded(name, theirs, ours, about.get("telling"), mine["telling"]) for name in names]


def _worded(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], before: Any, now: Mapping[str, Any]) -> str:
    if name == "study":
        known = before if isinstance(before, dict) else {}
        return next((f"the {part}" for part in ("parameters", "spec") if known.get(part) != now[part]), "the data")
    if name in WORDS:
        return WORDS[name]
    return f"the {name.replace('_', ' ')} ({theirs.get(name)} then, {ours[name]} now)"


def _computed(model: LoadedModel) -> str:
    """What is computed may change while no weight does: by a setting, or by another forward pass."""
    code, weights, constants = computed(model.pieces.structure.exported, model.eager)
    return sha256(json.dumps([code, sorted(weights.items()), _hash_of(constants)]))


def _hash_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
    return "sha256:" + digest.hexdigest()


@cache
def _code() -> str:
    """A hash of patchc's own source: a checkout changes while its version stays."""
    package = Path(patchc.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return "sha256:" + digest.hexdigest()
