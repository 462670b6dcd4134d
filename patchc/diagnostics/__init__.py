"""Diagnostics are data: a code, a place and words. Drawing them is `diagnostics.render`'s work.

Below every other stage; knows nothing of any of them. Stages collect diagnostics; only the api and the CLI raise.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property


@dataclass(frozen=True)
class Source:
    """A spec's text and the name it is shown under. Offsets count code points; lines and columns count from 1."""

    name: str
    text: str

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *(i + 1 for i, c in enumerate(self.text) if c == "\n")]

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of an offset."""
        line = bisect.bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def line(self, number: int) -> str:
        """The text of a line, without its end."""
        start = self._starts[number - 1]
        end = self._starts[number] if number < len(self._starts) else len(self.text)
        return self.text[start:end].rstrip("\r\n")


@dataclass(frozen=True, slots=True)
class Span:
    """Where something stands in a spec: offsets `start` (included) to `end` (excluded)."""

    source: Source
    start: int
    end: int


class Severity(StrEnum):
    """How bad a diagnostic is; only an `ERROR` stops the work."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Note:
    """A further remark of a diagnostic, with the other place involved where there is one."""

    message: str
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One thing to tell the user. `message` is true, and enough, alone.

    `fix` says what to do, as a phrase that can stand after `help:`: lower case, no full stop. What is to be pasted
    stands in it in backticks, exactly as it is to be written; a near match is ``did you mean `end`?`` (see `nearest`).
    """

    code: str
    message: str
    span: Span | None = None
    severity: Severity = Severity.ERROR
    notes: tuple[Note, ...] = ()
    fix: str | None = None
    exit: int = 1

    @property
    def is_error(self) -> bool:
        return self.severity is Severity.ERROR

    def at(self, span: Span | None) -> Diagnostic:
        """The same, with a place where it had none."""
        return self if self.span is not None else replace(self, span=span)


@dataclass(frozen=True, slots=True)
class Rule:
    """A registered code: `exit` is 1 where the spec or its data is at fault, 3 where the run or the model is."""

    code: str
    summary: str
    severity: Severity = Severity.ERROR
    exit: int = 1

    def at(self, span: Span | None, message: str, *, fix: str | None = None, notes: Iterable[Note] = ()) -> Diagnostic:
        """A diagnostic of this rule at a place."""
        return Diagnostic(self.code, message, span, self.severity, tuple(notes), fix, self.exit)

    def error(self, message: str, *, fix: str | None = None, span: Span | None = None) -> PatchcError:
        """An exception with one diagnostic of this rule, for the caller to raise."""
        return PatchcError([self.at(span, message, fix=fix)])


@dataclass
class Registry:
    """Every code and what it means. A code is registered once and never gets a second meaning."""

    rules: dict[str, Rule] = field(default_factory=dict[str, Rule])

    def add(self, code: str, summary: str, severity: Severity = Severity.ERROR, exit: int = 1) -> Rule:
        if code in self.rules:
            raise ValueError(f"diagnostic code {code!r} is registered twice")
        rule = self.rules[code] = Rule(code, summary, severity, exit)
        return rule

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules.values())


RULES = Registry()


class PatchcError(Exception):
    """Diagnostics that stop the work. The CLI prints them; Python code catches this one class."""

    def __init__(self, diagnostics: Iterable[Diagnostic]):
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join(f"{d.severity}[{d.code}]: {d.message}" for d in self.diagnostics))

    @property
    def exit(self) -> int:
        """The process's exit status: the highest of the errors'."""
        return max((d.exit for d in self.diagnostics if d.is_error), default=1)

    def at(self, span: Span | None) -> PatchcError:
        """The same, with a place for what had none."""
        return PatchcError(d.at(span) for d in self.diagnostics)


class Report:
    """Collects the diagnostics of a stage, each once, in the order in which they were found."""

    def __init__(self) -> None:
        self.diagnostics: list[Diagnostic] = []
        self._seen: set[Diagnostic] = set()

    def add(self, diagnostic: Diagnostic) -> None:
        if diagnostic not in self._seen:
            self._seen.add(diagnostic)
            self.diagnostics.append(diagnostic)

    @property
    def has_errors(self) -> bool:
        return any(d.is_error for d in self.diagnostics)

    def raise_errors(self) -> None:
        """Raise `PatchcError` with everything collected if there is an error among it."""
        if self.has_errors:
            raise PatchcError(self.diagnostics)


def closest(name: str, names: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None."""
    return next(iter(difflib.get_close_matches(name, list(names), 1, 0.6)), None)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The `fix` for a name that was probably meant to be one of `names`, or None."""
    found = closest(name, names)
    return None if found is None else f"did you mean `{found}`?"
