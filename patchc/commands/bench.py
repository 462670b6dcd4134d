"""`patchc bench`: measures patchc beside its peers and prints the table. What is measured is in `patchc.bench`.

Rows are said on stderr as they are measured; stdout gets the table, or one JSON object.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from patchc.diagnostics import RULES

if TYPE_CHECKING:
    from patchc.bench.row import Row
    from patchc.bench.run import Options

NO_SUCH_ROW = RULES.add("no-such-row", "`patchc bench` has no row of that name", exit=2)
FORMS = ("text", "json", "markdown")


def measure_rows(options: Options, form: str) -> None:
    """Measures every row that is asked for and prints them; stopped early, those that are done, but as JSON. Errors:
    `no-such-row`."""
    from patchc.bench.run import rows, steps

    if not steps(options):
        names = dict.fromkeys(step.work for step in steps(replace(options, rows=None)))
        raise NO_SUCH_ROW.error(
            f"no row is called '{options.rows}'; there are: {'; '.join(names)}",
            fix="a part of a name will do: `--rows 'all edges'`",
        )
    done: list[Row] = []
    try:
        done.extend(rows(options, lambda text: click.echo(text, err=True)))
    except KeyboardInterrupt:
        if done and form != "json":  # as JSON there is one object, which says that it was interrupted
            print_rows(done, form)
        raise
    print_rows(done, form)


def print_rows(rows: list[Row], form: str) -> None:
    """The rows on stdout."""
    from patchc.bench.table import markdown, print_table, to_json

    if form == "json":
        click.echo(json.dumps(to_json(rows), allow_nan=False))
    elif form == "markdown":
        click.echo(markdown(rows))
    else:
        from rich.console import Console

        print_table(rows, Console())
