"""The examples of a code's page, run: files laid out, the standard parts put after a spec, what comes back.

A page's blocks: ```` ```patch wrong ```` and ```` ```patch right ```` (checked; `wrong run` and `right run` are run),
```` ```text ```` (what the wrong one prints), ```` ```python wrong ````, ```` ```sh wrong ````, and
```` ```KIND NAME ```` for a file that lies beside the spec.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchc import api
from patchc.cli import main
from patchc.diagnostics import Diagnostic, PatchcError, Severity
from patchc.diagnostics.pages import Page
from patchc.diagnostics.render import render
from patchc.parse import parse
from patchc.report.expects import failed_expects
from patchc.resolve import model_choice
from patchc.spec import read_spec

NAME = "example.patch"
STANDARD = {
    r"^model ": 'model "ioi-tiny"',
    r"^data\b": """data {
  clean   "When Mary and John went to the shop, John gave a bag to"
  corrupt "When Mary and John went to the shop, Mary gave a bag to"
  answer  " Mary"
  wrong   " John"
  at s2   wrong last
  at end  -1
}""",
    r"^experiment ": "experiment e { run clean patch node head[3, 1] with corrupt measure diff }",
}
"""What the examples leave out: each part, where the pattern does not find it in the example."""

METRIC = "metric diff = logit(answer) - logit(wrong)"
METRIC_DIFF = re.compile(r"^metric diff\b", re.M)

_BLOCK = re.compile(r"^```(.+)\n((?:.*\n)*?)^```$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: `info` says what it is."""

    info: tuple[str, ...]
    body: str

    @property
    def role(self) -> str | None:
        return next((word for word in ("wrong", "right") if word in self.info), None)


def blocks(page: Page) -> list[Block]:
    return [Block(tuple(m[1].split()), m[2]) for m in _BLOCK.finditer(page.text)]


def lay_out(found: Iterable[Block]) -> None:
    """Write a page's files into the current directory."""
    for block in found:
        if len(block.info) == 2 and "." in block.info[1]:
            Path(block.info[1]).write_text(block.body, encoding="utf-8")


def outcome(block: Block) -> tuple[Diagnostic, ...]:
    """Every diagnostic that an example gives, in the current directory."""
    try:
        match block.info[0]:
            case "patch":
                return tuple(_of_spec(block))
            case "python":
                with pytest.MonkeyPatch.context() as quiet:
                    quiet.setenv("TQDM_DISABLE", "1")
                    exec(compile(block.body, "example.py", "exec"), {"__name__": "example"})
                return ()
            case _:
                raise AssertionError(f"a block of {block.info[0]} cannot be run")
    except PatchcError as error:
        return error.diagnostics


def _of_spec(block: Block) -> Iterator[Diagnostic]:
    Path(NAME).write_text(completed(block.body) if "whole" not in block.info else block.body, encoding="utf-8")
    source, base = read_spec(Path(NAME))
    compiled = api.load(model_choice(parse(source)), base=base).compile(Path(NAME))
    compiled.check_files()
    yield from compiled.warnings
    for result in compiled.run(progress=False).values() if "run" in block.info else ():
        yield from failed_expects(result)


def completed(text: str) -> str:
    """The example with the standard parts after it, so that its places stay."""
    missing = [part for pattern, part in STANDARD.items() if not re.search(pattern, text, re.M)]
    out = "\n".join([text, *missing])
    return out if re.search(r"\bdiff\b", out) is None or METRIC_DIFF.search(out) else f"{out}\n{METRIC}"


def printed(block: Block, capsys: pytest.CaptureFixture[str]) -> tuple[str, tuple[str, ...]]:
    """What an example prints about itself, and the codes in it."""
    if block.info[0] == "sh":
        return _of_commands(block.body, capsys)
    found = outcome(block)
    return render(found, color=False), tuple(d.code for d in found)


def _of_commands(body: str, capsys: pytest.CaptureFixture[str]) -> tuple[str, tuple[str, ...]]:
    capsys.readouterr()
    for line in body.splitlines():
        with pytest.raises(SystemExit):
            main(shlex.split(line.removeprefix("patchc ")))
    text = capsys.readouterr().err
    codes = re.findall(r"^(?:error|warning|note)\[([a-z0-9-]+)\]", text, re.M)
    return text, tuple(codes)


def has_errors(found: Iterable[Diagnostic]) -> bool:
    return any(d.severity is Severity.ERROR for d in found)


def with_text(page: Page, text: str) -> str:
    """The page with `text` in its `text` block."""
    return re.sub(r"(^```text\n)(?:.*\n)*?(^```$)", lambda m: m[1] + text + m[2], page.text, count=1, flags=re.M)
