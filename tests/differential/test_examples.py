"""Every example spec runs, agrees with the hooks backend, and does what it expects, in few passes."""

from __future__ import annotations

import shutil
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
from tests.grammar_texts import spaced

EXAMPLES = Path(__file__).parents[2] / "examples"
MOST_PASSES = 4


@pytest.fixture(scope="module")
def model() -> patchc.Model:
    return patchc.load("ioi-tiny")


@pytest.mark.parametrize("spec", sorted(EXAMPLES.glob("*.patch")), ids=lambda p: p.stem)
def test_example(spec: Path, model: patchc.Model, tmp_path: Path) -> None:
    copy = Path(shutil.copy(spec, tmp_path))
    results = model.compile(copy).run(check="all", progress=False)
    for name, result in results.items():
        assert result.passes <= MOST_PASSES, name
        assert result.check is not None
        assert result.check.cells == len(result.experiment.cells), name
        assert result.check.max_abs_diff <= 1e-4, name
        assert not failed_expects(result), name
    assert max(r.check.largest_effect for r in results.values() if r.check is not None) > 1.0
    assert all(path.stat().st_size for r in results.values() for path in r.files)


@pytest.mark.parametrize("spec", sorted(EXAMPLES.glob("*.patch")), ids=lambda p: p.stem)
def test_formatting_changes_no_experiment(spec: Path, model: patchc.Model) -> None:
    rng = Random(0)
    words = [str(token) for token in parser().lex(spec.read_text(encoding="utf-8"))]
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
