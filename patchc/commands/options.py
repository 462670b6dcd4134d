"""The options that several commands have, and how their values are read. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

Parameters = dict[str, str | int | float]
"""The values of `${NAME}`."""


def cells_to_check(check: str | None) -> bool | int | str:
    """What `--check` asks for, as `Compiled.run` takes it."""
    if check is None:
        return False
    if check in ("all", "sample"):
        return check
    if check.isdecimal() and int(check):
        return int(check)
    raise click.UsageError(f"--check takes nothing, `all` or a number of cells, not {check!r}")


def read_parameters(settings: Sequence[str]) -> Parameters:
    """`NAME=VALUE` several times, as values by name."""
    from patchc.resolve.parameters import read_literal

    found: Parameters = {}
    for setting in settings:
        name, equal, value = setting.partition("=")
        if not equal:
            raise click.BadParameter(f"{setting!r} gives no value; write --set {name or 'NAME'}=VALUE")
        if name in found:
            raise click.BadParameter(f"${{{name}}} is given twice")
        found[name] = read_literal(value)
    return found


def read_bytes(text: str | None) -> int | None:
    """`4GiB`, `512MiB` or a number of bytes."""
    if text is None:
        return None
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9, "B": 1, "": 1}
    number = text.rstrip("KMGTiB")
    unit = text[len(number) :]
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError, OverflowError):
        raise click.BadParameter(f"{text!r} is no amount of memory; write 4GiB or 512MiB") from None
    if value <= 0:
        raise click.BadParameter("a pass needs some memory")
    return value


FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", help="What stdout gets."
)
THREADS = click.option("--threads", type=click.IntRange(1), help="Threads that torch may use.")
MEMORY = click.option(
    "--memory",
    metavar="BYTES",
    callback=lambda _c, _p, v: read_bytes(v),
    help="What a pass may hold beyond the model, e.g. 4GiB; three quarters of what is free, unless given.",
)
FRESH = click.option("--fresh", is_flag=True, help="Discard what stopped runs of SPEC have kept.")
KEEP_EVERY = click.option(
    "--keep-every",
    metavar="SECONDS",
    type=click.FloatRange(0),
    default=5.0,
    help="How much work a killed run may lose; a shorter run keeps nothing.",
    show_default=True,
)
SET = click.option(
    "--set",
    "parameters",
    multiple=True,
    metavar="NAME=VALUE",
    callback=lambda _c, _p, v: read_parameters(v),
    help="The value of ${NAME}: a number, or else a text.",
)
SPEC = click.argument("spec", type=click.Path(path_type=Path))
CHECK = click.option(
    "--check",
    metavar="[=all|N]",
    help="Recompute a sample of the cells (or all, or N) with forward hooks, and compare.",
)
