"""Where a spec's text comes from: a file, or the text itself. No torch."""

from __future__ import annotations

from pathlib import Path

from patchc.diagnostics import RULES, PatchcError, Source, Span, closest

MISSING_SPEC = RULES.add("missing-spec", "the spec file is not there or cannot be read")
NOT_TEXT = RULES.add("not-utf8", "a file is not text in UTF-8")


def read_spec(spec: str | Path) -> tuple[Source, Path]:
    """A spec's text and the directory that its paths are relative to. A string with a line break or a brace is the text
    itself; any other is a path."""
    if isinstance(spec, str) and ("\n" in spec or "{" in spec):
        return Source("<spec>", spec), Path()
    path = Path(spec)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise MISSING_SPEC.error(f"cannot read {path}: {error.strerror}", fix=neighbour(path)) from None
    return Source(str(spec), decoded(content, str(path))), path.parent


def decoded(content: bytes, name: str) -> str:
    """The text of a spec's bytes; `name` is what an error calls them."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_text(name, error) from None


def neighbour(path: Path) -> str | None:
    """The `fix` for a file that is not there: one of nearly its name in the same directory."""
    try:
        names = [] if path.exists() else sorted(p.name for p in path.parent.iterdir())
    except (OSError, ValueError):  # no directory that can be read, or no name that a file can have
        return None
    near = closest(path.name, names)
    return f"did you mean `{near}`?" if near else None


def not_text(name: str, error: UnicodeDecodeError, span: Span | None = None) -> PatchcError:
    """The error for a file that cannot be decoded, with the line and the byte at which it stops being UTF-8."""
    line = error.object.count(b"\n", 0, error.start) + 1
    message = f"{name} is not UTF-8 text: line {line} has the byte 0x{error.object[error.start]:02X}"
    return NOT_TEXT.error(message, fix="save it in the encoding UTF-8", span=span)
