"""The specs of `examples/transformer_lens` as they stand: written canonically, and right by plain forward hooks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import patchc
from patchc.diagnostics import Source
from patchc.parse import format_spec
from tests.parity.measure import EXAMPLES

SPECS = sorted(EXAMPLES.glob("*.patch"))


@functools.cache
def model() -> patchc.Model:
    return patchc.load("ioi-tiny")


@pytest.mark.parametrize("spec", SPECS, ids=lambda path: path.stem)
def test_spec(spec: Path) -> None:
    text = spec.read_text(encoding="utf-8")
    assert format_spec(Source(spec.name, text)) == text
    assert text.startswith(f"# transformer_lens.patching.{_function(spec)}: ")
    compiled = model().compile(spec)
    assert not compiled.warnings
    for result in compiled.run(check=4, progress=False, write=False).values():
        assert result.passes == 1
        assert result.check is not None
        assert result.check.max_abs_diff <= 1e-4


def _function(spec: Path) -> str:
    return spec.stem if spec.stem == "generic_activation_patch" else f"get_act_patch_{spec.stem}"
