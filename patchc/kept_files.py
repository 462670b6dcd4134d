"""The finished passes of a run as files in one folder: a safetensors file for several passes at a time.

A file is written whole, and holds a hash of its content: one that is damaged, or is of another shape than the program,
counts as absent. What a folder belongs to, and whether it may be used, is for `resuming`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from patchc.diagnostics import RULES, Diagnostic, PatchcError, Severity
from patchc.execute.kept import Found
from patchc.ir.program import Program
from patchc.writing import write_whole

NOT_KEPT = RULES.add("not-kept", "the finished passes of a run cannot be kept: it cannot be resumed", Severity.WARNING)

ABOUT = "run.json"
"""What the files of a folder belong to."""
RUN = re.compile("[0-9a-f]{16}")
"""The name of a run's folder."""
KEPT = re.compile(r"run\.json|\d+-\d{8,}-\d{8,}\.safetensors|\..+")
"""The names of the files in it; hidden ones are half written, by patchc or by what it writes with."""


@dataclass
class KeptRun:
    """A run's finished passes: those that an earlier start kept in `folder`, and those of this one, written every
    `every` seconds; where there is no folder yet, into a new one in `around` (None: nothing is kept).

    `about` gives what is written beside the passes. As a context, it writes what is still unwritten when the run is
    interrupted.
    """

    around: Path | None
    folder: Path | None
    programs: Sequence[Program]
    about: Callable[[], Mapping[str, Any]]
    every: float
    say: Callable[[Diagnostic], object]
    passes: list[KeptPasses] = field(init=False)

    def __post_init__(self) -> None:
        self.passes = [KeptPasses(self, i, program) for i, program in enumerate(self.programs)]
        self.resumed = {p.program.experiment.name: len(p.earlier) for p in self.passes}
        """By experiment, how many passes an earlier start had kept."""
        self._written = time.monotonic()

    @property
    def n_cells(self) -> int:
        """How many cells are on the disk."""
        return sum(len(p.program.passes[i].cells) for p in self.passes for i in p.written)

    def __enter__(self) -> KeptRun:
        self._written = time.monotonic()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.write()
            if self.n_cells:
                n = sum(len(work.cells) for program in self.programs for work in program.passes)
                error.add_note(f"{self.n_cells:,} of {n:,} cells are kept in {self.folder}")
        elif error is not None and self.folder is not None:
            self.write()
        elif error is not None:
            self.write_if_due()

    def write_if_due(self) -> None:
        """Write where the last time is `every` seconds ago."""
        if time.monotonic() - self._written >= self.every:
            self.write()

    def write(self) -> None:
        """Write every pass that is not on the disk. Where that cannot be, it is said once, and the run goes on."""
        if self.around is None:
            return
        try:
            for passes in self.passes:
                if passes.pending:
                    self._write(self._made(self.around), passes)
        except (OSError, PatchcError) as error:
            why = error.strerror if isinstance(error, OSError) else error.diagnostics[0].message
            message = f"the finished passes cannot be kept in {self.around}: {why}; stopped, the run has to start again"
            self.say(NOT_KEPT.at(None, message))
            self.around = None
        self._written = time.monotonic()

    def _made(self, around: Path) -> Path:
        """The run's folder, with what it belongs to in it. Another process may be removing it: the same run, done."""
        if self.folder is None or not (self.folder / ABOUT).exists():
            text = json.dumps(self.about(), indent=1, ensure_ascii=False) + "\n"
            self.folder = self.folder or around / hashlib.sha256(text.encode()).hexdigest()[:16]
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / ABOUT, lambda path: path.write_text(text, encoding="utf-8"))
        return self.folder

    def _write(self, folder: Path, passes: KeptPasses) -> None:
        numbers = sorted(passes.pending)
        name = f"{passes.number}-{numbers[0]:08}-{numbers[-1]:08}.safetensors"
        tensors = passes.packed(numbers)
        write_whole(folder / name, lambda path: save_file(tensors, path, {"digest": _digest(tensors)}))
        passes.written.update(numbers)
        passes.pending.clear()

    def discard(self) -> None:
        """Remove every file of the run: it is complete."""
        if self.folder is not None:
            discard(self.folder)


