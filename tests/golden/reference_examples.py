"""The examples in grammar/README.md: fenced blocks, completed as that page says, and the files that they name.

The blocks of a file (`jsonl NAME`, `csv NAME`, ...) are written out; a `text` block after an example is what came.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REFERENCE = Path(__file__).parents[2] / "grammar" / "README.md"

_BLOCK = re.compile(r"^```([^\n`]+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^##+ (.*)$", re.MULTILINE)
_STATEMENTS = ("model", "data", "metric", "let", "sae", "experiment")
_WORD = re.compile(r"^(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A `patch` block. `mark` is the word after `patch`: `later` parses and is not supported yet, `wrong` has an error.

    `shown`: the text block right after it, where there is one.
    """

    name: str
    text: str
    mark: str
    shown: str | None

    def __str__(self) -> str:
        return self.name

    @property
    def lines(self) -> list[str]:
        """The `patch` lines of an example whose clauses are nothing else, without comments: an experiment each."""
        clauses = _split(self.text)[1]
        words = set(_WORD.findall(clauses))
        return [line.partition("#")[0].rstrip() for line in clauses.splitlines()] if words == {"patch"} else []

    def spec(self) -> str:
        """The whole spec, as it is run."""
        experiments = [_experiment(f"line_{i}", line) for i, line in enumerate(self.lines)]
        return _completed(_split(self.text)[0], "\n".join(experiments)) if experiments else self.as_one()

    def as_one(self) -> str:
        """The whole spec with all clauses in one experiment, as it is formatted."""
        statements, clauses = _split(self.text)
        return _completed(statements, _experiment("example", clauses) if clauses else "")


def _split(text: str) -> tuple[str, str]:
    """The statements of an example, and the clauses after them."""
    start = next((m.start() for m in _WORD.finditer(text) if m[1] not in _STATEMENTS), len(text))
    return text[:start], text[start:]


def _experiment(name: str, clauses: str) -> str:
    words = _WORD.findall(clauses)
    run = "" if "run" in words else "run clean\n"
    measure = "" if "measure" in words else "measure diff\n"
    inner = "".join(f"  {line}\n" if line else "\n" for line in f"{run}{clauses.strip()}\n{measure}".splitlines())
    return f"experiment {name} {{\n{inner}}}\n"


def _completed(statements: str, experiments: str) -> str:
    """A spec of these, with the statements that the page's own spec has and they lack."""
    model, data, metric, experiment = standard()
    words = _WORD.findall(statements)
    before = [model] * ("model" not in words) + [data] * ("data" not in words)
    before += [metric] * (not re.search(r"^metric diff\b", statements, re.MULTILINE))
    after = [experiments or experiment] if "experiment" not in words else []
    return "\n".join([*before, *([statements.strip() + "\n"] if statements.strip() else []), *after])


def standard() -> tuple[str, ...]:
    """The model, the data, the metric and the experiment that complete an example."""
    (text,) = [body for _, info, body in blocks() if info == "patch standard"]
    return tuple(part + "\n" for part in text.strip("\n").split("\n\n"))


def blocks() -> Iterator[tuple[int, str, str]]:
    """(where its text starts, info string, text) of every fenced block."""
    for found in _BLOCK.finditer(REFERENCE.read_text(encoding="utf-8")):
        yield found.start(2), found[1], found[2]


def examples() -> list[Example]:
    """Every example, in the page's order, named for the section in which it stands."""
    page = REFERENCE.read_text(encoding="utf-8")
    headings = [(m.start(), re.sub(r"\W+", "_", m[1].lower()).strip("_")) for m in _HEADING.finditer(page)]
    found, all_blocks, counts = list[Example](), list(blocks()), dict[str, int]()
    for (at, info, body), following in zip(all_blocks, [*all_blocks[1:], None], strict=True):
        if not re.fullmatch(r"patch( \w+)?", info):
            continue
        section = [name for start, name in headings if start < at][-1]
        counts[section] = counts.get(section, 0) + 1
        shown = None
        if following and following[1] == "text" and not page[at + len(body) + 3 : following[0] - 8].strip():
            shown = following[2]
        found.append(Example(f"{section}_{counts[section]}", body, info.removeprefix("patch").strip(), shown))
    return found


def write_files(folder: Path) -> None:
    """The files that the examples name: those that stand in the page, and the two kinds that are not text."""
    import pandas as pd
    import torch
    from safetensors.torch import save_file

    for _, info, body in blocks():
        if found := re.fullmatch(r"(?:jsonl|json|csv) (\S+)", info):
            (folder / found[1]).write_text(body, encoding="utf-8")
    pd.read_csv(folder / "prompts.csv").to_parquet(folder / "prompts.parquet")
    generator = torch.Generator().manual_seed(0)
    sizes = {"direction": 128, "in_head": 32, "neurons": 64}
    save_file({k: torch.randn(n, generator=generator) for k, n in sizes.items()}, folder / "vectors.safetensors")
