"""JSON whose values know where they stand, so that an error about a prompt points into its file.

Stricter than Python's own reader: no NaN, no key twice, no halves of surrogate pairs.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from patchc.diagnostics import RULES, PatchcError, Source, Span

BAD_JSON = RULES.add("bad-json", "a data file is not the JSON that it should be")

_SPACE = re.compile(r"[ \t\n\r]*")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")

Item = tuple[Any, int, int]
"""A value, and where it starts and ends."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


@dataclass(frozen=True)
class JsonText:
    """The text of a file of JSON, or of JSON lines."""

    source: Source

    def value(self, at: int, stop: int | None = None) -> tuple[Any, int]:
        """The value that starts at an offset, and where it ends, which is before `stop`. Raises `bad-json`."""
        text, base = (self.source.text, 0) if stop is None else (self.source.text[at:stop], at)
        try:
            found, end = _DECODER.raw_decode(text, at - base)
        except json.JSONDecodeError as error:
            raise self.fault(error.msg[:1].lower() + error.msg[1:], base + error.pos) from None
        except RecursionError:
            raise self.fault("the brackets are nested too deep", at) from None
        except ValueError as error:
            raise self.fault(str(error).partition(";")[0], at) from None
        if _HALF.search(text, at - base, end):
            self._check_characters(found, at, base + end)
        return found, base + end

    def _check_characters(self, found: Any, at: int, end: int) -> None:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            message = "a text holds half of a surrogate pair, which is no character"
            raise BAD_JSON.error(message, span=Span(self.source, at, end)) from None

    def items(self, at: int) -> list[Item]:
        """The items of the array that starts at an offset."""
        found: list[Item] = []
        at = self.skip(at + 1)
        while not self._is("]", at):
            value, end = self.value(at)
            found.append((value, at, end))
            at = self._next(end, "]")
        return found

    def members(self, at: int) -> dict[str, Item]:
        """The values of the object that starts at an offset, by their keys."""
        found: dict[str, Item] = {}
        at = self.skip(at + 1)
        while not self._is("}", at):
            key, end = self.value(at)
            at = self.skip(end)
            if not isinstance(key, str) or not self._is(":", at):
                raise self.fault("a key, in quotes, and a colon stand before each value", at)
            at = self.skip(at + 1)
            value, end = self.value(at)
            found[key] = (value, at, end)
            at = self._next(end, "}")
        return found

    def skip(self, at: int) -> int:
        """Where the white space at an offset ends."""
        match = _SPACE.match(self.source.text, at)
        return match.end() if match else at

    def _is(self, character: str, at: int) -> bool:
        return self.source.text[at : at + 1] == character

    def _next(self, end: int, close: str) -> int:
        """Where the next value starts, or the closing bracket."""
        at = self.skip(end)
        if self._is(close, at):
            return at
        if not self._is(",", at):
            raise self.fault(f"a comma or {close} is needed here", at)
        at = self.skip(at + 1)
        if self._is(close, at):
            raise self.fault("nothing stands after this comma", at)
        return at

    def fault(self, message: str, at: int) -> PatchcError:
        """`bad-json` at an offset."""
        end = min(at + 1, len(self.source.text))
        return BAD_JSON.error(f"this is not JSON: {message}", span=Span(self.source, min(at, end), end))
