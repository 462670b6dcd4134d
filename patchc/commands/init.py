"""`patchc init`: a starter spec for a model, written where nothing is lost. What is in it is `starter`'s matter."""

from __future__ import annotations

import os
from pathlib import Path

import click

from patchc.commands.starter import Described, starter_spec
from patchc.diagnostics import RULES, PatchcError
from patchc.model.folders import named_models
from patchc.writing import no_directory, write_whole

FILE_EXISTS = RULES.add("file-exists", "a file is there already, and would be replaced")
STDOUT = Path("-")


def write_starter(model: str, file: Path | None, force: bool) -> Path | None:
    """Write a spec for `model` that runs, to `file` (named after the model unless told), or to stdout for `-`.

    Gives the file. Errors: `file-exists` without `force`, and those of loading the model.
    """
    if file == STDOUT:
        name = f"{Path(model).name}.patch"
        click.echo(starter_spec(model, _described(model), name, Path()), nl=False)
        return None
    path = file or Path(f"{Path(model).resolve().name}.patch")
    _refuse_to_replace(path, force)
    text = starter_spec(_from(path.parent, model), _described(model), str(path), path.parent)
    return write_whole(path, lambda new: new.write_text(text, encoding="utf-8", newline="\n"))


def _described(model: str) -> Described:
    from patchc.model.outline import outline

    return outline(model)


def _refuse_to_replace(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise PatchcError([no_directory(path, None)])
    if path.exists() and not force:
        raise FILE_EXISTS.error(f"{path} is there already", fix="choose another name, or replace it with `--force`")


def _from(folder: Path, model: str) -> str:
    """A model's name as a spec in `folder` gives it: a directory's path is relative to the spec."""
    is_path = model not in named_models() and Path(model).is_dir() and not Path(model).is_absolute()
    return os.path.relpath(model, folder) if is_path else model
