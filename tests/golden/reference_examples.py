"""The examples in grammar/README.md: fenced blocks, completed as that page says, and the files that they name.

The blocks of a file (`jsonl NAME`, `csv NAME`, ...) are written out; `text` after an example is what comes of it.
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

    `shown`: where the text after it stands in the page, and the text, where there is one.
    """

    name: str
    text: str
    mark: str
    shown: tuple[int, int, str] | None

    def __str__(self) -> str:
        return self.name

    @property
    def has(self) -> list[str]:
        """The words at the starts of its lines."""
        return _WORD.findall(self.text)

    @property
    def is_lines(self) -> bool:
        """Whether it is `patch` lines alone, an experiment each."""
        return set(self.has) <= {"patch", "attribute"}

    def spec(self) -> str:
        """The whole spec, as it is run."""
        if self.is_lines:
            lines = [line for line in self.text.splitlines() if _WORD.match(line)]
            return _completed("\n\n".join(_experiment(f"line_{i}", line + "\n") for i, line in enumerate(lines)))
        return self.as_one()

    def as_one(self) -> str:
        """The whole spec with all clauses in one experiment, as it is formatted."""
        return _completed(self.text if self.has[0] in _STATEMENTS else _experiment("example", self.text))


def _experiment(name: str, clauses: str) -> str:
    words = _WORD.findall(clauses)
    run = "" if "run" in words else "run clean\n"
    measure = "" if "measure" in words else "measure diff\n"
    inner = "".join(f"  {line}\n" if line else "\n" for line in f"{run}{clauses}{measure}".splitlines())
    return f"experiment {name} {{\n{inner}}}\n"


def _completed(text: str) -> str:
    """The statements that the page's own spec has and `text` lacks, before and after it."""
    model, data, metric, experiment = standard()
    words = _WORD.findall(text)
    before = [model] * ("model" not in words) + [data] * ("data" not in words)
    before += [metric] * (not re.search(r"^metric diff\b", text, re.MULTILINE))
    return "\n".join([*before, text, *([experiment] * ("experiment" not in words))])


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
            shown = (following[0], following[0] + len(following[2]), following[2])
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
