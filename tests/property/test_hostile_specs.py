"""Hostile specs: whatever the text is, only diagnostics come out, and nothing is opened that the text does not name.

`pytest -m nightly -n0` runs twenty times as many, other ones each time, each with a limit of processor time.
"""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.hostile import FILES, KINDS, spec, survive

SEEDS = st.integers(0, 2**48)
IN_SUITE, AT_NIGHT = 1000 // len(KINDS) + 1, 24_000 // len(KINDS)
MOST_SECONDS = 15
"""Of processor time, for one text at night."""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    """A folder with some data files, and the current one."""
    found = tmp_path_factory.mktemp("hostile")
    for name, text in FILES.items():
        (found / name).write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        yield found


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=IN_SUITE, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(seed=SEEDS)
def test_only_diagnostics_come_out(kind: str, folder: Path, seed: int) -> None:
    survive(spec(Random(seed), kind), folder)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
@settings(
    max_examples=AT_NIGHT,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(seed=SEEDS)
def test_only_diagnostics_come_out_at_night(kind: str, folder: Path, seed: int) -> None:
    with limited():
        survive(spec(Random(seed), kind), folder)


@contextmanager
def limited() -> Generator[None]:
    """Fail where what is done takes longer than any text may."""

    def stop(signal: int, frame: FrameType | None) -> None:
        raise AssertionError(f"more than {MOST_SECONDS} s of processor time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
