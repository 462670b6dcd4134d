"""The `patchc` command. Results go to stdout, progress and messages to stderr; only here is the process's state
touched.

Imports are made where a command needs them: `--help`, and a spec that does not parse, answer without torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from patchc import __version__
from patchc.bench import PEERS
from patchc.commands.bench import FORMS, measure_rows
from patchc.commands.options import (
    CHECK,
    FORMAT,
    FRESH,
    KEEP_EVERY,
    MEMORY,
    SET,
    SPEC,
    THREADS,
    Parameters,
    cells_to_check,
)
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
    args = given = [*(sys.argv[1:] if argv is None else argv)]
    if args[:1] == ["run"]:
        # `--check` alone takes no value, so that the spec after it is not read as one.
        args = ["--check=sample" if a == "--check" else a for a in args]
    try:
        sys.exit(cli.main(args, prog_name="patchc", standalone_mode=False) or 0)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # click puts its own exception in the place of the interrupt, which has what the run left as notes.
        sys.exit(_failed(_output_of(args), (_interrupted(error.__cause__ or error, given),)))
    except click.ClickException as error:
        output, context = _output_of(args), getattr(error, "ctx", None)
        if context is not None and output == "text":
            click.echo(context.get_usage(), err=True)
        sys.exit(_failed(output, (_misused(error, context),)))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="patchc")
def cli() -> None:
    """Compile and run activation-patching experiments written as .patch specs."""


@cli.command()
@SPEC
@CHECK
@SET
@FORMAT
@THREADS
@MEMORY
@FRESH
@KEEP_EVERY
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--per-prompt", is_flag=True, help="Each prompt's number, in a dim more, instead of their mean.")
def run(
    spec: Path,
    check: str | None,
    parameters: Parameters,
    output: str,
    threads: int | None,
    memory: int | None,
    fresh: bool,
    keep_every: float,
    quiet: bool,
    per_prompt: bool,
) -> int:
    """Run every experiment of SPEC.

    A run that was stopped, in whatever way, goes on from what SPEC.partial keeps of it when it is started again.
    """
    how = _How(check, output, memory, threads, fresh, keep_every, quiet, per_prompt)
    return _guarded(output, lambda: _run(spec, parameters, how))


@cli.command()
@SPEC
@SET
@FORMAT
@MEMORY
@click.option("--analyze", "analyse", is_flag=True, help="Run it, with the weights, and set what is measured beside.")
@THREADS
def plan(
    spec: Path, parameters: Parameters, output: str, memory: int | None, analyse: bool, threads: int | None
) -> int:
    """Print what SPEC will run and what it costs: variants, rows, passes, FLOPs, memory. Reads no weights."""
    return _guarded(output, lambda: _plan(spec, parameters, output, memory, analyse, threads))


@cli.command()
@click.argument("specs", nargs=-1, required=True, type=click.Path(path_type=Path))
@SET
@FORMAT
def check(specs: tuple[Path, ...], parameters: Parameters, output: str) -> int:
    """Report every error of SPECS. Runs nothing and reads no weights."""
    return _guarded(output, lambda: _check(specs, parameters, output))


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


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Write nothing; exit with 1 where a file would change, and name it.")
@click.option("--diff", is_flag=True, help="Write nothing; print what would change, and exit as with --check.")
def fmt(files: tuple[Path, ...], check: bool, diff: bool) -> int:
    """Rewrite FILES in the canonical layout; `-` is stdin to stdout. Comments stay, and so does the meaning."""
    return _guarded("text", lambda: _fmt(files, check, diff))


@cli.command()
@click.argument("model")
@click.argument("file", required=False, type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Replace FILE where it is there already.")
def init(model: str, file: Path | None, force: bool) -> int:
    """Write a spec for MODEL that runs, to start from; to FILE, MODEL.patch unless told, or to stdout (`-`)."""
    return _guarded("text", lambda: _init(model, file, force))


@cli.command()
@click.option("--quick", is_flag=True, help="2 minutes instead of 40: every sweep in one setting, and less of each.")
@click.option("--format", "form", type=click.Choice(FORMS), default="text", help="What stdout gets.")
@click.option("--rows", metavar="PATTERN", help="Only rows whose names hold this, or match it (`*` is any text).")
@click.option("--peers", type=click.Choice(PEERS), multiple=True, help="Measured beside patchc; all that are there.")
@click.option("--autocircuit", metavar="PYTHON", help="The interpreter of a virtual environment that has auto-circuit.")
@THREADS
def bench(
    quick: bool, form: str, rows: str | None, peers: tuple[str, ...], autocircuit: str | None, threads: int | None
) -> int:
    """Measure patchc beside its peers, on a model of GPT-2 small's shape with random weights."""
    return _guarded(form, lambda: _bench(quick, form, rows, peers, autocircuit, threads))


# ---- commands


@dataclass(frozen=True)
class _How:
    """The options of `patchc run`."""

    check: str | None
    output: str
    memory: int | None
    threads: int | None
    fresh: bool
    keep_every: float
    quiet: bool
    per_prompt: bool


