"""`${NAME}` and `--set`: how values are read, where they stand, what is said where one is missing or not wanted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from patchc.diagnostics import PatchcError
from patchc.parse import tree
from patchc.resolve.model_choice import model_choice
from patchc.resolve.parameters import parameter_names, read_literal
from tests.unit.commands import DATA, HEADS, spec
from tests.unit.resolving import errors, experiment, study
from tests.unit.test_parse import WHOLE, parsed

if TYPE_CHECKING:
    from patchc.api import Model
    from tests.unit.commands import Run

WITH_MODEL = "model ${MODEL}\n" + DATA
LAYER = """
metric diff = logit(answer) - logit(wrong)
experiment heads { for h in head[${LAYER}, *] run ${WORLD} patch node h with corrupt measure diff }
""".replace("run ${WORLD}", "run clean")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1", -1),
        ("0.5", 0.5),
        (".5", 0.5),
        ("-1e-3", -0.001),
        ("gpt2", "gpt2"),
        (" Mary", " Mary"),
        ("", ""),
        ('"3"', "3"),
        ('"', '"'),
        ("inf", "inf"),
        ("nan", "nan"),
        ("1_000", "1_000"),
        (" 3", " 3"),
        ("٣", "٣"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_values_are_numbers_where_they_look_like_one(text: str, value: Any) -> None:
    assert read_literal(text) == value
    assert type(read_literal(text)) is type(value)


def test_the_names_of_a_spec_are_found_wherever_they_stand() -> None:
    assert parameter_names(parsed(WHOLE)) == ("H", "TAU")
    assert parameter_names(tree.Spec(())) == ()


def test_a_value_stands_wherever_a_literal_can() -> None:
    given = {"TEXT": "When Mary and John went to the shop", "A": " Mary", "P": -1, "L": 2, "HALF": 0.5, "OUT": "a.json"}
    text = """
data { clean ${TEXT} corrupt "When John and Mary went to the shop" answer {${A}, " Ann"} at s ${P} }
experiment e {
  for h in head[${L}, {0, ${L}}]
  run corrupt
  patch node h.z @ s with ${HALF} * clean + self
  measure logit(answer) as seen
  expect seen at head[${L}, 0] > -${HALF}
  save ${OUT}
}"""
    found = study(text, parameters=given)
    cell = found.experiments[0].cells[0]
    assert found.experiments[0].saves[0].path == "a.json"
    assert found.experiments[0].shape == (1, 2)
    assert 0.5 in [factor for factor, _ in cell.patches[0].value.terms]


def test_a_missing_value_says_how_to_give_it() -> None:
    (found,) = errors("experiment e { run clean patch node head[${L}, 0] with corrupt measure diff }")
    assert (found.code, found.fix) == ("unknown-parameter", "give it one: `--set L=...`")
    assert found.span is not None


def test_a_value_that_nothing_uses_names_what_the_spec_has() -> None:
    text = "experiment e { run clean patch node head[${LAYER}, 0] with corrupt measure diff }"
    (found,) = errors(text, parameters={"LAYER": 1, "LAYR": 2})
    assert (found.code, found.fix) == ("unused-parameter", "did you mean `LAYER`?")
    assert found.message == "the spec has no ${LAYR}; it has ${LAYER}"
    (found,) = errors(text.replace("${LAYER}", "1"), parameters={"X": 2})
    assert found.message == "the spec has no ${X}; it has no parameters"


@pytest.mark.parametrize("value", [True, None, [1], float("nan"), float("inf")])
def test_a_value_is_a_text_or_a_finite_number(value: Any) -> None:
    text = "experiment e { run clean patch node head[0, 0] with ${X} * corrupt measure diff }"
    assert [e.code for e in errors(text, parameters={"X": value})] == ["bad-parameter"]


@pytest.mark.parametrize(("text", "value"), [("head[${X}, 0]", "a"), ("head[${X}, 0]", 0.5)])
def test_a_value_of_the_wrong_kind(text: str, value: Any) -> None:
    (found,) = errors(
        f"experiment e {{ run clean patch node {text} with corrupt measure diff }}", parameters={"X": value}
    )
    assert found.code == "wrong-kind"


def test_the_model_statement_is_checked_before_the_rest() -> None:
    with pytest.raises(PatchcError, match="unused-parameter"):
        model_choice(parsed('model "gpt2"'), {"M": "gpt2"})
    assert model_choice(parsed("model ${M} bos=${B}"), {"M": "gpt2", "B": "true"}).options == (("bos", True),)


def test_experiments_differ_with_the_value() -> None:
    text = "run clean patch node head[${L}, 0] with corrupt"
    assert experiment(text, parameters={"L": 0}) != experiment(text, parameters={"L": 1})


# ---- from Python


def test_values_from_python_are_in_the_record(induction: Model) -> None:
    def ran(layer: int) -> Any:
        return induction.compile('model "x"' + DATA + LAYER, parameters={"LAYER": layer}).run(progress=False)

    first, second = ran(0), ran(1)
    assert first.record["parameters"] == {"LAYER": 0}
    assert first.record["spec"] == second.record["spec"]
    assert first.record != second.record
    assert first["heads"]["diff"].values.tolist() != second["heads"]["diff"].values.tolist()


def test_a_data_file_that_is_a_parameter_is_not_overwritten(induction: Model, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"clean": "a b c d a b c", "corrupt": "a b c d a e c"}]\n')
    path = tmp_path / "a.patch"
    body = "experiment e { run clean patch node head[0, 0] with corrupt measure kl(clean) save ${OUT} }"
    path.write_text(f'model "induction-2l"\ndata ${{FILE}}\n{body}')
    compiled = induction.compile(path, parameters={"FILE": "a.json", "OUT": "a.json"})
    with pytest.raises(PatchcError, match="overwrites-input"):
        compiled.check_files()


# ---- from the command line


def test_set_gives_the_model_and_an_index(run: Run) -> None:
    path = spec(WITH_MODEL, LAYER)
    given = ("--set", "MODEL=induction-2l", "--set", "LAYER=1")
    ran = run("run", path, *given, "--format", "json", "--quiet")
    assert ran.exit == 0
    assert ran.json["record"]["parameters"] == {"LAYER": 1, "MODEL": "induction-2l"}
    assert run("check", path, *given).exit == 0
    assert "heads" in run("plan", path, *given).out


def test_set_that_is_missing_or_not_wanted(run: Run) -> None:
    path = spec(WITH_MODEL, LAYER)
    missing = run("check", path, "--set", "MODEL=induction-2l")
    assert (missing.exit, missing.codes) == (1, ["unknown-parameter"])
    assert "--set LAYER=..." in missing.err
    assert run("run", path).codes == ["unknown-parameter"]
    misspelt = run("plan", path, "--set", "MODEL=induction-2l", "--set", "LAYR=1", "--set", "LAYER=1")
    assert (misspelt.exit, misspelt.codes) == (1, ["unused-parameter"])
    assert run("check", spec(WITH_MODEL, HEADS), "--set", "MODEL=induction-2l").exit == 0


@pytest.mark.parametrize("given", [("X",), ("X=1", "--set", "X=2")])
def test_set_that_is_no_setting_is_a_usage_error(run: Run, given: tuple[str, ...]) -> None:
    assert run("run", spec(WITH_MODEL, LAYER), "--set", *given).exit == 2
