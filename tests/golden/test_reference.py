"""Every example of grammar/README.md: formatted, resolved to what reference.test has, run against the hooks backend,
with the results that the page shows. Together they have every construct and every name of the language.

`--regenerate` writes reference.test and the results in the page.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Case, read
from reference_examples import REFERENCE, Example, examples, write_files
from safetensors.torch import load_file

import patchc
from patchc.api import Model
from patchc.diagnostics import PatchcError, Source
from patchc.ir.printer import print_study
from patchc.parse import format_spec, parse, tree
from patchc.pipeline import Given, to_study
from patchc.report.expects import failed_expects
from patchc.report.results import Result
from patchc.report.tables import table_text
from patchc.resolve import data_files, metrics, outputs, scope, selectors
from patchc.resolve.model_choice import CHOICES, model_choice

RESOLVED = Path(__file__).parent / "reference.test"
EXAMPLES = examples()
RUN = [e for e in EXAMPLES if e.mark in ("", "standard")]
WRONG = [e for e in EXAMPLES if e.mark in ("wrong", "later")]
PARAMETERS: Mapping[str, str | int | float] = {"LAYER": 2, "FACTOR": 0.5, "FILE": "prompts.csv"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples' files are."""
    found = tmp_path_factory.mktemp("reference")
    write_files(found)
    return found


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    """The models that the examples name, each traced once."""
    return {}


def model_of(example: Example, models: dict[str, Model]) -> Model:
    text = "\n".join(line for line in example.spec().splitlines() if line.startswith("model "))
    choice = model_choice(parse(Source(example.name, text)))
    key = str((choice.name, choice.options))
    if key not in models:
        models[key] = patchc.load(choice)
    return models[key]


def given(example: Example) -> Given:
    return Given(parameters={k: v for k, v in PARAMETERS.items() if f"${{{k}}}" in example.text})


@pytest.mark.parametrize("example", [e for e in EXAMPLES if e.mark != "wrong"], ids=str)
def test_formatted(example: Example) -> None:
    text = example.as_one()
    assert format_spec(Source("a.patch", text)) == text


# ---- what comes of them


@pytest.mark.parametrize("example", RUN, ids=str)
def test_run(example: Example, folder: Path, models: dict[str, Model], pytestconfig: pytest.Config) -> None:
    (folder / "a.patch").write_text(example.spec(), encoding="utf-8")
    vectors = load_file(folder / "vectors.safetensors")
    model = model_of(example, models)
    compiled = model.compile(
        folder / "a.patch",
        tensors={"given": vectors["direction"]} if '"given"' in example.text else None,
        metrics={"spread": spread} if "spread" in example.text else None,
        parameters=given(example).parameters,
    )
    results = compiled.run(check="all", progress=False)
    for name, result in results.items():
        assert result.check is not None
        assert result.check.cells == len(result.experiment.cells), name
        assert not failed_expects(result), name
    if example.lines:
        compare(example.text, of_lines(example, results), pytestconfig)
    elif example.shown is not None:
        compare(example.shown, "".join(shown(r) for r in results.values()), pytestconfig)


def spread(logits: torch.Tensor) -> torch.Tensor:
    """A metric in Python."""
    return logits[:, -1].std(-1)


def of_lines(example: Example, results: Mapping[str, Result]) -> str:
    """The example with each `patch` line's number in a comment behind it."""
    width = max(map(len, example.lines)) + 2
    numbers = (f"{float(result.values['diff'][()]):.4g}" for result in results.values())
    lines = [f"{line:{width}}# {number}" for line, number in zip(example.lines, numbers, strict=True)]
    return example.text[: example.text.index(example.lines[0])] + "".join(f"{line}\n" for line in lines)


def shown(result: Result) -> str:
    """A result as the page has it: its unpatched metrics, then each cell, or one number."""
    lines: list[str] = []
    for metric in result.metrics:
        worlds = ", ".join(f"{value:.4g} in {world}" for world, value in result.baselines.get(metric, {}).items())
        if not result.dims:
            lines.append(f"{result.name}: {metric} = {float(result.values[metric][()]):.4g} (unpatched: {worlds})")
        else:
            lines.append(f"{result.name}: {metric} (unpatched: {worlds})")
    return "".join(f"{line}\n" for line in lines) + (table_text(result, "txt") if result.dims else "")


@pytest.mark.parametrize("example", WRONG, ids=str)
def test_refused(example: Example, folder: Path, models: dict[str, Model], pytestconfig: pytest.Config) -> None:
    found = refused(example, folder, models)
    if example.mark == "later":
        assert {d.code for d in found} == {"not-supported-yet"}
    assert example.shown is not None
    compare(example.shown, "".join(f"{d.code}: {d.message}\n" for d in found), pytestconfig)


