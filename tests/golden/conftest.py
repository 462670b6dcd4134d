"""`golden(case, produced)` for every golden test, and the option that rewrites what they expect."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from harness import Case, Golden, compare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write what came into the golden files")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if config.getoption("--regenerate", default=False):
        # One process: two would overwrite each other's cases of a file.
        config.option.numprocesses = 0
        config.option.dist = "no"


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Golden:
    """Compare a case's sections with what was produced, by the sections' names."""

    def check(case: Case, produced: Mapping[str, str]) -> None:
        compare(case, produced, pytestconfig.getoption("--regenerate", default=False))

    return check
