"""Every code's page: its wrong example gives the code and the text that stands there, its right example does not.

`--regenerate` writes what is printed now into the pages: read the difference. A code that no example can bring
about is provoked in `provoked.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from pathlib import Path

import pytest
from pages import blocks, has_errors, lay_out, outcome, printed, with_text
from provoked import PROVOKED, WITHOUT_EXAMPLE

import patchc
from patchc.diagnostics import RULES, PatchcError, Rule
from patchc.diagnostics.pages import FOLDER, Page, codes, page, read
from patchc.diagnostics.render import render
from patchc.resources import builtin_model, builtin_models

HELP = " = help: "
MODELS = next(p.parent for n in builtin_models() if (p := builtin_model(n)))
LONGEST = 60
"""Lines of a page: what is longer is not read."""


@cache
def rules() -> dict[str, Rule]:
    """Every registered code: those of each module of the package."""
    for module in pkgutil.walk_packages(patchc.__path__, "patchc."):
        importlib.import_module(module.name)
    return RULES.rules


@pytest.mark.parametrize("code", sorted(set(codes()) - WITHOUT_EXAMPLE))
def test_the_wrong_example_gives_the_code(
    code: str, folder: Path, capsys: pytest.CaptureFixture[str], pytestconfig: pytest.Config
) -> None:
    found = page(code)
    parts = blocks(found)
    lay_out(parts)
    text, given = _wrong(found, capsys)
    assert set(given) == {code}, f"the wrong example of {code} gives {given}:\n{text}"
    text = text.replace(str(folder), "/home/me").replace(str(MODELS), "/home/me/models")
    unsaid = [line for line in text.splitlines() if HELP in line and "`" not in line and len(line.split()) < 5]
    assert not unsaid, f"a fix is a phrase, and what is to be pasted stands in backticks: {unsaid}"
    if pytestconfig.getoption("--regenerate"):
        (FOLDER / f"{code}.md").write_text(with_text(found, text), encoding="utf-8")
        return
    expected = [b.body for b in parts if b.info == ("text",)]
    assert expected == [text] or (code in PROVOKED and not expected)


def _wrong(found: Page, capsys: pytest.CaptureFixture[str]) -> tuple[str, tuple[str, ...]]:
    if found.code in PROVOKED:
        with pytest.MonkeyPatch.context() as patched:
            given = PROVOKED[found.code](patched)
        return render(given, color=False), tuple(d.code for d in given)
    wrong = [b for b in blocks(found) if b.role == "wrong"]
    assert len(wrong) == 1, f"{found.code}: one block is wrong, and it says so (or `provoked.py` knows the code)"
    return printed(wrong[0], capsys)


@pytest.mark.parametrize("code", codes())
def test_the_right_example_does_not(code: str, folder: Path) -> None:
    parts = blocks(page(code))
    lay_out(parts)
    right = [b for b in parts if b.role == "right" and b.info[0] in ("patch", "python")]
    for block in right:
        found = outcome(block)
        assert code not in [d.code for d in found]
        assert not has_errors(found), render(found, color=False)
    assert right or not [b for b in parts if b.info[:2] == ("patch", "wrong")], "a wrong spec without a right one"


@pytest.mark.parametrize("code", sorted(WITHOUT_EXAMPLE))
def test_a_page_without_an_example_has_none(code: str) -> None:
    assert not blocks(page(code))


def test_every_code_has_a_page() -> None:
    missing = sorted(set(rules()) - set(codes()))
    assert not missing, f"write patchc/diagnostics/pages/{missing[0]}.md (missing: {', '.join(missing)})"
    unknown = sorted(set(codes()) - set(rules()))
    assert not unknown, f"no rule has the code of patchc/diagnostics/pages/{unknown[0]}.md"


@pytest.mark.parametrize("code", codes())
def test_a_page_says_what_the_registry_says(code: str) -> None:
    found, rule = page(code), rules()[code]
    said = (found.code, found.summary, found.severity, found.exit)
    assert said == (rule.code, rule.summary, rule.severity, rule.exit)
    assert len(found.text.splitlines()) <= LONGEST
    assert all(len(line) <= 160 or "```" in found.text for line in found.text.splitlines())


def test_an_unknown_code_names_the_nearest() -> None:
    with pytest.raises(PatchcError) as raised:
        page("unknown-nodes")
    (found,) = raised.value.diagnostics
    assert (found.code, found.fix, found.exit) == ("unknown-code", "did you mean `unknown-node`?", 2)


def test_a_page_without_its_first_lines_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text("# x\n")
    with pytest.raises(ValueError, match="does not begin"):
        read(tmp_path / "x.md")
