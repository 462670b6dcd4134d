"""Rows as JSON, as a table in the terminal and as one in Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import patchc
from patchc.bench.row import Bound, Row


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Plain data. What the rows have no key for is in `details`, an object a row in the same order."""
    return {
        "format_version": 1,
        "rows": [_row(row) for row in rows],
        "details": [_details(row) for row in rows],
        "machine": machine(),
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "work": row.work,
        "setting": row.setting,
        "cells": row.cells,
        "cpu_s": row.cpu_s,
        "extrapolated": row.extrapolated,
        "peers": {n: {"cpu_s": p.cpu_s, "extrapolated": p.extrapolated} for n, p in row.peers.items()},
        "ratio": row.ratio,
        "flops": row.flops,
        "limit_ratio": row.limit_ratio,
        "extra_bytes": row.extra_bytes,
        "max_abs_diff": row.max_abs_diff,
        "largest_effect": row.largest_effect,
    }


def _details(row: Row) -> dict[str, Any]:
    return {
        "part": row.part,
        "planning_s": row.planning_s,
        "wall_s": row.wall_s,
        "peers_wall_s": {n: p.wall_s for n, p in row.peers.items()},
        "planned_flops": row.planned_flops,
        "worlds_flops": row.worlds_flops,
        "gflops": row.gflops,
        "compared": row.compared,
        "bounds": [{**asdict(b), "met": b.met} for b in row.bounds],
        "notes": list(row.notes),
    }


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"patchc": patchc.__version__, **_versions("torch", "transformers", "transformer-lens")},
    }


def _versions(*names: str) -> dict[str, str]:
    """Of the packages that are installed."""
    found: dict[str, str] = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _processor() -> str:
    """The processor's name, where the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


COLUMNS = ("work", "setting", "cells", "CPU s", "peers' CPU s", "GFLOP", "targets", "difference / effect")


def cells_of(row: Row) -> list[str]:
    """A row's texts, a column each; a time with `~` was extrapolated."""
    return [
        row.title,
        row.setting,
        f"{row.cells:,}",
        _seconds(row.cpu_s, row.extrapolated),
        "\n".join(f"{n} {_seconds(p.cpu_s, p.extrapolated)} = {row.ratio[n]:.3g}x" for n, p in row.peers.items()),
        "" if row.flops is None else f"{row.flops / 1e9:,.4g}",
        "\n".join(map(bound_text, row.bounds)),
        "" if row.max_abs_diff is None else f"{row.max_abs_diff:.1e} / {row.largest_effect or 0:.2g}",
    ]


def _seconds(seconds: float, extrapolated: bool) -> str:
    return f"{'~' if extrapolated else ''}{seconds:,.3g} s"


def bound_text(bound: Bound) -> str:
    """`met 1.2 x FLOP limit (at most 1.35)`."""
    sense = "at most" if bound.at_most else "at least"
    return f"{'met' if bound.met else 'NOT'} {bound.measured:,.4g} {bound.unit} ({sense} {bound.limit:,.6g})"


def markdown(rows: Sequence[Row]) -> str:
    """The table for a README."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += ["| " + " | ".join(c.replace("\n", "; ") for c in cells_of(row)) + " |" for row in rows]
    return "\n".join([*lines, "", *_below(rows)])


def _below(rows: Sequence[Row]) -> list[str]:
    """The notes under the table."""
    m = machine()
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    lines = [f"Measured on {m['processor']}, {m['cores']} cores, {m['system']}, Python {m['python']}; {versions}."]
    lines.append("GFLOP are a sweep's own, without the worlds' runs; the FLOP limit is of both, as the seconds are.")
    noted = [row for row in rows if row.notes]
    return lines + [f"- {row.title}{', ' if row.setting else ''}{row.setting}: {'; '.join(row.notes)}" for row in noted]


def print_table(rows: Sequence[Row], console: Any) -> None:
    """The table in a terminal; `console` is rich's."""
    from rich.table import Table

    table = Table(*COLUMNS, show_lines=True)
    for row in rows:
        table.add_row(*(text.replace("[", r"\[") for text in cells_of(row)))
    console.print(table)
    for line in _below(rows):
        console.print(line, highlight=False, markup=False)
