"""Where a spec's text comes from: a file, or the text itself. No torch."""

from __future__ import annotations

from pathlib import Path

from patchc.diagnostics import RULES, Source

MISSING_SPEC = RULES.add("missing-spec", "the spec file is not there or cannot be read")


def read_spec(spec: str | Path) -> tuple[Source, Path]:
    """A spec's text and the directory that its paths are relative to. A string with a line break or a brace is the text
    itself; any other is a path."""
    if isinstance(spec, str) and ("\n" in spec or "{" in spec):
        return Source("<spec>", spec), Path()
    path = Path(spec)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MISSING_SPEC.error(f"cannot read {path}: {error.strerror}") from None
    return Source(str(spec), decoded(content, str(path))), path.parent


def decoded(content: bytes, name: str) -> str:
    """The text of a spec's bytes; `name` is what an error calls them."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MISSING_SPEC.error(f"{name} is not UTF-8 text: byte {error.start} ({error.reason})") from None
