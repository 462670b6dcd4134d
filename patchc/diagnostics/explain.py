"""`patchc explain`: the page of a code, or the list of all codes, for a terminal, a pipe or a program.

The pages are `diagnostics.pages`'s; nothing is read but them, so that it answers without torch.
"""

from __future__ import annotations

import json
import sys
from itertools import groupby

from patchc.diagnostics.pages import Page, page, pages

LEFT_OUT = "Examples leave out the model, the data and the metric where they play no part."


def explained(code: str | None, output: str) -> None:
    """Write a page, or the list where `code` is None, to stdout; `output` is `text` or `json`."""
    if output == "json":
        found = _of_page(page(code)) if code else {"codes": [_of_code(p) for p in pages()]}
        print(json.dumps({"format_version": 1, **found}))
    elif code:
        _show(page(code).text.rstrip() + f"\n\n{LEFT_OUT}\n")
    else:
        print(_listed(), end="")


def _of_code(found: Page) -> dict[str, str | int]:
    return {
        "code": found.code,
        "summary": found.summary,
        "topic": found.topic,
        "severity": found.severity.value,
        "exit": found.exit,
    }


def _of_page(found: Page) -> dict[str, str | int]:
    return {**_of_code(found), "text": found.text}


def _show(text: str) -> None:
    """Markdown drawn on a terminal, as it is anywhere else."""
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(text))


def _listed() -> str:
    found = pages()
    width = max(len(p.code) for p in found)
    blocks: list[str] = []
    for topic, group in groupby(found, key=lambda p: p.topic):
        rows = "".join(f"  {p.code:<{width}}  {p.summary}\n" for p in group)
        blocks.append(f"{topic}\n{rows}")
    return "\n".join(blocks) + "\n`patchc explain CODE` says more about one of them.\n"
