"""The whole printed form of a study parses back to an equal one."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import lark
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import patchc.ir.reader
from patchc.diagnostics import Source
from patchc.ir.graph import ResidualGraph
from patchc.ir.printer import print_study
from patchc.ir.reader import read_study
from patchc.ir.wording import RESERVED
from patchc.model.outline import outline
from patchc.parse import parse
from patchc.resolve import model_choice, resolve
from tests.drawn import network
from tests.drawn_studies import DrawStudy
from tests.unit.resolving import PARALLEL, SMALL

SEEDS = st.integers(0, 2**32)
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.patch"))
GRAMMAR = Path(patchc.ir.reader.__file__).with_name("study.lark").read_text()


@settings(max_examples=400, deadline=None)
@given(SEEDS, st.sampled_from([SMALL, replace(PARALLEL, d_mlp=8), None]))
def test_a_printed_study_parses_back(seed: int, graph: ResidualGraph | None) -> None:
    rng = Random(seed)
    graph = graph or network(rng)
    study = DrawStudy(rng, graph).study()
    text = print_study(study, graph, whole=True)
    assert read_study(text, graph) == study
    assert print_study(read_study(text, graph), graph, whole=True) == text


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_parses_back(path: Path) -> None:
    source = Source(path.name, path.read_text())
    spec = parse(source)
    choice = model_choice(spec)
    model = outline(choice.name, base=path.parent)
    study = resolve(spec, source, model.graph, model.tokenizer, base=path.parent, bos=model.bos).study
    assert read_study(print_study(study, model.graph, whole=True), model.graph) == study


@settings(max_examples=200, deadline=None)
@given(SEEDS, st.text("{}()[]@:.,'\\ \n09*|->qz", max_size=4))
def test_any_other_text_is_a_value_error(seed: int, wrong: str) -> None:
    rng = Random(seed)
    text = print_study(DrawStudy(rng, SMALL).study(), SMALL, whole=True)
    at = rng.randrange(len(text))
    with suppress(ValueError):
        read_study(text[:at] + wrong + text[at + rng.randrange(6) :], SMALL)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model __import__('os')",
        "model 'm' prompts 2, of 3, 4, 5 tokens",
        "model 'm' prompts 1, of 3 tokens world w: [] experiment e: run w, 1 cell patch nobody with w",
        "model 'm' prompts 1, of 3 tokens world w: [] experiment e: run w, 2 cells patch mlp[0] with w",
        "model 'm' prompts 1, of 3 tokens world w: [] experiment e: run w, 1 cell patch mlp[0] @ {7} with w",
        "model 'm' prompts 1, of 3 tokens world w: [] experiment e: run w, 1 cell patch " + "(" * 5000,
        "model 'm' prompts 1, of 3 tokens world w: [] experiment e: run w, 1 cell patch "
        + "(" * 5000
        + "any"
        + ")*" * 5000
        + " with w",
    ],
)
def test_what_is_no_printed_study_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match="this is no study of small printed whole"):
        read_study(text, SMALL)


def test_the_grammar_has_no_conflict_and_every_word_of_it_is_reserved() -> None:
    parser = lark.Lark(GRAMMAR, parser="lalr", start="study", strict=True)
    words = {t.pattern.value for t in parser.terminals if t.pattern.type == "str" and t.pattern.value.isalpha()}
    assert words | {"inf", "nan"} == RESERVED


def test_every_rule_of_the_grammar_is_read() -> None:
    rules = {r.alias or r.origin.name for r in patchc.ir.reader._parser().rules}  # pyright: ignore[reportPrivateUsage]
    missing = {r for r in rules if not r.startswith("_") and not hasattr(patchc.ir.reader._Reader, r)}
    assert missing == set()
