"""How many bytes are free on a device; the system's own word, which changes from moment to moment."""

from __future__ import annotations

from pathlib import Path

import torch


def room(device: torch.device) -> int:
    """Bytes that can still be had there; very many where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return 1 << 62
