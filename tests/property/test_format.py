"""Formatting: what it may change (white space) and what not, on random specs with comments between any two words."""

from __future__ import annotations

import re
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchc.diagnostics import PatchcError, Source
from patchc.parse import breaking, format_spec, parse, print_spec, tree
from tests.grammar_texts import spaced, tokens

SEEDS = st.integers(0, 2**32)
STATEMENTS = ("spec", "data", "let", "metric", "experiment")


def formatted(text: str) -> str:
    return format_spec(Source("a.patch", text))


def parsed(text: str) -> tree.Spec:
    return parse(Source("a.patch", text))


def comments_of(text: str) -> list[str]:
    """Every comment: a text may hold a `#` too."""
    return [c.rstrip() for c in re.findall(r'"(?:[^"\\\n]|\\.)*"|(#[^\n]*)', text) if c]


def drawn(seed: int, comments: float) -> str:
    """A spec that parses: a derivation may nest too deep or repeat a sign."""
    rng = Random(seed)
    while True:
        text = spaced(rng, tokens(rng, rng.choice(STATEMENTS), rng.choice([10, 40, 120])), comments)
        try:
            parsed(text)
        except PatchcError:
            continue
        return text


@given(SEEDS, st.sampled_from([0, 0.02, 0.3]))
@settings(max_examples=200, deadline=None)
def test_formatting_keeps_everything_and_is_done_once(seed: int, comments: float) -> None:
    text = drawn(seed, comments)
    once = formatted(text)
    assert parsed(once) == parsed(text)
    assert comments_of(once) == comments_of(text)
    assert formatted(once) == once
    assert once == "" or once.endswith("\n")
    assert not once.startswith("\n")
    assert "\n\n\n" not in once


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_line_breaks_and_spaces_make_no_difference(seed: int) -> None:
    rng = Random(seed)
    words = tokens(rng)
    plain = " ".join(words)
    try:
        parsed(plain)
    except PatchcError:
        return
    once_a_line = formatted("\n".join(words))
    assert formatted(plain) == once_a_line == formatted(once_a_line.replace("\n", "\r\n"))


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_words_stand_as_the_printer_puts_them(seed: int) -> None:
    """The printer of trees and the formatter agree on spaces; line breaks and columns aside."""
    printed = print_spec(parsed(drawn(seed, 0)))
    with patch.object(breaking, "WIDTH", 10**9):
        assert formatted(printed).split() == printed.split()


def test_no_row_is_too_long_where_there_is_a_place_to_break_it() -> None:
    heads = " | ".join(f"head[{i}, {{0, 1, 2}}]" for i in range(20))
    text = f"let a = {heads}\nlet b = f({heads})\nexperiment x {{ for h in {{{', '.join(map(str, range(99)))}}} }}"
    rows = formatted(text).splitlines()
    assert max(map(len, rows)) <= breaking.WIDTH
    assert len(rows) > 30


@pytest.mark.parametrize("text", ["", "\n\n", " \t", "\ufeff"])
def test_an_empty_spec_stays_empty(text: str) -> None:
    assert formatted(text) == ""


def test_a_spec_that_does_not_parse_is_not_formatted() -> None:
    with pytest.raises(PatchcError):
        formatted("experiment {")
