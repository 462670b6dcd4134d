"""What is free: the machine's memory, and the limits of the control groups around the process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from patchc import free_memory
from patchc.free_memory import UNKNOWN, default_budget
from patchc.free_memory import free_memory as free

CPU = torch.device("cpu")
GIB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes a system's files: `proc/...` and `cgroup/...`."""
    monkeypatch.setattr(free_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path / "cgroup")

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="ascii")

    return write


MACHINE = {"proc/meminfo": f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {8 << 20} kB\n"}


def test_the_default_is_three_quarters_of_what_is_free(system: Any) -> None:
    system(MACHINE)
    assert free(CPU) == 8 * GIB
    assert default_budget(CPU) == 6 * GIB


@pytest.mark.parametrize("inside", ["/job/step", "/"])
@pytest.mark.parametrize("limited", ["", "job/", "job/step/"])
def test_the_tightest_group_counts(system: Any, limited: str, inside: str) -> None:
    system(MACHINE)
    system({"proc/self/cgroup": f"0::{inside}\n", "cgroup/job/memory.max": "max\n"})
    group = {"memory.max": 4 * GIB, "memory.current": 3 * GIB, "memory.stat": f"anon 1\ninactive_file {GIB}\n"}
    system({f"cgroup/{limited}{name}": f"{value}\n" for name, value in group.items()})
    assert free(CPU) == (2 * GIB if limited == "" or inside != "/" else 8 * GIB)


def test_groups_of_the_first_version(system: Any) -> None:
    system(MACHINE)
    system({"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n"})
    group = {"memory.limit_in_bytes": 2 * GIB, "memory.usage_in_bytes": GIB, "memory.stat": "total_inactive_file 0\n"}
    system({f"cgroup/memory/x/{name}": f"{value}\n" for name, value in group.items()})
    assert free(CPU) == GIB
    system({"cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712\n"})
    assert free(CPU) == 8 * GIB


def test_a_group_over_its_limit_leaves_nothing_and_a_pass_still_runs(system: Any) -> None:
    system(MACHINE)
    system({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "5\n", "cgroup/memory.current": "9\n"})
    assert free(CPU) == 0
    assert default_budget(CPU) == 1


def test_a_system_that_says_nothing(system: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    system({"proc/self/cgroup": "0::/\n", "cgroup/memory.max": "no number"})
    monkeypatch.setattr(free_memory.os, "sysconf_names", {"SC_AVPHYS_PAGES": 1})
    monkeypatch.setattr(free_memory.os, "sysconf", lambda name: {"SC_AVPHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}[name])
    assert free(CPU) == 40960
    monkeypatch.setattr(free_memory.os, "sysconf_names", {})
    assert free(CPU) == UNKNOWN


def test_a_gpu_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: GIB)
    assert free(torch.device("cuda")) == 7 * GIB  # what torch has reserved and not given out is free too
