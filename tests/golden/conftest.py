"""`golden(case, produced)` for every golden test."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from harness import Case, Golden, compare


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Golden:
    """Compare a case's sections with what was produced, by the sections' names."""

    def check(case: Case, produced: Mapping[str, str]) -> None:
        compare(case, produced, pytestconfig.getoption("--regenerate"))

    return check
