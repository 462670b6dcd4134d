"""Tracing a model for the first time and for the second, when what was found is on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from patchc import api
from patchc.bench.measure import timed
from patchc.bench.row import Bound, Row
from patchc.bench.shape import GPT2_SMALL, random_model
from patchc.bench.sweeps import Bench

CACHE = "PATCHC_CACHE"


def tracing(bench: Bench) -> Row:
    """CPU seconds of loading a module with an empty cache directory, and of loading its like again."""
    with _empty_cache():
        first, second = (_loading(random_model(bench.shape)) for _ in range(2))
    bounds = (Bound("CPU s", first, 6.0), Bound("CPU s the second time", second, 0.3))
    return Row("tracing", "", 0, first, bounds=bounds if bench.shape == GPT2_SMALL else ())


def _loading(module: nn.Module) -> float:
    return timed(lambda: api.load(module))[1]


@contextmanager
def _empty_cache() -> Generator[None]:
    """Another directory for what patchc keeps on disk, inside the block."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE]
            if before is not None:
                os.environ[CACHE] = before
