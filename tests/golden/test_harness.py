"""The golden harness itself: what it reads, what it refuses, what it rewrites."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import compare, read

TWO = "-- first\n[case a]\nin\n\n[out]\n1\n\n-- second\n[case b]\nin b\n[out]\n2\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.test"
    path.write_text(TWO)
    return path


def test_cases_have_input_sections_and_remarks(file: Path) -> None:
    a, b = read(file)
    assert (a.name, a.input, a.sections, a.remark) == ("a", "in\n", {"out": "1\n"}, "-- first\n")
    assert (b.name, b.input, b.sections, b.remark) == ("b", "in b\n", {"out": "2\n"}, "\n-- second\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[case a]\nx\n[out]\n1\n[case a]\ny\n[out]\n2\n", "twice"),
        ("[case a]\nx\n[out]\n1\n[out]\n2\n", "twice"),
        ("x\n[case a]\nx\n", "before the first case"),
        ("[out]\nx\n", "before the first case"),
    ],
)
def test_what_would_go_unseen_is_refused(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read(file)


def test_a_difference_and_a_missing_section_fail(file: Path) -> None:
    a, _ = read(file)
    compare(a, {"out": "1", "more": "not looked at"}, regenerate=False)
    with pytest.raises(AssertionError, match="out"):
        compare(a, {"out": "2"}, regenerate=False)
    with pytest.raises(AssertionError, match="no"):
        compare(a, {"more": "1"}, regenerate=False)


def test_regenerating_changes_one_case_and_nothing_else(file: Path) -> None:
    compare(read(file)[1], {"out": "3"}, regenerate=True)
    assert file.read_text() == TWO.replace("in\n\n[out]", "in\n[out]").replace("\n2\n", "\n3\n")