def refused(example: Example, folder: Path, models: dict[str, Model]) -> Any:
    with pytest.raises(PatchcError) as error:
        print_study(*resolved(example, folder, models))
    return error.value.diagnostics


def compare(expected: str, found: str, config: pytest.Config) -> None:
    """What the page has against what came; numbers to one part in a hundred."""
    if config.getoption("--regenerate"):
        page = REFERENCE.read_text(encoding="utf-8")
        assert page.count(f"\n{expected}```\n") == 1
        REFERENCE.write_text(page.replace(f"\n{expected}```\n", f"\n{found}```\n"), encoding="utf-8")
        return
    number = re.compile(r"-?\d+\.?\d*(?:e[+-]?\d+)?")
    assert re.sub(r" +", " ", number.sub("N", found)) == re.sub(r" +", " ", number.sub("N", expected))
    for a, b in zip(number.findall(found), number.findall(expected), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-2, abs=1e-3)


# ---- what they resolve to


def resolved(example: Example, folder: Path, models: dict[str, Model]) -> tuple[Any, Any]:
    """The study of an example, and the graph of its model."""
    source, model = Source("a.patch", example.spec()), model_of(example, models)
    tensors = {"given": load_file(folder / "vectors.safetensors")["direction"]} if '"given"' in example.text else {}
    called = {"spread": spread} if "spread" in example.text else {}
    extra = Given(tensors=tensors, metrics=called, parameters=given(example).parameters)
    return to_study(parse(source), source, model.loaded, None, folder, extra)[0], model.graph


def test_resolved_forms(folder: Path, models: dict[str, Model], pytestconfig: pytest.Config) -> None:
    forms = {e.name: (e.spec(), print_study(*resolved(e, folder, models))) for e in RUN}
    found = [Case(RESOLVED, name, text, {"study": study}) for name, (text, study) in forms.items()]
    if pytestconfig.getoption("--regenerate"):
        RESOLVED.write_text("".join(case.text for case in found), encoding="utf-8")
    for expected, case in zip(read(RESOLVED), found, strict=True):
        assert expected.text == case.text


# ---- that nothing is left out


def parts(node: Any) -> Iterator[tree.Construct]:
    """Every construct in a tree."""
    if isinstance(node, tuple):
        for item in node:  # pyright: ignore[reportUnknownVariableType]
            yield from parts(item)
    elif isinstance(node, tree.Construct) and is_dataclass(node):
        yield node
        for f in fields(node):
            if f.name != "span":
                yield from parts(getattr(node, f.name))


@pytest.fixture(scope="module")
def constructs() -> list[tree.Construct]:
    return [part for e in EXAMPLES if e.mark != "wrong" for part in parts(parse(Source("a.patch", e.spec())))]


def test_every_construct(constructs: list[tree.Construct]) -> None:
    classes = {c for _, c in inspect.getmembers(tree, inspect.isclass) if issubclass(c, tree.Construct)}
    used = {type(part) for part in constructs}
    assert sorted(c.__name__ for c in classes - used - {tree.Construct}) == []


NAMES = {
    "nodes": scope.NODE_NAMES,
    "domains": scope.NUMBER_DOMAINS,
    "values": scope.VALUE_NAMES,
    "functions": (*scope.FUNCTION_NAMES, *metrics.FUNCTIONS),
    "sites": tuple(selectors.TAKES),
    "options": tuple(CHOICES),
    "pictures": tuple(outputs.SHOWN),
    "arguments": ("over", "by", "same", "seed", "std", "sigma", "resamples"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_every_name(kind: str, constructs: list[tree.Construct]) -> None:
    used = {part.text for part in constructs if isinstance(part, tree.Name)}
    assert [name for name in NAMES[kind] if name not in used] == []


def test_every_file_and_sign(constructs: list[tree.Construct]) -> None:
    texts = [part.text for part in constructs if isinstance(part, tree.Text)]
    suffixes = {*data_files.READERS, *outputs.RESULT_SUFFIXES, *outputs.TABLE_SUFFIXES, *outputs.PICTURE_SUFFIXES}
    assert sorted(s for s in suffixes if not any(text.endswith(s) for text in texts)) == []
    signs = {part.op for part in constructs if isinstance(part, tree.Expect)}
    assert signs == {"<", "<=", ">", ">=", "=="}
    kinds = {(part.kind, part.what is None) for part in constructs if isinstance(part, tree.Target)}
    assert kinds == {("node", False), ("edge", False), ("path", False), ("all", True), ("all", False)}
