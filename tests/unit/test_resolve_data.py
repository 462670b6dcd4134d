"""Data: files, Python's records and token ids, tokenizers, and what can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from patchc.diagnostics import PatchcError
from patchc.ir.experiment import FromWorld
from tests.unit.resolving import SMALL, Words, about, errors, resolved, study

PATCH = "experiment e { run clean patch node mlp[0] with corrupt measure logit(answer) }\n"
AT_NAME = "experiment e { run clean patch node mlp[0] @ name with corrupt measure logit(answer) }\n"
RECORDS = [
    {"clean": "When Mary and John", "corrupt": "When Ann and John", "answer": " went", "name": 1},
    {"clean": "After Tom went", "corrupt": "After Ann went", "answer": [" left", " sat"], "name": [1, 2]},
]


def write(path: Path, *lines: Any) -> None:
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")


def test_a_file_of_prompts(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *RECORDS)
    found = study('data "p.jsonl" { at end -1 }\n' + AT_NAME, base=tmp_path)
    assert found.prompts.layout.lengths == (4, 3)
    assert found.prompts.texts[1] == ("After", " Tom", " went")
    assert [w.name for w in found.prompts.worlds] == ["clean", "corrupt"]
    tokens = found.experiments[0].cells[0].patches[0].path.parts[0].tokens  # type: ignore[union-attr]
    assert found.prompts.layout.numbers(tokens) == [1, 5, 6]


def test_a_byte_order_mark_and_empty_lines_are_passed_over(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps(RECORDS[0]) + "\r\n\r\n\n" + json.dumps(RECORDS[1])
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    assert study('data "p.jsonl"\n' + PATCH, base=tmp_path).prompts.layout.n_prompts == 2


@pytest.mark.parametrize(
    ("written", "lengths"),
    [("[0]", (4,)), ("[-1]", (3,)), ("[..1]", (4, 3)), ("[{1, 0}]", (3, 4)), ("[1..]", (3,))],
)
def test_a_slice_of_a_file(tmp_path: Path, written: str, lengths: tuple[int, ...]) -> None:
    write(tmp_path / "p.jsonl", *RECORDS)
    assert study(f'data "p.jsonl"{written}\n' + PATCH, base=tmp_path).prompts.layout.lengths == lengths


@pytest.mark.parametrize("written", ["[2]", "[..99]", "[1..0]"])
def test_a_slice_outside_the_file(tmp_path: Path, written: str) -> None:
    write(tmp_path / "p.jsonl", *RECORDS)
    (found,) = errors(f'data "p.jsonl"{written}\n' + PATCH, base=tmp_path)
    assert found.code == "data-slice"


def test_bad_lines_are_shown_where_they_are(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", RECORDS[0], '{"clean": ', "[1]")
    found = errors('data "p.jsonl"\n' + PATCH, base=tmp_path)
    assert [d.code for d in found] == ["bad-json", "bad-json"]
    assert [(d.span.source.name, d.span.source.position(d.span.start)[0]) for d in found if d.span] == [
        ("p.jsonl", 2),
        ("p.jsonl", 3),
    ]


def test_many_bad_lines_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *["no"] * 50)
    found = errors('data "p.jsonl"\n' + PATCH, base=tmp_path)
    assert len(found) == 6
    assert "45 more lines" in "".join(d.message for d in found)


def test_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", "", "")
    (found,) = errors('data "p.jsonl"\n' + PATCH, base=tmp_path)
    assert (found.code, about(found)) == ("empty-data", '"p.jsonl"')


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_bytes(b'{"clean": "\xff"}')
    (found,) = errors('data "p.jsonl"\n' + PATCH, base=tmp_path)
    assert found.code == "not-utf8"
    assert "UTF-8" in found.message


def test_no_data_at_all() -> None:
    (found,) = errors("metric m = logit(answer)\n" + PATCH, data=[])
    assert found.code == "empty-data"


def test_a_column_that_one_record_lacks(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", RECORDS[0], {"clean": "After Tom", "answer": " went"})
    (found,) = errors('data "p.jsonl"\n' + PATCH, base=tmp_path)
    assert found.code == "missing-column"
    assert found.span is not None
    assert found.span.source.name == "p.jsonl"
    assert "prompt 1" in found.message


def test_keys_that_nothing_uses_may_be_anything(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", RECORDS[0] | {"input": {"a": 1}, "head": None, "template": "ABBA"})
    assert resolved('data "p.jsonl"\n' + PATCH, base=tmp_path).warnings == ()


# ---- Python


def test_records_from_python() -> None:
    found = study(AT_NAME, data=RECORDS)
    assert found.prompts.layout.lengths == (4, 3)


def test_a_data_frame_is_its_records() -> None:
    frame = pd.DataFrame(RECORDS)
    assert study(AT_NAME, data=frame) == study(AT_NAME, data=RECORDS)


def test_a_missing_cell_of_a_data_frame_is_a_column_that_the_prompt_lacks() -> None:
    frame = pd.DataFrame([*RECORDS, {k: v for k, v in RECORDS[0].items() if k != "corrupt"}])
    (found,) = errors(PATCH, data=frame)
    assert (found.code, "prompt 2 has no column 'corrupt'" in found.message) == ("missing-column", True)


class Ids:
    """As much of a tensor as `resolve` looks at."""

    def __init__(self, values: Any):
        self._values = values

    def tolist(self) -> Any:
        return self._values


def test_token_ids_need_no_tokenizer() -> None:
    data = {"clean": Ids([[3, 4, 5], [6, 7, 8]]), "corrupt": [[3, 9, 5], [6, 10, 8]], "answer": Ids([11, 12])}
    found = resolved(PATCH, data=data, tokenizer=NoTokenizer()).study
    assert found.prompts.world("corrupt").ids == ((3, 9, 5), (6, 10, 8))
    assert found.experiments[0].metrics[0].expression.answers == ((11,), (12,))  # type: ignore[union-attr]


class NoTokenizer:
    """Any call is a mistake."""

    bos_token_id = None

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def test_positions_of_the_spec_hold_for_data_from_python() -> None:
    text = "data { at end -1 }\nexperiment e { run clean patch node mlp[0] @ end with corrupt measure correct }"
    assert study(text, data=RECORDS).prompts.layout.n_prompts == 2


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ("text", "not str"),
        (3, "not int"),
        ({"clean": "When"}, "column 'clean'"),
        ({"clean": ["When"], "corrupt": ["When", "Ann"]}, "clean has 1, corrupt has 2"),
        ([], "no prompt"),
    ],
)
def test_data_that_is_no_data(data: Any, told: str) -> None:
    (found,) = errors(PATCH, data=data)
    assert told in found.message


@pytest.mark.parametrize("ids", [[3, 60], [-1, 3]])
def test_an_id_outside_the_vocabulary(ids: list[int]) -> None:
    (found,) = errors(PATCH, data={"clean": [ids], "corrupt": [[3, 3]], "answer": [5]})
    assert found.code == "bad-token-id"
    assert "vocabulary of 60" in found.message


# ---- tokenizers

ONE = 'data { clean "When Mary" corrupt "When Ann" answer " went" at it " Mary" at end -1 }\n'


def test_special_tokens_are_counted() -> None:
    found = study(ONE + PATCH, tokenizer=Words(bos=True))
    assert found.prompts.layout.lengths == (3,)
    assert found.prompts.texts[0][0] == "<bos>"


@pytest.mark.parametrize(("option", "length"), [("", 3), (" bos=true", 3), (" bos=false", 2)])
def test_bos_can_be_asked_for_and_left_off(option: str, length: int) -> None:
    found = study(f'model "small"{option}\n' + ONE + PATCH, tokenizer=Words(bos=True))
    assert found.prompts.layout.lengths == (length,)


def test_bos_from_python_is_stronger() -> None:
    assert study(
        'model "small" bos=true\n' + ONE + PATCH, tokenizer=Words(bos=True), bos=False
    ).prompts.layout.lengths == (2,)


def test_no_bos_to_add() -> None:
    codes = {d.code for d in errors('model "small" bos=true\n' + ONE + PATCH)}
    assert codes == {"no-bos"}


def test_the_opening_word_is_found_after_a_bos_token() -> None:
    text = 'data { clean "Mary and John" corrupt "Ann and John" answer " Mary" at it answer first }\n'
    body = "experiment e { run clean patch node mlp[0] @ it with corrupt measure logit(answer) }"
    path: Any = study(text + body, tokenizer=Words(bos=True)).experiments[0].cells[0].patches[0].path
    assert path.parts[0].tokens == 1 << 1


def test_an_unknown_token_is_an_error_where_the_tokenizer_gives_one() -> None:
    text = 'data { clean "When Bob" corrupt "When Ann" answer " went" }\n'
    (found,) = errors(text + PATCH, tokenizer=Words(unknown=True))
    assert found.code == "unknown-token"
    assert "' Bob'" in found.message


class Lowering(Words):
    """A tokenizer that makes everything lower case."""

    def decode(self, ids: Any) -> str:
        return super().decode(ids).lower()


def test_an_answer_that_becomes_another_text() -> None:
    text = 'data { clean "When Mary" corrupt "When Ann" answer " Mary" }\n'
    (found,) = errors(text + PATCH, tokenizer=Lowering())
    assert (found.code, found.fix) == ("answer-not-as-written", 'write `" mary"`, if that is what you mean')


def test_a_word_that_is_only_known_with_its_space() -> None:
    tokenizer = Words()
    del tokenizer.ids["Mary"]
    (found,) = errors(
        'data { clean "When Ann" corrupt "When Tom" answer "Mary" }\n' + PATCH,
        tokenizer=tokenizer,
    )
    assert (found.code, found.fix) == ("multi-token-answer", 'write `" Mary"`')


def test_a_text_without_a_tokenizer() -> None:
    from patchc.resolve.encode import Encoder

    with pytest.raises(PatchcError) as raised:
        Encoder(None).prompt("When", None)
    assert raised.value.diagnostics[0].code == "no-tokenizer"
    assert Encoder(None).show(7) == "7"


# ---- worlds


def test_only_worlds_that_are_used_are_kept() -> None:
    text = 'data { clean "When Mary" corrupt "When Ann" other "When" answer " went" }\n'
    found = resolved(text + PATCH)
    assert [w.name for w in found.study.prompts.worlds] == ["clean", "corrupt"]
    assert [about(w) for w in found.warnings] == ['"When"']


def test_positions_are_found_in_the_first_text_column() -> None:
    text = 'data { template "AB" clean "When Mary" corrupt "When Ann" answer " Ann" at it " Mary" first }\n'
    body = "experiment e { run corrupt patch node mlp[0] @ it with clean measure logit(answer) }"
    tokenizer = Words()
    found = study(text + body, tokenizer=tokenizer)
    path: Any = found.experiments[0].cells[0].patches[0].path
    assert path.parts[0].tokens == 1 << 1
    assert found.prompts.worlds[0].name == "clean"
    assert found.experiments[0].cells[0].patches[0].value.terms == ((1.0, FromWorld("clean")),)


def test_every_error_of_the_data_is_reported_once(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", {"clean": "When Bob", "corrupt": "When Ann", "answer": " went"})
    body = "run clean patch node mlp[0] with corrupt patch node mlp[1] with clean measure correct, kl(clean)"
    found = errors(f'data "p.jsonl"\nexperiment e {{ {body} }}\nexperiment f {{ {body} }}', base=tmp_path)
    assert [d.code for d in found] == ["unknown-token"]


def test_labels_only_where_all_prompts_have_one_length() -> None:
    body = "for p in -2..-1, l in layers run clean patch node resid_pre[l] @ p with corrupt measure correct"
    experiment = study(f"experiment e {{ {body} }}", data=RECORDS).experiments[0]
    assert experiment.dims[0].labels is None


def test_the_models_context_is_the_limit() -> None:
    assert SMALL.n_ctx == 16
    long = " ".join(["When"] + ["and"] * 15)
    text = f'data {{ clean "{long}" corrupt "{long} and" answer " went" }}\n'
    assert [d.code for d in errors(text + PATCH)] == ["text-too-long"]