@dataclass
class KeptPasses:
    """Those of experiment `number`: what an `earlier` start found, by number of the pass; what is still to be written;
    and which are on the disk."""

    run: KeptRun
    number: int
    program: Program
    earlier: dict[int, Found] = field(default_factory=dict[int, Found])
    pending: dict[int, Found] = field(default_factory=dict[int, Found])
    written: set[int] = field(default_factory=set[int])

    def __post_init__(self) -> None:
        if self.run.folder is not None:
            for path in sorted(self.run.folder.glob(f"{self.number}-*.safetensors")):
                with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, RuntimeError):
                    self.earlier |= self._unpacked(_read(path))
        self.written.update(self.earlier)

    def get(self, number: int) -> Found | None:
        """What an earlier start found in a pass; asked for once."""
        return self.earlier.pop(number, None)

    def put(self, number: int, found: Found) -> None:
        """Keep what a pass found; it is on the disk within `every` seconds of running."""
        self.pending[number] = found
        self.run.write_if_due()

    def packed(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Passes as tensors: `passes` their numbers; of their cells, one after another, `silent` `[cell]`, and a
        metric's `[cell, prompt]` under its place among the metrics."""
        works, found = [self.program.passes[i] for i in numbers], [self.pending[i] for i in numbers]
        unfelt = {cell for f in found for cell in f.silent}
        silent = [cell in unfelt for work in works for cell in work.cells]
        metrics = {str(i): torch.cat([f.values[name] for f in found]) for i, name in enumerate(self._metrics)}
        return {"passes": torch.tensor(numbers), "silent": torch.tensor(silent), **metrics}

    def _unpacked(self, tensors: Mapping[str, Tensor]) -> dict[int, Found]:
        """The other way; ValueError where they are not of this program."""
        numbers: list[int] = tensors["passes"].tolist()
        if not all(0 <= i < self.program.n_passes for i in numbers):
            raise ValueError("passes that the program has not")
        works = [self.program.passes[i] for i in numbers]
        sizes = [len(work.cells) for work in works]
        values = {name: tensors[str(i)] for i, name in enumerate(self._metrics)}
        whole = (sum(sizes), self.program.prompts.n)
        if any(x.shape != whole or x.dtype != torch.float64 for x in values.values()):
            raise ValueError("numbers of another shape")
        parts = {name: x.split(sizes) for name, x in values.items()}
        silent = tensors["silent"].split(sizes)
        return {
            number: Found(
                {name: parts[name][i] for name in self._metrics},
                tuple(c for c, is_silent in zip(works[i].cells, silent[i].tolist(), strict=True) if is_silent),
            )
            for i, number in enumerate(numbers)
        }

    @property
    def _metrics(self) -> list[str]:
        return [metric.name for metric in self.program.experiment.metrics]


def _read(path: Path) -> dict[str, Tensor]:
    """A file's tensors. ValueError where they are not what was written."""
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        if (opened.metadata() or {}).get("digest") != _digest(tensors):
            raise ValueError("damaged")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def kept_runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders of runs in `folder`, the latest first, each with what is written about it. Whatever else stands there
    is somebody else's."""
    found: list[tuple[float, Path, dict[str, Any]]] = []
    for path in folder.glob(f"*/{ABOUT}"):
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if not RUN.fullmatch(path.parent.name) or path.parent.is_symlink() or path.is_symlink():
                continue
            about = json.loads(path.read_bytes())
            if isinstance(about, dict) and isinstance(about.get("binding"), dict):
                found.append((path.stat().st_mtime, path.parent, about))
    for _, run, about in sorted(found, key=lambda x: x[0], reverse=True):
        yield run, about


def discard(run: Path) -> None:
    """Remove the folder of a run, and the one around it where nothing else stands in it. Only what has the names of
    kept files is removed; what cannot be, stays."""
    with contextlib.suppress(OSError):
        for path in [p for p in run.iterdir() if KEPT.fullmatch(p.name)]:
            path.unlink(missing_ok=True)
        run.rmdir()
        run.parent.rmdir()
