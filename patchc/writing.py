"""A file written whole or not at all: beside its place, then moved there. What is in it is the caller's matter."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from patchc.diagnostics import RULES, Diagnostic, PatchcError, Span

NO_DIRECTORY = RULES.add("no-such-directory", "a file should be written into a directory that does not exist")
CANNOT_WRITE = RULES.add("cannot-write", "the system refused to write a file", exit=3)


def write_whole(path: Path, write: Callable[[Path], object], span: Span | None = None) -> Path:
    """Let `write` fill a new file beside `path`, then put it in its place; a failure leaves nothing."""
    if not os.path.isdir(path.parent):
        raise PatchcError([no_directory(path, span)])
    if os.path.isdir(path):
        raise CANNOT_WRITE.error(f"{path} is a directory", span=span)
    # The suffix stays at the end: the writers look at it. The point hides the file while it is not whole.
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise CANNOT_WRITE.error(f"{path} cannot be written: {error.strerror or error}", span=span) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def no_directory(path: Path, span: Span | None) -> Diagnostic:
    """The diagnostic for a file whose directory is not there."""
    return NO_DIRECTORY.at(span, f"there is no directory {path.parent} for {path.name}")