def _run(spec: Path, parameters: Parameters, how: _How) -> int:
    count = cells_to_check(how.check)
    compiled = _compile(spec, parameters, how.memory, how.threads, how.fresh, not how.quiet)
    results = compiled.run(
        check=count,
        progress=not how.quiet,
        per_prompt=how.per_prompt,
        keep_every=how.keep_every,
        say=lambda diagnostic: _say([diagnostic]),
    )
    from patchc.report.expects import failed_expects

    failed = [d for result in results.values() for d in failed_expects(result)]
    if how.output == "json":
        click.echo(json.dumps(results.to_json(), allow_nan=False))
    else:
        from rich.console import Console

        from patchc.report.terminal import print_results

        print_results(results, Console())
    _say(failed)
    return Exit.EXPECT if failed else Exit.OK


def _plan(
    spec: Path, parameters: Parameters, output: str, memory: int | None, analyse: bool, threads: int | None
) -> int:
    plans, measured = _measured(spec, parameters, memory, threads) if analyse else _planned(spec, parameters, memory)
    from patchc.report.plans import plan_json, plan_text

    if output == "json":
        found = [plan_json(p, m) for p, m in zip(plans, measured, strict=True)]
        click.echo(json.dumps({"format_version": 1, "plans": found}))
    else:
        click.echo("\n\n".join(plan_text(p, m) for p, m in zip(plans, measured, strict=True)))
    return Exit.OK


def _planned(spec: Path, parameters: Parameters, memory: int | None) -> tuple[Any, Sequence[None]]:
    """The plans of a spec, from its model's config; syntax errors are raised without torch."""
    _parsed(spec, parameters)
    from patchc.planning import plan

    plans = plan(spec, parameters=parameters, memory=memory)
    _say(plans.warnings)
    return plans, [None] * len(plans)


def _measured(spec: Path, parameters: Parameters, memory: int | None, threads: int | None) -> tuple[Any, Any]:
    """The plans of a spec and what was measured of each."""
    compiled = _compile(spec, parameters, memory, threads)
    return compiled.plan(), compiled.analyse()


def _check(specs: tuple[Path, ...], parameters: Parameters, output: str) -> int:
    from patchc.checking import check

    found = check(*specs, parameters=parameters)
    if output == "json":
        from patchc.diagnostics.render import to_json

        click.echo(json.dumps({"format_version": 1, "diagnostics": to_json(found)}))
    else:
        from patchc.diagnostics.render import counted

        _say(found)
        more = "; `patchc explain CODE` says more about a code" if found else ""
        click.echo(("\n" if found else "") + f"{len(specs)} checked, {counted(found)}{more}", err=True)
    return max((d.exit for d in found if d.is_error), default=Exit.OK)


def _nodes(model: str, output: str) -> int:
    from patchc.model.outline import outline
    from patchc.report.nodes import nodes_json, nodes_text

    graph = outline(model).graph
    click.echo(json.dumps(nodes_json(graph)) if output == "json" else nodes_text(graph))
    return Exit.OK


def _fmt(files: tuple[Path, ...], check: bool, diff: bool) -> int:
    from patchc.commands.fmt import format_files

    changed, found = format_files(files, check, diff)
    _say(found)
    return max([d.exit for d in found] + [Exit.SPEC * (changed > 0 and (check or diff))])


def _init(model: str, file: Path | None, force: bool) -> int:
    from patchc.commands.init import write_starter

    if path := write_starter(model, file, force):
        click.echo(f"{path} written; to run it: patchc run {path}", err=True)
    return Exit.OK


def _bench(
    quick: bool, form: str, rows: str | None, peers: tuple[str, ...], autocircuit: str | None, threads: int | None
) -> int:
    from patchc.bench.run import Options

    measure_rows(Options(quick, rows, peers or PEERS, autocircuit, threads), form)
    return Exit.OK


# ---- shared


def _parsed(spec: Path, parameters: Parameters) -> tuple[Any, Path]:
    """The model that a spec asks for; every syntax error is raised here, without torch."""
    from patchc.parse import parse
    from patchc.resolve.model_choice import model_choice
    from patchc.spec import read_spec

    source, base = read_spec(spec)
    return model_choice(parse(source), parameters), base


def _compile(
    spec: Path,
    parameters: Parameters,
    memory: int | None,
    threads: int | None,
    fresh: bool = False,
    progress: bool = True,
) -> Any:
    choice, base = _parsed(spec, parameters)
    from patchc import api

    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    model = api.load(choice, base=base, progress=progress)
    compiled = model.compile(spec, parameters=parameters, memory=memory, fresh=fresh)
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


def _interrupted(error: BaseException, args: Sequence[str]) -> Diagnostic:
    """What is left of an interrupted command, and for a run how it goes on."""
    kept = getattr(error, "__notes__", ())
    message = ": ".join(["interrupted", *kept])
    if args[:1] != ["run"]:
        return INTERRUPTED.at(None, message)
    import shlex

    again = shlex.join(["patchc", *(a for a in args if a != "--fresh")])
    return INTERRUPTED.at(None, message, fix=f"{'to resume it' if kept else 'to start it again'}: `{again}`")


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


__all__ = ["Exit", "cli", "main"]

if __name__ == "__main__":
    main()
