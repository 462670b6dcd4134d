"""What every test has: one thread, models loaded once, and the option that rewrites golden files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from patchc.api import Model
    from tests.unit.commands import Run

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write what came into the golden files")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if config.getoption("--regenerate"):
        # One process: two would overwrite each other's cases of a file.
        config.option.numprocesses = 0
        config.option.dist = "no"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What patchc keeps on disk stays out of the user's own cache directory; the processes that share the tests share
    it, so that a model is traced once for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"
    os.environ["PATCHC_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def verifying() -> None:
    """The rules of programs are checked after each pass of the optimiser."""
    from patchc import optimise

    optimise.verifying = True


@pytest.fixture(scope="session")
def induction() -> Model:
    """The built-in two-layer model, traced once for all tests of a process: leave it as it is."""
    import patchc

    return patchc.load("induction-2l")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, induction: Model) -> Run:
    """`patchc ...` in an empty directory; the built-in model is not traced anew for each."""
    from patchc import api, cli
    from tests.unit import commands

    load = api.load_model
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        api, "load_model", lambda name, **kw: induction.loaded if name == "induction-2l" else load(name, **kw)
    )

    def command(*arguments: str) -> commands.Ran:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return commands.Ran(int(stopped.value.code or 0), captured.out, captured.err)

    return command
