"""Diagnostics as text, where the carets must stand under their place, and as data."""

from __future__ import annotations

import json
import re

import pytest

from patchc.diagnostics import Diagnostic, Note, Severity, Source, Span
from patchc.diagnostics.render import WIDEST, render, to_json


def at(text: str, what: str, **more: object) -> Diagnostic:
    source = Source("a.patch", text)
    span = Span(source, text.index(what), text.index(what) + len(what))
    return Diagnostic("some-code", "what is wrong", span, **more)  # type: ignore[arg-type]


def test_a_whole_diagnostic() -> None:
    text = "model\nlet a = head\nlet a = mlp"
    source = Source("specs/a.patch", text)
    note = Note("`a` is declared here", Span(source, 10, 11))
    found = Diagnostic("name-clash", "`a` is declared twice", Span(source, 23, 24), notes=(note,), fix="use another")
    assert render([found], color=False) == (
        "error[name-clash]: `a` is declared twice\n"
        " --> specs/a.patch:3:5\n"
        "  |\n"
        "3 | let a = mlp\n"
        "  |     ^\n"
        "  = note: `a` is declared here\n"
        " --> specs/a.patch:2:5\n"
        "  |\n"
        "2 | let a = head\n"
        "  |     ^\n"
        "  = help: use another\n"
    )


def test_without_a_place_the_message_stands_alone() -> None:
    found = Diagnostic("some-code", "look", severity=Severity.WARNING, fix="so")
    assert render([found], color=False) == "warning[some-code]: look\n  = help: so\n"
    assert render([], color=False) == ""


def test_a_blank_line_between_two() -> None:
    one = Diagnostic("a", "x")
    assert render([one, one], color=False) == "error[a]: x\n\nerror[a]: x\n"


@pytest.mark.parametrize(
    ("before", "columns"),
    [("", 0), ("\t", 4), ("日本 ", 5), ("e\u0301", 1), ("🙂", 2), ("\x1b[31m", 5), ("a\tb", 6)],
)
def test_carets_stand_under_their_place(before: str, columns: int) -> None:
    lines = render([at(f"{before}head", "head")], color=False).splitlines()
    assert lines[-1] == "  | " + " " * columns + "^^^^"


def test_wide_characters_have_two_carets() -> None:
    assert render([at("a 日本 b", "日本")], color=False).endswith("|   ^^^^\n")


def test_several_lines_are_marked_on_the_first() -> None:
    assert render([at("let (a\n b) c", "(a\n b)")], color=False).splitlines()[-2:] == [
        "1 | let (a",
        "  |     ^^",
    ]


def test_the_end_of_the_file_has_a_caret() -> None:
    source = Source("a", "let a\n")
    assert render([Diagnostic("c", "m", Span(source, 6, 6))], color=False).splitlines()[-2:] == [
        "2 |",
        "  | ^",
    ]


@pytest.mark.parametrize("offset", [0, 100, 500, 990])
def test_of_a_long_line_what_matters_is_shown(offset: int) -> None:
    text = "x" * offset + "NEEDLE" + "x" * (994 - offset)
    *_, line, carets = render([at(text, "NEEDLE")], color=False).splitlines()
    assert len(line) <= WIDEST + 4
    assert line.index("NEEDLE") == carets.index("^")
    assert carets.count("^") == 6


def test_nothing_steers_the_terminal() -> None:
    found = Diagnostic("c", "bad \x1b]0;title\x07", Span(Source("\x1bname", "\x1b[2J"), 0, 1), fix="\x9b")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", render([found], color=False))


def test_colour_changes_no_character() -> None:
    found = [at("let a = head", "head", notes=(Note("n"),), fix="f")]
    colored = render(found, color=True)
    assert "\x1b[1;31merror" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == render(found, color=False)


def test_as_data() -> None:
    found = at("one\nlet 🙂 = (a\n| b)", "(a\n| b)", notes=(Note("n"),), fix="f")
    expected = {
        "code": "some-code",
        "severity": "error",
        "message": "what is wrong",
        "file": "a.patch",
        "line": 2,
        "column": 9,
        "end_line": 3,
        "end_column": 5,
        "fix": "f",
    }
    (made,) = json.loads(json.dumps(to_json([found])))
    (note,) = made.pop("notes")
    assert made == expected
    places = ("file", "line", "column", "end_line", "end_column")
    assert note == {"message": "n", **dict.fromkeys(places)}
    (bare,) = to_json([Diagnostic("c", "m")])
    assert all(bare[place] is None for place in places)
    assert (bare["fix"], bare["notes"]) == (None, [])
