"""A spec's text in canonical layout: the same words, the same comments, other white space.

Proves each time that nothing else has changed.
"""

from __future__ import annotations

import re

from patchc.diagnostics import Source
from patchc.parse.layout import lay_out
from patchc.parse.parser import MAX_BYTES, TOO_LARGE, parse
from patchc.parse.words import lines_of

_TEXT_OR_COMMENT = re.compile(r'"[^"\\\n]*(?:\\.[^"\\\n]*)*"|(#[^\n]*)')


def format_spec(source: Source) -> str:
    """A spec in canonical layout; what is in it is returned as it is. Raises `PatchcError` with every syntax error.

    Line ends come out as `\\n`; a byte order mark goes. Texts and numbers stay as they are written.
    """
    before = parse(source)
    text = source.text.removeprefix("\ufeff")
    formatted = lay_out(*lines_of(text))
    if (size := len(formatted.encode())) > MAX_BYTES:
        message = f"this spec would have {size} bytes in canonical layout; at most {MAX_BYTES} are read"
        raise TOO_LARGE.error(message, fix="name parts of it with `let`, and put the data into a file")
    if parse(Source(source.name, formatted)) != before or _comments(formatted) != _comments(text):
        raise AssertionError(f"formatting would change the meaning of {source.name}")
    return formatted


def _comments(text: str) -> list[str]:
    """Every comment of a text that parses, in order, found without `words`."""
    return [comment.rstrip() for comment in _TEXT_OR_COMMENT.findall(text) if comment]
