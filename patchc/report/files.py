"""Results to files, by suffix; what can go wrong is said before anything runs.

What is in a file comes from `Result`; how it gets to the disk is `writing`'s matter.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from patchc.diagnostics import RULES, Note, Report, Span
from patchc.writing import CANNOT_WRITE, no_directory, write_whole

if TYPE_CHECKING:
    from patchc.report.results import Result

UNKNOWN_FORMAT = RULES.add("unknown-format", "a file name whose suffix names no format that patchc writes")
OVERWRITES = RULES.add("overwrites-input", "a result would be written over a file that the run reads")
SAME_FILE = RULES.add("same-file", "two results would be written to one file")

TABLES = (".json", ".csv", ".parquet")
PICTURES = (".png", ".svg", ".pdf")
READABLE = (".txt", ".md", ".html", ".csv")
"""What `show table` writes."""


def save_result(result: Result, path: Path, span: Span | None = None) -> Path:
    """Write a result's numbers; returns the path."""
    _check_suffix(path, TABLES, "results", span)

    def write(target: Path) -> None:
        match path.suffix.lower():
            case ".json":
                target.write_text(_json(result), encoding="utf-8")
            case ".csv":
                result.to_pandas().to_csv(target, index=False, lineterminator="\n")
            case _:
                result.to_pandas().to_parquet(target, index=False)

    return write_whole(path, write, span)


def save_picture(result: Result, path: Path, span: Span | None = None, kind: str = "heatmap") -> Path:
    """Draw a result into a picture; returns the path."""
    _check_suffix(path, PICTURES, "pictures", span)
    from patchc.report.pictures import write_picture

    return write_whole(path, lambda target: write_picture(result, target, kind), span)


def save_table(result: Result, path: Path, span: Span | None = None) -> Path:
    """Write every cell's numbers as a table for people; returns the path."""
    _check_suffix(path, READABLE, "tables", span)
    from patchc.report.tables import table_text

    form = path.suffix.lower().removeprefix(".")
    return write_whole(path, lambda target: _write_text(target, table_text(result, form)), span)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def refuse_places(places: Iterable[tuple[Path, Span | None]], inputs: Collection[Path] = ()) -> None:
    """Raise, before anything runs, for files that cannot or must not be written after it: no directory, one file for
    two, or a file (or a file in a directory) that the run reads, `inputs`."""
    report, seen = Report(), dict[Path, Span | None]()
    kept = {path.resolve() for path in inputs}
    for path, span in places:
        whole = path.absolute()
        try:
            real = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a link to itself, a NUL
            report.add(CANNOT_WRITE.at(span, f"{str(path)!r} can name no file: {error}"))
            continue
        if not os.path.isdir(path.parent):
            report.add(no_directory(path, span))
        if {real, *real.parents} & kept and (os.path.exists(path) or real in kept):
            report.add(OVERWRITES.at(span, f"{path} is read by this run; its results would take its place"))
        if whole in seen:
            notes = [Note("the other is here", seen[whole])]
            report.add(SAME_FILE.at(span, f"two results would be written to {path}", notes=notes))
        seen[whole] = span
    report.raise_errors()


def _check_suffix(path: Path, known: tuple[str, ...], what: str, span: Span | None) -> None:
    if path.suffix.lower() not in known:
        shown = f"`{path.suffix}`" if path.suffix else "no suffix"
        message = f"{path.name} has {shown}; {what} are written as {', '.join(known)}"
        raise UNKNOWN_FORMAT.error(message, span=span, fix=f'as in `"{path.stem or "results"}{known[0]}"`')


def _json(result: Result) -> str:
    content = {"format_version": 1, "experiments": {result.name: result.to_json()}}
    return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"
