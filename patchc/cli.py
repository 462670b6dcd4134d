"""The `patchc` command. Results go to stdout, progress and messages to stderr; only here is the process's state
touched.

Imports are made where a command needs them: `--help`, and a spec that does not parse, answer without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from patchc import __version__
from patchc.diagnostics import RULES, Diagnostic, PatchcError


class Exit(IntEnum):
    """The process's exit status; where several apply, the run's own failure wins over a failed `expect`."""

    OK = 0
    SPEC = 1
    USAGE = 2
    RUN = 3
    EXPECT = 4
    INTERRUPTED = 130


INTERNAL = RULES.add("internal", "a fault in patchc itself", exit=Exit.RUN)
USAGE = RULES.add("usage", "the command line is not understood", exit=Exit.USAGE)
INTERRUPTED = RULES.add("interrupted", "the run was stopped before it was done", exit=Exit.INTERRUPTED)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    # `--check` alone takes no value, so that the spec after it is not read as one.
    args = ["--check=sample" if a == "--check" else a for a in (sys.argv[1:] if argv is None else argv)]
    try:
        sys.exit(cli.main(args, prog_name="patchc", standalone_mode=False) or 0)
    except (click.exceptions.Abort, KeyboardInterrupt):
        sys.exit(_failed(_output_of(args), (INTERRUPTED.at(None, "interrupted"),)))
    except click.ClickException as error:
        output, context = _output_of(args), getattr(error, "ctx", None)
        if context is not None and output == "text":
            click.echo(context.get_usage(), err=True)
        sys.exit(_failed(output, (_misused(error, context),)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="patchc")
def cli() -> None:
    """Compile and run activation-patching experiments written as .patch specs."""


FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", help="What stdout gets."
)
THREADS = click.option("--threads", type=click.IntRange(1), help="Threads that torch may use.")
MEMORY = click.option("--memory", callback=lambda _c, _p, v: _bytes(v), help="What a pass aims to hold, e.g. 4GiB.")
SPEC = click.argument("spec", type=click.Path(path_type=Path))
CHECK = click.option(
    "--check",
    metavar="[=all|N]",
    help="Recompute a sample of the cells (or all, or N) with forward hooks, and compare.",
)


@cli.command()
@SPEC
@CHECK
@FORMAT
@THREADS
@MEMORY
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--per-prompt", is_flag=True, help="Each prompt's number, in a dim more, instead of their mean.")
def run(
    spec: Path, check: str | None, output: str, threads: int | None, memory: int | None, quiet: bool, per_prompt: bool
) -> int:
    """Run every experiment of SPEC."""
    return _guarded(output, lambda: _run(spec, check, output, threads, memory, quiet, per_prompt))


@cli.command()
@SPEC
@FORMAT
@MEMORY
def plan(spec: Path, output: str, memory: int | None) -> int:
    """Print what SPEC will run: variants, rows, passes. Runs nothing."""
    return _guarded(output, lambda: _plan(spec, output, memory))


@cli.command()
@click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path))
@FORMAT
def check(specs: tuple[Path, ...], output: str) -> int:
    """Report every error of SPECS. Runs nothing."""
    return _guarded(output, lambda: _check(specs, output))


@cli.command()
@click.argument("model")
@FORMAT
def nodes(model: str, output: str) -> int:
    """List the nodes, ports and shapes of MODEL."""
    return _guarded(output, lambda: _nodes(model, output))


@cli.command()
@click.argument("code", required=False)
@FORMAT
def explain(code: str | None, output: str) -> int:
    """Say what the diagnostic CODE means, with a wrong and a right example; without CODE, list them all."""
    from patchc.diagnostics.explain import explained

    return _guarded(output, lambda: explained(code, output) or Exit.OK)


# ---- commands


def _run(
    spec: Path, check: str | None, output: str, threads: int | None, memory: int | None, quiet: bool, per_prompt: bool
) -> int:
    count = _cells_to_check(check)
    compiled = _compile(spec, memory, threads)
    results = compiled.run(check=count, progress=not quiet, per_prompt=per_prompt)
    from patchc.report.expects import failed_expects

    failed = [d for result in results.values() for d in failed_expects(result)]
    if output == "json":
        click.echo(json.dumps(results.to_json(), allow_nan=False))
    else:
        from rich.console import Console

        from patchc.report.terminal import print_results

        print_results(results, Console())
    _say(failed)
    return Exit.EXPECT if failed else Exit.OK


def _plan(spec: Path, output: str, memory: int | None) -> int:
    plans = _compile(spec, memory, None).plan()
    if output == "json":
        from dataclasses import asdict

        click.echo(json.dumps({"format_version": 1, "plans": [asdict(p) for p in plans]}))
    else:
        click.echo(str(plans))
    return Exit.OK


def _check(specs: tuple[Path, ...], output: str) -> int:
    found: list[Diagnostic] = []
    models: dict[Any, Any] = {}
    for spec in specs:
        try:
            found += _checked(spec, models)
        except PatchcError as error:
            found += error.diagnostics
    if output == "json":
        from patchc.diagnostics.render import to_json

        click.echo(json.dumps({"format_version": 1, "diagnostics": to_json(found)}))
    else:
        from patchc.diagnostics.render import counted

        _say(found)
        more = "; `patchc explain CODE` says more about a code" if found else ""
        click.echo(("\n" if found else "") + f"{len(specs)} checked, {counted(found)}{more}", err=True)
    return max((d.exit for d in found if d.is_error), default=Exit.OK)


def _checked(spec: Path, models: dict[Any, Any]) -> list[Diagnostic]:
    """The warnings of a spec; raises its errors. Parsed before torch is imported."""
    choice, base = _parsed(spec)
    from patchc import api

    key = (choice.name, choice.options, base)
    if key not in models:
        models[key] = api.load(choice, base=base)
    compiled = models[key].compile(spec)
    compiled.check_files()
    return list(compiled.warnings)


def _nodes(model: str, output: str) -> int:
    from patchc import api
    from patchc.report.nodes import nodes_json, nodes_text

    graph = api.load(model).graph
    click.echo(json.dumps(nodes_json(graph)) if output == "json" else nodes_text(graph))
    return Exit.OK


# ---- shared


def _parsed(spec: Path) -> tuple[Any, Path]:
    """The model that a spec asks for; every syntax error is raised here, without torch."""
    from patchc.parse import parse
    from patchc.resolve.model_choice import model_choice
    from patchc.spec import read_spec

    source, base = read_spec(spec)
    return model_choice(parse(source)), base


def _compile(spec: Path, memory: int | None, threads: int | None) -> Any:
    choice, base = _parsed(spec)
    from patchc import api
    from patchc.optimise.cut import DEFAULT_BUDGET

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    compiled = api.load(choice, base=base).compile(spec, memory=memory or DEFAULT_BUDGET)
    _say(compiled.warnings)
    return compiled


def _guarded(output: str, command: Callable[[], int]) -> int:
    """Runs a command; errors go to stderr as text, or to stdout as the one JSON object."""
    try:
        return command()
    except PatchcError as error:
        return _failed(output, error.diagnostics)
    except (KeyboardInterrupt, click.ClickException):
        raise
    except Exception as error:
        return _failed(output, (_internal(error),))


def _failed(output: str, diagnostics: Sequence[Diagnostic]) -> int:
    """Say why a command came to nothing; gives its exit status."""
    if output == "json":
        from patchc.diagnostics.render import to_json

        click.echo(json.dumps({"format_version": 1, "diagnostics": to_json(diagnostics)}))
    else:
        _say(diagnostics)
        if sum(d.is_error for d in diagnostics) > 1:
            from patchc.diagnostics.render import counted

            click.echo(f"\n{counted(diagnostics)}; `patchc explain CODE` says more about a code", err=True)
    return PatchcError(diagnostics).exit


def _internal(error: Exception) -> Diagnostic:
    """A bug of ours: said in one line, with the place, and the traceback where PATCHC_DEBUG asks for it."""
    import os
    import traceback

    if os.environ.get("PATCHC_DEBUG"):
        traceback.print_exc()
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"
    return INTERNAL.at(None, message, fix="please report this; `PATCHC_DEBUG=1` in the environment shows where")


def _misused(error: click.ClickException, context: click.Context | None) -> Diagnostic:
    """What click says about a command line, as one of our diagnostics."""
    fix = None if context is None else f"`{context.command_path} --help` says what it takes"
    return USAGE.at(None, error.format_message(), fix=fix)


def _output_of(args: Sequence[str]) -> str:
    """What a command line that click did not read to its end asks stdout to be."""
    asked = [after for option, after in pairwise([*args, ""]) if option == "--format"]
    asked += [a.removeprefix("--format=") for a in args if a.startswith("--format=")]
    return "json" if "json" in asked else "text"


def _say(diagnostics: Sequence[Diagnostic]) -> None:
    """Diagnostics on stderr, as text."""
    if diagnostics:
        from patchc.diagnostics.render import render

        click.echo(render(diagnostics, color=sys.stderr.isatty()), err=True, nl=False)


def _cells_to_check(check: str | None) -> bool | int | str:
    if check is None:
        return False
    if check in ("all", "sample"):
        return check
    if check.isdecimal() and int(check):
        return int(check)
    raise click.UsageError(f"--check takes nothing, `all` or a number of cells, not {check!r}")


def _bytes(text: str | None) -> int | None:
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


__all__ = ["Exit", "cli", "main"]

if __name__ == "__main__":
    main()
