"""What planning does for a cell, counted: it must not grow with the model's depth, and must leave no garbage."""

from __future__ import annotations

import gc
from typing import Any

import pytest

import patchc
from patchc.ir.ops import VariantId
from patchc.lower.fold import Fold
from patchc.pipeline import without_collection
from tests.models import gpt2

SPEC = """
metric diff = logit(answer) - logit(wrong)
experiment e {{ for {loop} run clean patch {patch} with corrupt measure diff }}
"""
DATA: dict[str, Any] = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "corrupt": [[1, 2, 9, 4], [5, 6, 10, 8]],
    "answer": [11, 12],
    "wrong": [13, 14],
}
SWEEPS = {
    "heads at positions": ("h in head, p in positions", "node h @ p", 1),
    "entries of patterns": ("h in head, d in positions, s in positions", "node h.pattern[d, s]", 2),
    "edges": ("w in writers, r in readers", "edge w -> r", 1),
}
"""With the nodes that are looked at in a cell beside those that start in it."""


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("n_layer", [2, 7])
def test_nodes_looked_at_in_a_cell(sweep: str, n_layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = 0
    variant = Fold._variant  # pyright: ignore[reportPrivateUsage]

    def counted(self: Fold, index: int, m: int, members: int) -> VariantId:
        nonlocal looked_at
        looked_at += 1
        return variant(self, index, m, members)

    monkeypatch.setattr(Fold, "_variant", counted)
    loop, patch, expected = SWEEPS[sweep]
    compiled = patchc.load(gpt2(n_layer=n_layer)).compile(SPEC.format(loop=loop, patch=patch), DATA)
    cells = compiled.programs[0].experiment.cells
    starts = len({cell.patches[0].path.parts[0] for cell in cells})  # type: ignore[union-attr]
    assert starts <= looked_at <= expected * len(cells) + starts


def garbage(model: patchc.Model, loop: str) -> tuple[int, int]:
    """Cells, and objects that only the garbage collector can take away."""
    gc.collect()
    with without_collection():
        compiled = model.compile(SPEC.format(loop=loop, patch="edge w -> r"), DATA)
        return len(compiled.programs[0].roots), gc.collect()


def test_cells_leave_no_garbage() -> None:
    model = patchc.load(gpt2(n_layer=5))
    few, many = garbage(model, "w in writers, r in mlp[4]"), garbage(model, "w in writers, r in readers")
    assert many[0] > few[0] + 300
    assert many[1] - few[1] < many[0] - few[0]


def test_collection_goes_on_after_an_error() -> None:
    with pytest.raises(RuntimeError), without_collection():
        raise RuntimeError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
