"""What new users get wrong, and what they are told: tests/golden/mistakes/*.test; and files that are odd and right."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Case, Golden, cases
from pages import NAME, Block, completed, outcome

from patchc.diagnostics import Source
from patchc.diagnostics.render import counted, render
from patchc.parse import parse

SPEC = completed("""# a comment: é 🙂 日本
let early = head[0, *]
experiment e "🙂" {
\trun clean
\tpatch node early with corrupt
\tmeasure diff
}
""")


@pytest.mark.parametrize("case", cases("mistakes"), ids=str)
def test_mistakes(case: Case, golden: Golden, folder: Path) -> None:
    found = outcome(Block(("patch", "wrong"), case.input))
    assert found, "a mistake goes unnoticed"
    golden(case, {"printed": render(found, color=False) + counted(found)})


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
    ],
    ids=["tabs and emoji", "CRLF", "BOM", "BOM and CRLF", "no last line end"],
)
def test_odd_files_are_right(change: object, folder: Path) -> None:
    text = change(SPEC)  # type: ignore[operator]
    assert parse(Source(NAME, text)) == parse(Source(NAME, SPEC))
    Path(NAME).write_bytes(text.encode("utf-8"))
    from patchc import load

    assert not load("ioi-tiny").compile(Path(NAME)).warnings
