"""How much memory a run may take unless it is told: three quarters of what is free on the device as it starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

UNKNOWN = 2 << 30
"""Bytes, where no part of the system says what is free."""

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def default_budget(device: torch.device) -> int:
    """Bytes beyond the model: three quarters of what is free."""
    return max(1, free_memory(device) * 3 // 4)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([*_of_machine(), *_of_groups()], default=UNKNOWN))


def _of_machine() -> Iterator[int]:
    """What the whole machine has free."""
    available = _fields(PROC / "meminfo").get("MemAvailable:")
    if available is not None:
        yield available * 1024
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        yield os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _of_groups() -> Iterator[int]:
    """What the process's control groups leave it, and those around them: a container's or a batch job's limit."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left(CGROUP, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _left(CGROUP / "memory", path, *names)


def _left(root: Path, path: str, limit: str, used: str, reclaimed: str) -> Iterator[int]:
    """In a container the group's own folder is mounted as `root`, whatever `path` says."""
    here = root / path.strip("/")
    for folder in dict.fromkeys([here, *here.parents, root]):
        if folder.is_relative_to(root) and (most := _number(folder / limit)) is not None:
            # What the group's files hold in memory is given up when the memory is needed.
            files = _fields(folder / "memory.stat").get(reclaimed, 0)
            yield most - max(0, (_number(folder / used) or 0) - files)


def _fields(path: Path) -> dict[str, int]:
    """A file of lines `NAME NUMBER ...`."""
    words = (line.split() for line in _text(path).splitlines())
    return {w[0]: int(w[1]) for w in words if len(w) > 1 and w[1].isdecimal()}


def _number(path: Path) -> int | None:
    """A file of one number; None where it is not there, or is `max`."""
    text = _text(path).strip()
    return int(text) if text.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
