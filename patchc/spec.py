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
        return Source(str(spec), path.read_bytes().decode("utf-8")), path.parent
    except OSError as error:
        raise MISSING_SPEC.error(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise MISSING_SPEC.error(f"{path} is not UTF-8 text: byte {error.start} ({error.reason})") from None
