"""What every test has: one thread, models loaded once, and the option that rewrites golden files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from patchc.api import Model

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write what came into the golden files")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if config.getoption("--regenerate"):
        # One process: two would overwrite each other's cases of a file.
        config.option.numprocesses = 0
        config.option.dist = "no"


@pytest.fixture(scope="session")
def induction() -> Model:
    """The built-in two-layer model, traced once for all tests of a process: leave it as it is."""
    import patchc

    return patchc.load("induction-2l")
