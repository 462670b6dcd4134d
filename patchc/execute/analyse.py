"""Runs a program and measures it: what `patchc plan --analyze` sets beside the planned numbers."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

SAMPLE_SECONDS = 0.002


@dataclass(frozen=True, slots=True)
class Analysis:
    """Measured: FLOPs by torch's own counter; seconds; bytes that the process (or the GPU) grew by at its largest."""

    flops: int
    seconds: float
    cpu_seconds: float
    bytes: int


def analyse(work: Callable[[], Any], device: torch.device) -> Analysis:
    """Runs `work` twice: timed, and with its FLOPs counted, which is slow."""
    gc.collect()
    start, cpu = time.perf_counter(), time.process_time()
    with grown_memory(device) as grown:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    with counted_flops() as counter:
        work()
    return Analysis(counter.get_total_flops(), seconds, cpu_seconds, grown[0])


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of fused attention `q [b, h, s, d]`, whose CPU kernel torch's counter leaves out: q k' and pattern v."""
    b, h, s, d = q
    return 2 * b * h * s * k[-2] * (d + v[-1])


_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def counted_flops() -> FlopCounterMode:
    """Counts the FLOPs of what runs inside its block, CPU attention too: `get_total_flops()`."""
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


@contextmanager
def grown_memory(device: torch.device) -> Generator[list[int]]:
    """By how many bytes memory grew at most inside the block, as the one item of the list."""
    grown = [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield grown
        grown[0] = torch.cuda.max_memory_allocated(device) - before
        return
    _give_back()
    before, stop = _resident(), threading.Event()

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            grown[0] = max(grown[0], _resident() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield grown
    finally:
        stop.set()
        thread.join()


def _give_back() -> None:
    """Let the C library return what was freed before: memory that is taken from there again would not show."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> int:
    """Bytes of this process that are in memory; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    import resource

    return pages * resource.getpagesize()
