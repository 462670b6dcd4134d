"""A spec's text in canonical layout: the same words, the same comments, other white space.

Proves each time that nothing else has changed.
"""

from __future__ import annotations

from patchc.diagnostics import Source
from patchc.parse.layout import lay_out
from patchc.parse.parser import parse
from patchc.parse.words import comments_of, lines_of


def format_spec(source: Source) -> str:
    """A spec in canonical layout; what is in it is returned as it is. Raises `PatchcError` with every syntax error.

    Line ends come out as `\\n`; a byte order mark goes. Texts and numbers stay as they are written.
    """
    before = parse(source)
    text = source.text.removeprefix("\ufeff")
    formatted = lay_out(*lines_of(text))
    if parse(Source(source.name, formatted)) != before or comments_of(formatted) != comments_of(text):
        raise AssertionError(f"formatting would change the meaning of {source.name}")
    return formatted
