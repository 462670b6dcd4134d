"""`golden(case, produced)` for every golden test, and `folder` for those that run examples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness import Case, Golden, compare

from patchc import api


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Golden:
    """Compare a case's sections with what was produced, by the sections' names."""

    def check(case: Case, produced: Mapping[str, str]) -> None:
        compare(case, produced, pytestconfig.getoption("--regenerate"))

    return check


_LOAD = api.load_model


@cache
def _loaded(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    return _LOAD(name, **dict(options))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to run examples in; a built-in model is traced once for all of them."""

    def load(name: Any, **options: Any) -> Any:
        given = tuple((k, v) for k, v in options.items() if v is not None and k != "base")
        return _loaded(name, given) if name in ("ioi-tiny", "induction-2l") else _LOAD(name, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load_model", load)
    return tmp_path
