"""Characters that no token has: what was probably meant, and the text read so, at the same offsets.

Knows nothing of the grammar; only of what people type.
"""

from __future__ import annotations

import re
import unicodedata

from patchc.diagnostics import RULES, Diagnostic, Source, Span

SYNTAX = RULES.add("syntax-error", "the text is not in the language")

_DOUBLE = '"\u201c\u201d\u201e\u00ab\u00bb'
_SINGLE = "\u2018\u2019"
_QUOTES = {"'": "'", "`": "`", **dict.fromkeys(_SINGLE, _SINGLE), **dict.fromkeys(_DOUBLE[1:], _DOUBLE)}
"""What may close a text that begins with each; word processors mix them."""
_WORDS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|[\u201c\u201d\u201e][^"\u201c\u201d\n]*|\'[^\'\n]*\'|#[^\n]*|//[^\n]*')
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
    if char == ":" and (found := _colon(source, text, offset)):
        return found
    end = offset + 1
    while end < len(text) and text[end] == char:
        end += 1
    plain = "write a plain space" if unicodedata.category(char) == "Zs" else None
    instead, message, fix = _MEANT.get(char, (" ", _foreign(char), plain))
    return SYNTAX.at(Span(source, offset, end), message, fix=fix), _put(text, offset, instead.ljust(end - offset))


def slashed_comments(source: Source, most: int) -> tuple[str, list[Diagnostic]]:
    """The text without comments that start with `//`, and a diagnostic for each, at most `most`."""
    text, found = source.text, list[Diagnostic]()
    for match in _WORDS.finditer(source.text):
        if match[0].startswith("//") and len(found) < most:
            start, end = match.span()
            text = _put(text, start, " " * (end - start))
            message = "a comment starts with `#`, not with `//`"
            fix = f"write `# {match[0].lstrip('/').strip()}`"
            found.append(SYNTAX.at(Span(source, start, start + 2), message, fix=fix))
    return text, found


def _colon(source: Source, text: str, offset: int) -> tuple[Diagnostic, str] | None:
    """`metric d: ...`, and Python's slices, which are explained once for their brackets."""
    start = text.rfind("\n", 0, offset) + 1
    if match := re.search(r"\b(metric|let)\s+\w+\s*$", text[start:offset]):
        message = f"`{match[1]}` defines its name with `=`"
        return SYNTAX.at(Span(source, offset, offset + 1), message, fix="write `=`"), _put(text, offset, "=")
    opening, closing = text.rfind("[", start, offset), text.find("]", offset, _line_end(text, offset))
    if opening < 0 or closing < 0 or "]" in text[opening:offset]:
        return None
    items = text[opening + 1 : closing].split(",")
    read = ",".join("*".ljust(len(item)) if ":" in item else item for item in items)
    fixed = ", ".join(_slice(item.strip()) for item in items)
    message = "`:` makes no range: a range is `0..2`, its end included, and every index is `*`"
    span = Span(source, opening, closing + 1)
    return SYNTAX.at(span, message, fix=f"write `[{fixed}]`"), _put(text, opening + 1, read)


def _slice(item: str) -> str:
    """Python's slice with patchc's ends."""
    first, colon, last = (part.strip() for part in item.partition(":"))
    if not colon:
        return item
    if not last:
        return f"{first}.." if first not in ("", "0") else "*"
    end = str(int(last) - 1) if last.isdecimal() and len(last) < 10 and int(last) else f"{last} - 1"
    return f"{first or '0'}..{end}"


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
    closing = (i for i in range(offset + 1, _line_end(text, offset)) if text[i] in _QUOTES[char])
    close = next(closing, -1)
    end = offset + 1 if close < 0 else close + 1
    instead = " " if close < 0 else '"' + " " * (end - offset - 2) + '"'
    message = f'a text is written in straight double quotes `"`, not in {char}'
    fix = None if close < 0 else f'write `"{text[offset + 1 : close]}"`'
    return SYNTAX.at(Span(source, offset, end), message, fix=fix), _put(text, offset, instead)
