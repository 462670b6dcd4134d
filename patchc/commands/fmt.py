"""`patchc fmt`: specs in canonical layout, in place, as a difference, or said only. Imports no torch.

How a spec is laid out is `parse.format`'s matter.
"""

from __future__ import annotations

import difflib
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from patchc.diagnostics import Diagnostic, PatchcError, Source
from patchc.parse import format_spec
from patchc.spec import decoded, read_spec
from patchc.writing import write_whole

STDIN = Path("-")


def format_files(files: Sequence[Path], check: bool, diff: bool) -> tuple[int, list[Diagnostic]]:
    """How many files change, and what is wrong with those that cannot be formatted: they stay as they are.

    Changed files are rewritten, whole or not at all; with `check` they are named on stdout instead, with `diff` the
    difference goes there. `-` is stdin, formatted to stdout.
    """
    changed, found = 0, list[Diagnostic]()
    for file in files:
        try:
            changed += _format(file, check, diff)
        except PatchcError as error:
            found += error.diagnostics
    return changed, found


def _format(file: Path, check: bool, diff: bool) -> bool:
    """Format a file as told; gives whether it changes."""
    source = _read(file)
    text = format_spec(source)
    changed = text != source.text
    if diff:
        click.echo("".join(_difference(source, text)), nl=False)
    if check and changed:
        click.echo(f"{source.name} would be reformatted")
    if not (check or diff) and file == STDIN:
        click.echo(text, nl=False)
    elif not (check or diff) and changed:
        _rewrite(file, text)
        click.echo(f"{source.name} reformatted", err=True)
    return changed


def _read(file: Path) -> Source:
    if file == STDIN:
        return Source("<stdin>", decoded(sys.stdin.buffer.read(), "<stdin>"))
    return read_spec(file)[0]


def _rewrite(file: Path, text: str) -> None:
    """In place of what a link points to, with its mode."""
    target = file.resolve()

    def write(new: Path) -> None:
        new.write_bytes(text.encode())
        shutil.copymode(target, new)

    write_whole(target, write)


def _difference(source: Source, text: str) -> Iterator[str]:
    """Unified, as `diff -u` has it."""
    for line in difflib.unified_diff(_rows(source.text), _rows(text), source.name, source.name):
        yield line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n"


def _rows(text: str) -> list[str]:
    rows = [f"{row}\n" for row in text.split("\n")]
    rows[-1] = rows[-1].removesuffix("\n")
    return rows if rows[-1] else rows[:-1]
