"""CPU seconds, memory, FLOPs, and the speed of a matrix product, on the machine as it is at the moment."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

from patchc.execute.analyse import counted_flops, grown_memory

T = TypeVar("T")
P = TypeVar("P")

PRODUCT = (960, 768, 3072)
"""Rows and columns of the matrix product whose speed is the limit."""


@dataclass(frozen=True, slots=True)
class Used:
    """What a piece of work took: FLOPs as counted, and the most bytes by which the process grew."""

    flops: int
    bytes: int


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the CPU seconds of this process that it took."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def wall_timed(work: Callable[[], T], threads: int) -> tuple[T, float]:
    """What `work` gives, and the seconds that it took with so many threads."""
    with n_threads(threads):
        start = time.perf_counter()
        return work(), time.perf_counter() - start


@contextmanager
def n_threads(count: int) -> Generator[None]:
    """Torch has `count` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def product_gflops(repeats: int = 8) -> float:
    """GFLOP/s, by CPU time, of a float32 matrix product; the median of some."""
    rows, inner, columns = PRODUCT
    x, w = torch.ones(rows, inner), torch.ones(inner, columns)
    out = torch.empty(rows, columns)
    seconds = [timed(lambda: torch.mm(x, w, out=out))[1] for _ in range(repeats)]
    return 2 * rows * inner * columns / statistics.median(seconds) / 1e9


def with_use(prepare: Callable[[], P], work: Callable[[P], T]) -> tuple[P, T, Used]:
    """What both give, with the FLOPs of `work` counted and the memory of both watched; slower than without."""
    with grown_memory(torch.device("cpu")) as grown:
        prepared = prepare()
        with counted_flops() as counter:
            found = work(prepared)
    return prepared, found, Used(counter.get_total_flops(), grown[0])
