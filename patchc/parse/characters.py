"""Characters that no token has: what was probably meant, and the text read so, at the same offsets.

Knows nothing of the grammar; only of what people type.
"""

from __future__ import annotations

import unicodedata

from patchc.diagnostics import RULES, Diagnostic, Source, Span

SYNTAX = RULES.add("syntax-error", "the text is not in the language")

_QUOTES = {"'": "'", "`": "`", "\u2018": "\u2019", "\u2019": "\u2019", "\u201c": "\u201d", "\u201d": "\u201d"}
_MEANT = {
    ";": (" ", "clauses need no `;`", "put each on its own line"),
    ":": (
        " ",
        "`:` means nothing here",
        'a range is `2..5` (inclusive); a column is `clean "text"`, with a space',
    ),
    "&": ("|", "`&` joins nothing", "nodes are joined with `|`"),
    "$": (" ", "a parameter is written `${NAME}`", None),
    "!": (
        " ",
        "`!` is not part of the language",
        "compare with `<`, `<=`, `==`, `>=` or `>`; leave nodes out with `a - b`",
    ),
    "?": (" ", "`?` is not part of the language", "`x*` is any number of steps, none included"),
    "^": (" ", "`^` is not part of the language", None),
    "%": (" ", "`%` is not part of the language", "write 0.1 for ten per cent"),
    "~": (" ", "`~` is not part of the language", "what is left out is `a - b`, or `all except a`"),
    "\\": (" ", "a line needs no `\\` to go on", "line ends are white space"),
    "\u2192": (" ", "an arrow is written `->`, in two characters", "write `->`"),
    "\u2212": ("-", "this is a typographic minus", "write `-`"),
    "\u2013": ("-", "this is a dash, not a minus", "write `-`"),
    "\u2014": ("-", "this is a dash, not a minus", "write `-`"),
    "\u00d7": ("*", "this is a multiplication sign", "write `*`"),
    "\u2026": (" ", "this is an ellipsis", "a range is `2..5`, with two dots"),
}


def explain_character(source: Source, text: str, offset: int) -> tuple[Diagnostic, str]:
    """What is wrong with the character at `offset`, and `text` with it replaced; the length stays."""
    char = text[offset]
    if char == '"':
        return _unclosed_text(source, text, offset)
    if char in _QUOTES:
        return _other_quotes(source, text, offset)
    end = offset + 1
    while end < len(text) and text[end] == char:
        end += 1
    plain = "write a plain space" if unicodedata.category(char) == "Zs" else None
    instead, message, fix = _MEANT.get(char, (" ", _foreign(char), plain))
    return SYNTAX.at(Span(source, offset, end), message, fix=fix), _put(text, offset, instead.ljust(end - offset))


def _put(text: str, offset: int, instead: str) -> str:
    return text[:offset] + instead + text[offset + len(instead) :]


def _line_end(text: str, offset: int) -> int:
    end = text.find("\n", offset)
    return len(text) if end < 0 else end


def _foreign(char: str) -> str:
    if char.isalnum():
        return f"`{char}` cannot stand in a name: names have the letters a to z, digits and `_`"
    if char.isprintable() and not char.isspace():
        return f"`{char}` is not part of the language"
    name = unicodedata.name(char, "a control character").lower()
    return f"U+{ord(char):04X} ({name}) is not part of the language"


def _unclosed_text(source: Source, text: str, offset: int) -> tuple[Diagnostic, str]:
    """Read to the end of its line, as a text."""
    end = offset + len(text[offset : _line_end(text, offset)].rstrip())
    instead = '"' + " " * (end - offset - 2) + '"' if end - offset > 1 else " "
    fix = 'close it with `"`; a line break is `\\n`'
    return SYNTAX.at(Span(source, offset, end), "this text is not closed on its line", fix=fix), _put(
        text, offset, instead
    )


def _other_quotes(source: Source, text: str, offset: int) -> tuple[Diagnostic, str]:
    """Read as a text, where the closing quote stands on the same line."""
    char = text[offset]
    close = text.find(_QUOTES[char], offset + 1, _line_end(text, offset))
    end = offset + 1 if close < 0 else close + 1
    instead = " " if close < 0 else '"' + " " * (end - offset - 2) + '"'
    message = f'a text is written in straight double quotes `"`, not in {char}'
    fix = None if close < 0 else f'write `"{text[offset + 1 : close]}"`'
    return SYNTAX.at(Span(source, offset, end), message, fix=fix), _put(text, offset, instead)
