"""What is done with an experiment's results: files that are saved, pictures and tables that are shown.

Only names and kinds are looked at; `report` writes the files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

from patchc.diagnostics import RULES, nearest
from patchc.ir.experiment import Save, Show
from patchc.parse import tree
from patchc.resolve.scope import Scope

UNKNOWN_PICTURE = RULES.add("unknown-picture", "`show` with a kind of picture that does not exist")
UNKNOWN_SUFFIX = RULES.add("unknown-suffix", "a file name whose suffix names no format that can be written")
NOTHING_TO_DRAW = RULES.add("nothing-to-draw", "`show` with a kind of picture that the results have no points for")

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")
TABLE_SUFFIXES = (".txt", ".md", ".html", ".csv")
RESULT_SUFFIXES = (".json", ".csv", ".parquet")
SHOWN = {
    "heatmap": PICTURE_SUFFIXES,
    "bar": PICTURE_SUFFIXES,
    "line": PICTURE_SUFFIXES,
    "table": TABLE_SUFFIXES,
}
"""The kinds of `show`, and the suffixes of the files that each is written to."""


def save(scope: Scope, node: tree.Save) -> Save:
    """A `save` clause. Raises `unknown-suffix`."""
    return Save(_file(scope, node.file, RESULT_SUFFIXES), node.span)


def show(scope: Scope, node: tree.Show) -> Show:
    """A `show` clause. Raises `unknown-picture`, `unknown-suffix`."""
    kind = node.kind.text
    if kind not in SHOWN:
        message = f"no picture {kind!r}; there is {', '.join(SHOWN)}"
        raise UNKNOWN_PICTURE.error(message, fix=nearest(kind, SHOWN), span=node.kind.span)
    return Show(kind, _file(scope, node.file, SHOWN[kind]) if node.file else None, node.span)


def check_drawn(shown: Show, shape: Sequence[int]) -> None:
    """A line takes two points at least; `shape` is that of the results, dims over prompts included."""
    if shown.kind == "line" and max(shape, default=1) < 2:
        what = "a single number" if not shape else "one cell along each dim"
        message = f"there is {what} here, and a line takes two points"
        raise NOTHING_TO_DRAW.error(message, fix="write `show table`", span=shown.span)


def _file(scope: Scope, file: tree.Text | tree.Parameter, suffixes: Sequence[str]) -> str:
    name = scope.text(file)
    if PurePath(name).suffix.lower() in suffixes:
        return name
    message = f"{name!r} names no format that can be written here; the suffixes are {' '.join(suffixes)}"
    raise UNKNOWN_SUFFIX.error(message, span=file.span)
