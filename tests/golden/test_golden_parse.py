"""Specs to canonical text, and typos to diagnostics: tests/golden/parse/*.test."""

from __future__ import annotations

import pytest
from harness import Case, Golden, cases

from patchc.diagnostics import Diagnostic, PatchcError, Source
from patchc.parse import parse, print_spec


@pytest.mark.parametrize("case", cases("parse"), ids=str)
def test_parse(case: Case, golden: Golden) -> None:
    golden(case, parsed(case.input))


def parsed(text: str) -> dict[str, str]:
    try:
        return {"canonical": print_spec(parse(Source("a.patch", text)))}
    except PatchcError as error:
        return {"errors": "\n".join(map(short, error.diagnostics))}


def short(d: Diagnostic) -> str:
    """`line:column "what it is about" message`, and the fix."""
    assert d.span is not None
    line, column = d.span.source.position(d.span.start)
    about = d.span.source.text[d.span.start : d.span.end]
    return f"{line}:{column} {about!r}: {d.message}" + (f"\n    help: {d.fix}" if d.fix else "")
