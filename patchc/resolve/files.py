"""Opening the files that a spec names: regular files of bounded size, and none that runs code when it is read.

What is in them is for `data_files`, `tables` and `tensors`.
"""

from __future__ import annotations

import stat
from pathlib import Path

from patchc.diagnostics import RULES, Span
from patchc.spec import neighbour, not_text

MISSING_FILE = RULES.add("missing-file", "a file that the spec names is not there or cannot be read")
UNSAFE_FILE = RULES.add("unsafe-file", "a file that can run code when it is read, such as a pickle")
FILE_TOO_LARGE = RULES.add("file-too-large", "a data file of more bytes or prompts than are read")

MAX_BYTES = 256 * 2**20
"""The largest data file that is read."""

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
_PROTOCOLS = range(2, 6)
_START = 8


def open_checked(path: Path, name: str, span: Span | None, limit: int | None = MAX_BYTES) -> bytes:
    """The first bytes of a file, once it is known to be a regular one, not too large, and no pickle.

    Raises `missing-file`, `file-too-large` or `unsafe-file`.
    """
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            what = "a directory" if stat.S_ISDIR(info.st_mode) else "no regular file"
            raise MISSING_FILE.error(f"{name} cannot be read: it is {what}", span=span)
        if limit is not None and info.st_size > limit:
            message = f"{name} has {info.st_size / 2**20:,.0f} MiB; at most {limit / 2**20:,.0f} MiB are read"
            raise FILE_TOO_LARGE.error(message, fix="split it, or keep the prompts that are used", span=span)
        with path.open("rb") as file:
            start = file.read(_START)
    except ValueError as error:  # a NUL in the name
        raise MISSING_FILE.error(f"{name!r} is no file name: {error}", span=span) from None
    except OSError as error:
        fix = neighbour(path) or (None if Path(name).is_absolute() else "its path is relative to the spec's directory")
        raise MISSING_FILE.error(f"{name} cannot be read: {error.strerror}", fix=fix, span=span) from None
    _refuse_code(start, name, span)
    return start


def read_text(path: Path, name: str, span: Span | None) -> str:
    """A file's text in UTF-8, a byte order mark left off. Raises what `open_checked` does."""
    open_checked(path, name, span)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_text(name, error, span) from None
    except OSError as error:
        raise MISSING_FILE.error(f"{name} cannot be read: {error.strerror}", span=span) from None


def _refuse_code(start: bytes, name: str, span: Span | None) -> None:
    """What `pickle` and `torch.save` write is never opened, whatever the file is called."""
    is_pickle = start[:1] == _PICKLE and start[1:2] != b"" and start[1] in _PROTOCOLS
    if is_pickle or start.startswith(_ZIP):
        what = "a pickle" if is_pickle else "a zip archive, such as torch.save writes,"
        message = f"{name} is {what} and is not opened: reading it could run code"
        fix = "save data as .jsonl, .csv or .parquet, tensors as .safetensors"
        raise UNSAFE_FILE.error(message, fix=fix, span=span)
