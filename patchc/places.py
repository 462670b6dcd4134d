"""Which files a spec's run reads and writes, so that no result takes the place of what it was made from. No torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from patchc.diagnostics import Source
from patchc.ir.experiment import Experiment, Save, Show, Study
from patchc.parse.tree import Data, Spec, Text
from patchc.report.files import refuse_places
from patchc.report.record import record_path
from patchc.resolve.parameters import Literal


def input_paths(
    tree: Spec, study: Study, source: Source, base: Path, parameters: Mapping[str, Literal], model: str
) -> tuple[Path, ...]:
    """Every file or directory that a spec's run reads: itself, its data and tensors, its model where that is a path."""
    files = [i.file for i in tree.items if isinstance(i, Data) and i.file is not None]
    data = [file.text if isinstance(file, Text) else str(parameters[file.name]) for file in files]
    other = [world.name.rpartition(":")[0] for world in study.prompts.worlds if world.layout is not None]
    tensors = [tensor.file for tensor in study.tensors if tensor.file is not None]
    named = [base / name for name in (*data, *other, *tensors, model) if name]
    return (Path(source.name), *(path for path in named if os.path.exists(path)))


def result_path(source: Source, base: Path, experiment: Experiment, line: Save | Show) -> Path:
    """Where a `save` or `show` line writes. A picture without a name is called after its spec and experiment."""
    stem = "" if source.name == "<spec>" else Path(source.name).stem + "."
    return base / (line.path or f"{stem}{experiment.name}.png")


def check_places(study: Study, source: Source, base: Path, inputs: Collection[Path]) -> None:
    """Raise for `save` and `show` lines whose file could not be written: `no-such-directory`, `same-file`,
    `overwrites-input`."""
    places = [
        (result_path(source, base, e, line), line.span)
        for e in study.experiments
        for line in (*e.saves, *e.shows)
        if not (isinstance(line, Show) and line.kind == "table" and line.path is None)  # it writes no file
    ]
    refuse_places(places, inputs)
    # Only then their records, one for several files, so that what is wrong with a file is not said of its record too.
    refuse_places([*places, *{record_path(path): span for path, span in places}.items()], inputs)
