"""Every example spec runs, agrees with the hooks backend, and does what it expects, in few passes."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from random import Random

import pytest

import patchc
from patchc.diagnostics import Source
from patchc.ir.experiment import Study
from patchc.parse import format_spec, parse
from patchc.parse.parser import parser
from patchc.pipeline import Given, to_study
from patchc.report.expects import failed_expects
from patchc.resolve.model_choice import model_choice
from tests.grammar_texts import spaced

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_PASSES = 4


SPECS = sorted(EXAMPLES.glob("*.patch"))
DATA = [path for suffix in ("csv", "jsonl") for path in EXAMPLES.glob(f"*.{suffix}")]


@cache
def load(name: str) -> patchc.Model:
    """A model that examples name, traced once for all of them: leave it as it is."""
    return patchc.load(name)


def model_of(text: str) -> patchc.Model:
    return load(model_choice(parse(Source("a.patch", text))).name)


@pytest.fixture(scope="module")
def model() -> patchc.Model:
    return load("ioi-tiny")


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_example(spec: Path, tmp_path: Path) -> None:
    for path in (spec, *DATA):
        shutil.copy(path, tmp_path)
    compiled = model_of(spec.read_text(encoding="utf-8")).compile(tmp_path / spec.name)
    assert not compiled.warnings
    results = compiled.run(check="all", progress=False)
    for name, result in results.items():
        assert result.passes <= MOST_PASSES, name
        assert result.check is not None
        assert result.check.cells == len(result.experiment.cells), name
        assert result.check.max_abs_diff <= 1e-4, name
        assert not failed_expects(result), name
    assert max(r.check.largest_effect for r in results.values() if r.check is not None) > 1.0
    assert all(path.stat().st_size for r in results.values() for path in r.files)


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_is_formatted(spec: Path) -> None:
    text = spec.read_text(encoding="utf-8")
    assert format_spec(Source(spec.name, text)) == text


@pytest.mark.parametrize("spec", SPECS, ids=lambda p: p.stem)
def test_formatting_changes_no_experiment(spec: Path) -> None:
    rng, written = Random(0), spec.read_text(encoding="utf-8")
    model, words = model_of(written), [str(token) for token in parser().lex(written)]
    text = spaced(rng, words)
    assert study(format_spec(Source(spec.name, text)), model) == study(text, model)


def study(text: str, model: patchc.Model) -> Study:
    source = Source("a.patch", text)
    return to_study(parse(source), source, model.loaded, None, EXAMPLES, Given())[0]


def test_cores_that_share_an_input_but_not_its_projection(model: patchc.Model) -> None:
    """One core reads its query where the shared input has not changed, another projects that input for other heads:
    each is read by its own columns."""
    spec = (
        (EXAMPLES / "ioi.patch").read_text(encoding="utf-8").partition("experiment")[0]
        + """
    experiment shared {
      run corrupt
      patch path head[0, 0] @ s2 -> (head[1, 1] | (head[1, 0].q -> head[2, 0])) -> logits with clean
      measure diff
    }"""
    )
    result = model.compile(spec).run(check="all", progress=False)["shared"]
    assert result.check is not None
    assert result.check.largest_effect > 10 * result.check.max_abs_diff
