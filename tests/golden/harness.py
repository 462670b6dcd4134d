"""Golden tests: files of cases, each an input text and sections of what comes of it.

`pytest tests/golden --regenerate` writes what came: read the difference before you keep it.

    -- A remark, up to the next case.
    [case mlps_between]
    input, any lines
    [section]
    expected, any lines
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

HERE = Path(__file__).parent
Golden = Callable[["Case", Mapping[str, str]], None]

_HEADER = re.compile(r"\[((?:case )?[a-z][a-z0-9_]*)\]")


@dataclass(frozen=True)
class Case:
    """One case; `sections` are what the file expects, in its order."""

    file: Path
    name: str
    input: str
    sections: dict[str, str] = field(default_factory=dict)
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.file.stem}-{self.name}"

    @property
    def text(self) -> str:
        """The case as its file has it."""
        parts = "".join(f"[{name}]\n{_ended(body)}" for name, body in self.sections.items())
        return f"{self.remark}[case {self.name}]\n{_ended(self.input)}{parts}"


def cases(folder: str) -> list[Case]:
    """Every case of `tests/golden/<folder>/*.test`; a folder without any is an error."""
    found = [case for path in sorted((HERE / folder).glob("*.test")) for case in read(path)]
    if not found:
        raise ValueError(f"no golden case in {HERE / folder}")
    return found


def read(path: Path) -> list[Case]:
    """The cases of a file. What would go unseen is an error: text before the first, a name twice."""
    (_, start), *blocks = _blocks(path.read_text(encoding="utf-8"))
    remark = _take_remark(start)
    if start or (blocks and not blocks[0][0].startswith("case ")):
        raise ValueError(f"{path}: text before the first case")
    found: list[Case] = []
    for (header, lines), (following, _) in zip(blocks, [*blocks[1:], ("case ", [])], strict=True):
        next_remark = _take_remark(lines) if following.startswith("case ") else ""
        if header.startswith("case "):
            found.append(Case(path, header.removeprefix("case "), _ended("\n".join(lines)), {}, remark))
        elif header in found[-1].sections:
            raise ValueError(f"{path}: case {found[-1].name}: section [{header}] twice")
        else:
            found[-1].sections[header] = _ended("\n".join(lines))
        remark = next_remark
    _refuse_duplicates(path, found)
    return found


def _blocks(text: str) -> list[tuple[str, list[str]]]:
    """(header, the lines under it); the first block has no header."""
    blocks: list[tuple[str, list[str]]] = [("", [])]
    for line in text.split("\n"):
        if header := _HEADER.fullmatch(line):
            blocks.append((header[1], []))
        else:
            blocks[-1][1].append(line)
    return blocks


def compare(case: Case, produced: Mapping[str, str], regenerate: bool) -> None:
    """Fail where a section of the case differs from what was produced, or rewrite the case in its file."""
    if regenerate:
        names = [n for n in case.sections if n in produced] or list(produced)
        _rewrite(replace(case, sections={n: produced[n] for n in names}))
        return
    assert case.sections, f"{case}: no section says what to expect"
    missing = [n for n in case.sections if n not in produced]
    assert not missing, f"{case}: no {missing} came, but {dict(produced)}"
    for name, expected in case.sections.items():
        assert _ended(produced[name]) == _ended(expected), f"{case}: [{name}]"


def _ended(text: str) -> str:
    """Lines without empty ones at either end, and with a line's end after the last."""
    return "".join(f"{line}\n" for line in text.strip("\n").split("\n")) if text.strip("\n") else ""


def _take_remark(lines: list[str]) -> str:
    """Cut the `--` and empty lines at the end, which belong to the next case, off."""
    cut = len(lines)
    while cut and (not lines[cut - 1] or lines[cut - 1].startswith("--")):
        cut -= 1
    remark = "".join(f"{line}\n" for line in lines[cut:])
    del lines[cut:]
    return remark


def _refuse_duplicates(path: Path, found: list[Case]) -> None:
    names = [case.name for case in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{path}: cases named twice: {', '.join(twice)}")


def _rewrite(case: Case) -> None:
    """Put the case in its file in place of the one of its name; the others stay as they are."""
    text = "".join((case if old.name == case.name else old).text for old in read(case.file))
    temporary = case.file.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, case.file)
