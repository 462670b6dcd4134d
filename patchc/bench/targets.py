"""What each work should cost at most, on GPT-2 small's shape; a row of another shape has none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from patchc.bench.row import Bound, Row
from patchc.bench.shape import GPT2_SMALL, SETTINGS, Shape
from patchc.bench.works import (
    EDGES,
    HEAD_BY_POSITION,
    HEAD_OUT,
    HEAD_SITES,
    PATH,
    PATTERN,
    RESID_PRE,
)

TRANSFORMER_LENS = "transformer-lens"


@dataclass(frozen=True, slots=True)
class Target:
    """Counted GFLOP at most; times TransformerLens' CPU seconds at least."""

    gflop: float
    ratio: float


def _by_setting(name: str, ioi_like: Target, all_different: Target) -> dict[tuple[str, str], Target]:
    return dict(zip(((name, setting) for setting in SETTINGS), (ioi_like, all_different), strict=True))


TARGETS: dict[tuple[str, str], Target] = {
    **_by_setting(RESID_PRE.name, Target(85, 35), Target(470, 7)),
    **_by_setting(HEAD_OUT.name, Target(280, 10), Target(680, 4)),
    **_by_setting(HEAD_SITES[0].name, Target(280, 9), Target(680, 4)),
    **_by_setting(HEAD_BY_POSITION.name, Target(890, 45), Target(4750, 8)),
    **_by_setting(PATTERN.name, Target(10_400, 50), Target(27_300, 20)),
    **_by_setting(PATH.name, Target(205, 19), Target(495, 8)),
    **_by_setting(EDGES.name, Target(37_800, 17), Target(91_800, 7)),
}

LIMIT_RATIO, SMALL_LIMIT_RATIO = 1.35, 1.6
"""CPU seconds over the FLOP limit, at most; and of a sweep of fewer than `SMALL_ROWS` token rows a layer."""
SMALL_ROWS = 100
EXTRA_MB = 200.0
DIFFERENCE = 1e-4
"""Largest difference from a peer's number that counts as equal, in logits."""


def bounds(row: Row, shape: Shape, rows_a_layer: float) -> tuple[Bound, ...]:
    """A sweep's row against its targets; `rows_a_layer`: token rows that it computes in a layer, on average."""
    return tuple(_bounds(row, TARGETS.get((row.work, row.setting)), rows_a_layer)) if shape == GPT2_SMALL else ()


def _bounds(row: Row, target: Target | None, rows_a_layer: float) -> Iterator[Bound]:
    if target is not None and row.flops is not None:
        yield Bound("GFLOP", row.flops / 1e9, target.gflop)
    if target is not None and TRANSFORMER_LENS in row.ratio:
        yield Bound("x TransformerLens", row.ratio[TRANSFORMER_LENS], target.ratio, at_most=False)
    if row.limit_ratio is not None:
        yield Bound("x FLOP limit", row.limit_ratio, LIMIT_RATIO if rows_a_layer >= SMALL_ROWS else SMALL_LIMIT_RATIO)
    if row.extra_bytes is not None:
        yield Bound("MB", row.extra_bytes / 1e6, EXTRA_MB)
    if row.max_abs_diff is not None:
        yield Bound("difference", row.max_abs_diff, DIFFERENCE)
