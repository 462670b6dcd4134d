"""The long text of every code: `pages/CODE.md`, read when it is asked for.

Title and second line repeat what the registry says, so that no module that raises a code has to be imported.
What a page says is the page's matter; how it is shown, `diagnostics.explain`'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from patchc.diagnostics import RULES, Severity, nearest

UNKNOWN_CODE = RULES.add("unknown-code", "`patchc explain` was asked for a code that does not exist", exit=2)

FOLDER = Path(__file__).parent / "pages"

_TITLE = r"# (?P<code>[a-z0-9-]+): (?P<summary>.+)\n\n"
_HEAD = re.compile(_TITLE + r"(?P<topic>[a-z]+) · (?P<severity>[a-z]+) · exit (?P<exit>\d+)\n")


@dataclass(frozen=True, slots=True)
class Page:
    """What there is to say about one code. `text` is the whole page, in Markdown; `topic` is what it is about."""

    code: str
    summary: str
    topic: str
    severity: Severity
    exit: int
    text: str


def page(code: str) -> Page:
    """The page of a code; `unknown-code` where there is none."""
    if code not in codes():
        fix = nearest(code, codes()) or "`patchc explain` lists every code"
        raise UNKNOWN_CODE.error(f'no diagnostic has the code "{code}"', fix=fix)
    return read(FOLDER / f"{code}.md")


def codes() -> tuple[str, ...]:
    """Every code that has a page, sorted."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.md")))


def pages() -> tuple[Page, ...]:
    """Every page, by topic and then by code."""
    return tuple(sorted((page(code) for code in codes()), key=lambda p: (p.topic, p.code)))


def read(path: Path) -> Page:
    """A page from its file; `ValueError` where its first lines are not a page's."""
    text = path.read_text(encoding="utf-8")
    head = _HEAD.match(text)
    if head is None:
        raise ValueError(f"{path} does not begin with `# code: summary` and `topic · severity · exit N`")
    severity, status = Severity(head["severity"]), int(head["exit"])
    return Page(head["code"], head["summary"], head["topic"], severity, status, text)
