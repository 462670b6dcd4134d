"""Specs to their canonical layout: tests/golden/format/*.test."""

from __future__ import annotations

import pytest
from harness import Case, Golden, cases

from patchc.diagnostics import Source
from patchc.parse import format_spec


@pytest.mark.parametrize("case", cases("format"), ids=str)
def test_format(case: Case, golden: Golden) -> None:
    golden(case, {"formatted": format_spec(Source("a.patch", case.input))})
