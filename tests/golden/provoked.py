"""Codes that no example brings about: faults of the machine, the system or patchc itself, brought about by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from patchc.diagnostics import Diagnostic

PROVOKED: dict[str, Callable[[pytest.MonkeyPatch], tuple[Diagnostic, ...]]] = {}
