"""The parity table: rows as Markdown, a line for each function and model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tests.parity.measure import TOLERANCE, Row, Side

HEAD = (
    "| function of transformer_lens.patching | model | equal | the spec's largest difference | the function's "
    "| the numbers' range | CPU of TransformerLens / spec | / function |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def markdown(rows: Sequence[Row]) -> str:
    """All rows, and a last line that counts them."""
    equal = sum(row.equal for row in rows)
    refused = sum(row.refused is not None for row in rows)
    worst = max(side.difference for row in rows for side in row.sides)
    summary = (
        f"{len(rows)} rows, {equal} of them equal (within {TOLERANCE:g}); the largest difference is {worst:.1e}. "
        f"TransformerLens refuses {refused}, which are held against forward hooks."
    )
    return "\n".join((HEAD, *map(_line, rows), "", summary))


def _line(row: Row) -> str:
    effect = "" if row.effect is None else f"{row.effect:.3g}"
    cells = (
        _name(row), row.model, _verdict(row), _difference(row.spec), _difference(row.function), effect,
        _ratio(row, row.spec), _ratio(row, row.function),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _name(row: Row) -> str:
    variant = f" ({row.work.variant})" if row.work.variant else ""
    return f"`{row.work.function}`{variant}"


def _verdict(row: Row) -> str:
    said = "yes" if row.equal else "no: " + "; ".join(side.fault or "numbers" for side in row.sides if not side.equal)
    if row.refused is None:
        return said
    first = row.refused.split(". ")[0].replace("|", "\\|")
    return f"TransformerLens refuses ({first}); to hooks: {said}"


def _difference(side: Side | None) -> str:
    return "" if side is None else f"{side.difference:.1e}"


def _ratio(row: Row, side: Side | None) -> str:
    """CPU seconds of TransformerLens over patchc's; nothing where a call is too short to be timed."""
    if side is None or row.effect is None or not math.isfinite(row.seconds / side.seconds):
        return ""
    return f"{row.seconds / side.seconds:.1f}"
