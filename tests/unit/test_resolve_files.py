"""Data files: every format that is read, where their errors point, and what is not opened."""

from __future__ import annotations

import csv
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchc.diagnostics import Diagnostic
from patchc.ir.experiment import Read, Study
from patchc.resolve import data_files, files, tables
from tests.unit.resolving import Words, about, errors, resolved, study

PATCH = "experiment e { run clean patch node mlp[0] with corrupt measure logit(answer) }\n"
AT_NAME = "experiment e { run clean patch node mlp[0] @ name with corrupt measure logit(answer) }\n"
RECORDS: list[dict[str, Any]] = [
    {"clean": "When Mary and John", "corrupt": "When Ann and John", "answer": " went", "name": 1},
    {"clean": "After Tom went", "corrupt": "After Ann went", "answer": " left", "name": 2},
]


def found_in(tmp_path: Path, name: str, content: Any, body: str = AT_NAME, **options: Any) -> Study:
    write(tmp_path / name, content)
    return study(f'data "{name}"\n' + body, base=tmp_path, **options)


def wrong_in(tmp_path: Path, name: str, content: Any, body: str = PATCH) -> Diagnostic:
    """The one thing that is wrong."""
    write(tmp_path / name, content)
    found = errors(f'data "{name}"\n' + body, base=tmp_path)
    assert len(found) == 1, found
    return found[0]


def write(path: Path, content: Any) -> None:
    match content:
        case bytes():
            path.write_bytes(content)
        case str():
            path.write_text(content, encoding="utf-8")
        case _:
            path.write_text(json.dumps(content), encoding="utf-8")


def patched_tokens(found: Study) -> list[int]:
    path: Any = found.experiments[0].cells[0].patches[0].path
    return found.prompts.layout.numbers(path.parts[0].tokens)


def place(diagnostic: Diagnostic) -> tuple[str, int, int]:
    assert diagnostic.span is not None
    return (diagnostic.span.source.name, *diagnostic.span.source.position(diagnostic.span.start))


# ---- one data set, every format


def as_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))


def as_json(path: Path) -> None:
    path.write_text(json.dumps(RECORDS, indent=2))


def as_autocircuit(path: Path) -> None:
    prompts = [{"answers" if k == "answer" else k: v for k, v in r.items()} for r in RECORDS]
    path.write_text(json.dumps({"seq_labels": None, "word_idxs": {}, "prompts": prompts}))


def as_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(RECORDS[0]))
        writer.writeheader()
        writer.writerows(RECORDS)


def as_parquet(path: Path) -> None:
    pd.DataFrame(RECORDS).to_parquet(path)


FORMATS = {
    "p.jsonl": as_jsonl,
    "p.json": as_json,
    "a.json": as_autocircuit,
    "p.csv": as_csv,
    "p.parquet": as_parquet,
    "P.JSONL": as_jsonl,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_study(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    found = study(f'data "{name}"\n' + AT_NAME, base=tmp_path)
    assert found == study(AT_NAME, data=RECORDS)
    assert patched_tokens(found) == [1, 6]


@pytest.mark.parametrize("name", FORMATS)
def test_a_slice_of_every_format(tmp_path: Path, name: str) -> None:
    FORMATS[name](tmp_path / name)
    assert study(f'data "{name}"[1..]\n' + AT_NAME, base=tmp_path) == study(AT_NAME, data=RECORDS[1:])


def test_blocks_and_files_stand_in_the_order_of_the_spec(tmp_path: Path) -> None:
    as_csv(tmp_path / "p.csv")
    as_parquet(tmp_path / "p.parquet")
    block = 'data { clean "When Tom" corrupt "When Ann" answer " went" at name 0 }\n'
    found = study(f'data "p.csv"[0]\n{block}data "p.parquet"[1]\n' + AT_NAME, base=tmp_path)
    assert found.prompts.layout.lengths == (4, 2, 3)
    assert patched_tokens(found) == [1, 4, 8]


def test_answer_sets_of_lists(tmp_path: Path) -> None:
    records = [r | {"answer": [" left", " sat"]} for r in RECORDS]
    pd.DataFrame(records).to_parquet(tmp_path / "p.parquet")
    by_parquet = study('data "p.parquet"\n' + PATCH, base=tmp_path)
    assert by_parquet == found_in(tmp_path, "p.json", records, PATCH)
    read = by_parquet.experiments[0].metrics[0].expression
    assert isinstance(read, Read)
    assert len(read.answers[0]) == 2


def test_a_column_of_the_spec_holds_for_every_prompt_of_a_file(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "p.jsonl")
    found = study('data "p.jsonl" { answer " keys" }\n' + PATCH, base=tmp_path)
    expression = found.experiments[0].metrics[0].expression
    assert isinstance(expression, Read)
    assert expression.answers == ((Words().ids[" keys"],),) * 2


@pytest.mark.parametrize("name", ["p.txt", "p", "p.pkl", "p.jsonl.gz"])
def test_another_suffix_is_told_what_is_read(tmp_path: Path, name: str) -> None:
    found = wrong_in(tmp_path, name, "{}")
    assert found.code == "unknown-data-format"
    assert ".jsonl .json .csv .parquet" in found.message


def test_an_absolute_path_and_one_upwards_are_read_as_named(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "p.jsonl")
    (tmp_path / "below").mkdir()
    for name in (tmp_path / "p.jsonl", "../p.jsonl"):
        assert study(f'data "{name}"\n' + PATCH, base=tmp_path / "below").prompts.n == 2


# ---- AutoCircuit


def autocircuit(**more: Any) -> dict[str, Any]:
    prompt = {"clean": "When Mary went", "corrupt": "When Ann went", "answers": [" left"], "wrong_answers": [" sat"]}
    return {"prompts": [prompt], **more}


@pytest.mark.parametrize(("bos", "token"), [(False, 1), (True, 2)])
def test_autocircuits_positions_count_no_bos_token(tmp_path: Path, bos: bool, token: int) -> None:
    content = autocircuit(word_idxs={"name": 1, "S1+1": 2}, seq_labels=["a", "b"])
    found = found_in(tmp_path, "a.json", content, tokenizer=Words(bos=bos))
    assert patched_tokens(found) == [token]


def test_autocircuits_answers_are_the_columns_answer_and_wrong(tmp_path: Path) -> None:
    body = "experiment e { run clean patch node mlp[0] with corrupt measure prob(answer) - prob(wrong) }"
    assert found_in(tmp_path, "a.json", autocircuit(), body).prompts.n == 1


def test_an_answer_of_autocircuit_may_be_one_text(tmp_path: Path) -> None:
    content = autocircuit()
    content["prompts"][0]["answers"] = " left"
    assert found_in(tmp_path, "a.json", content, PATCH) == found_in(tmp_path, "b.json", autocircuit(), PATCH)


def test_an_error_of_an_answer_points_to_what_is_written(tmp_path: Path) -> None:
    content = autocircuit()
    content["prompts"][0]["answers"] = [" Bob"]
    found = wrong_in(tmp_path, "a.json", content)
    assert (found.code, about(found)) == ("unknown-token", '[" Bob"]')


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"prompt": []}, "bad-prompt-file"),
        ("3", "bad-prompt-file"),
        ({"prompts": {}}, "bad-prompt-file"),
        (autocircuit(word_idxs=[1]), "bad-prompt-file"),
        (autocircuit(word_idxs={"a": "b"}), "bad-prompt-file"),
        ({"prompts": [3]}, "bad-json"),
        ([[]], "bad-json"),
        ([], "empty-data"),
        ({"prompts": []}, "empty-data"),
    ],
)
def test_json_that_holds_no_prompts(tmp_path: Path, content: Any, code: str) -> None:
    assert wrong_in(tmp_path, "a.json", content).code == code


# ---- where errors point


def test_an_error_points_to_the_value_in_a_file(tmp_path: Path) -> None:
    records = [RECORDS[0], RECORDS[1] | {"corrupt": "After Bob went"}]
    found = wrong_in(tmp_path, "p.jsonl", "".join(json.dumps(r) + "\n" for r in records))
    assert about(found) == '"After Bob went"'
    assert place(found) == ("p.jsonl", 2, json.dumps(records[1]).index('"After Bob') + 1)
    found = wrong_in(tmp_path, "p.json", json.dumps(records, indent=1))
    assert (about(found), place(found)[:2]) == ('"After Bob went"', ("p.json", 10))


def test_an_error_points_to_the_line_of_a_csv_file(tmp_path: Path) -> None:
    text = 'clean,corrupt,answer,note\nWhen Tom,When Ann, went,"two\nlines"\nWhen Mary,When Bob, went,\n'
    found = errors_of_csv(tmp_path, text)
    assert (about(found), place(found)) == ("When Mary,When Bob, went,", ("p.csv", 4, 1))


def errors_of_csv(tmp_path: Path, text: str) -> Diagnostic:
    return wrong_in(tmp_path, "p.csv", text)


def test_the_place_in_a_file_of_one_long_line_is_shown(tmp_path: Path) -> None:
    from patchc.diagnostics.render import render

    records = [*RECORDS, RECORDS[0] | {"corrupt": "When Bob and John", "more": "x" * 3_000_000}, RECORDS[1]]
    found = wrong_in(tmp_path, "p.json", json.dumps(records))
    text = render([found], color=False)
    assert "When Bob and John" in text
    assert "^" * len('"When Bob and John"') in text


# ---- JSON, strictly


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"clean": NaN}', "NaN"),
        ('{"clean": -Infinity}', "Infinity"),
        ('{"clean": "a", "clean": "b"}', "'clean' stands twice"),
        ('{"clean": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "nested"),
        ('{"a": ' * 100_000, "nested"),
        ('{"clean": "a"} {"clean": "b"}', "line of its own"),
        ('{"clean": ' + "9" * 5000 + "}", "digits"),
        ('{"clean": "a"', "delimiter"),
        ("{'clean': 1}", "double quotes"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_json_is_read_strictly(tmp_path: Path, name: str, line: str, told: str) -> None:
    text = line if name == "p.jsonl" else f"[{line}]"
    found = wrong_in(tmp_path, name, text)
    assert found.code == "bad-json"
    assert told in found.message or (name, told) == ("p.json", "line of its own")
    assert found.span is not None
    assert found.span.source.name == name


def test_a_prompt_does_not_run_over_its_line(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", '{"clean":\n"a"}')
    found = errors('data "p.jsonl"\n' + PATCH, base=tmp_path)
    assert [(d.code, place(d)[1]) for d in found] == [("bad-json", 1), ("bad-json", 2)]


def test_a_deep_cell_is_an_error_and_no_crash(tmp_path: Path) -> None:
    for depth in (50, 300, 800, 900, 950):
        text = json.dumps(RECORDS[0])[:-1] + f', "clean2": {"[" * depth}{"]" * depth}}}'
        body = PATCH.replace("run clean", "run clean2")
        write(tmp_path / "p.jsonl", text)
        assert errors('data "p.jsonl"\n' + body, base=tmp_path)


# ---- csv


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "bad-table"),
        ("clean,corrupt,answer\n", "empty-data"),
        ("clean,clean,answer\na,b,c\n", "bad-table"),
        ("clean,,answer\na,b,c\n", "bad-table"),
        ("clean,corrupt,answer\na,b\n", "bad-table"),
        ("clean,corrupt,answer\na,b,c,d\n", "bad-table"),
        ('clean,corrupt,answer\n"a,b,c\n', "bad-table"),
        ('clean,corrupt,answer\n"a"b,c,d\n', "bad-table"),
    ],
)
def test_csv_that_is_no_table(tmp_path: Path, text: str, code: str) -> None:
    assert wrong_in(tmp_path, "p.csv", text).code == code


def test_a_cell_of_csv_is_text_and_an_empty_one_is_missing(tmp_path: Path) -> None:
    text = 'clean,corrupt,answer,name\r\n"When Mary, and",When Ann! and, went,1\r\n'.replace("!", ",")
    found = errors_of_csv(tmp_path, text)
    assert found.code == "bad-table"
    good = text.replace("When Ann, and", '"When Ann, and"')
    assert patched_tokens(found_in(tmp_path, "p.csv", good)) == [1]
    missing = wrong_in(tmp_path, "p.csv", good + "When Tom,When Ann,,0\n")
    assert (missing.code, about(missing)) == ("missing-column", "When Tom,When Ann,,0")


def test_a_number_in_a_csv_answer_is_text(tmp_path: Path) -> None:
    found = wrong_in(tmp_path, "p.csv", "clean,corrupt,answer\nWhen Mary,When Ann,17\n")
    assert found.code == "unknown-token"
    assert "'17'" in found.message


# ---- parquet


def test_cells_of_other_types_are_refused_by_column_and_prompt(tmp_path: Path) -> None:
    frame = pd.DataFrame([r | {"name": 1.5, "other": b"\x00"} for r in RECORDS])
    frame.to_parquet(tmp_path / "p.parquet")
    assert study('data "p.parquet"\n' + PATCH, base=tmp_path).prompts.n == 2
    (found,) = errors('data "p.parquet"\n' + AT_NAME, base=tmp_path)
    assert (found.code, "'name'" in found.message, "prompt 0 has 1.5" in found.message) == ("wrong-kind", True, True)
    (found,) = errors('data "p.parquet"\n' + PATCH.replace("clean", "other"), base=tmp_path)
    assert "prompt 0 has b'\\x00'" in found.message


def test_a_null_is_a_column_that_the_prompt_lacks(tmp_path: Path) -> None:
    pd.DataFrame([RECORDS[0], RECORDS[1] | {"corrupt": None}]).to_parquet(tmp_path / "p.parquet")
    (found,) = errors('data "p.parquet"\n' + PATCH, base=tmp_path)
    assert (found.code, about(found)) == ("missing-column", '"p.parquet"')
    assert "prompt 1" in found.message


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\x00" * 100 + b"PAR1", b"hello"])
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    assert wrong_in(tmp_path, "p.parquet", content).code == "bad-table"


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    as_parquet(tmp_path / "p.parquet")
    whole = (tmp_path / "p.parquet").read_bytes()
    for at in range(4, len(whole) - 4, len(whole) // 40):
        (tmp_path / "p.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        resolve_or_diagnose('data "p.parquet"\n' + PATCH, tmp_path)


def resolve_or_diagnose(text: str, base: Path) -> None:
    """Anything but a diagnostic fails the test by itself."""
    errors(text, base=base)


# ---- what is not opened


class Trap:
    """Unpickled, it would say so."""

    def __reduce__(self) -> Any:
        return os.abort, ()


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_by_its_content(tmp_path: Path, name: str, protocol: int) -> None:
    found = wrong_in(tmp_path, name, pickle.dumps(Trap(), protocol))
    assert (found.code, about(found)) == ("unsafe-file", f'"{name}"')
    assert "pickle" in found.message


@pytest.mark.parametrize("protocol", [0, 1])
def test_an_old_pickle_is_text_that_is_no_data(tmp_path: Path, protocol: int) -> None:
    write(tmp_path / "p.jsonl", pickle.dumps(Trap(), protocol))
    assert {d.code for d in errors('data "p.jsonl"\n' + PATCH, base=tmp_path)} == {"bad-json"}


def test_a_torch_archive_is_refused(tmp_path: Path) -> None:
    assert wrong_in(tmp_path, "p.json", b"PK\x03\x04" + b"\x00" * 50).code == "unsafe-file"


@pytest.mark.parametrize("content", [pickle.dumps(Trap()), b"PK\x03\x04" + b"\x00" * 50])
def test_tensors_refuse_pickles_too(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "v.safetensors", content)
    body = 'experiment e { run clean patch node mlp[0] with tensor("v.safetensors", "w") measure diff }'
    assert [d.code for d in errors(body, base=tmp_path)] == ["unsafe-file"]


@pytest.mark.parametrize(
    "header", [b'{"w": 3}', b'{"w": "shape"}', b'{"w": {"shape": "x"}}', b"[" * 5000, b'{"w": {"shape": [-1]}}', b"3"]
)
def test_a_broken_safetensors_header(tmp_path: Path, header: bytes) -> None:
    write(tmp_path / "v.safetensors", len(header).to_bytes(8, "little") + header)
    body = 'experiment e { run clean patch node mlp[0] with tensor("v.safetensors", "w") measure diff }'
    (found,) = errors(body, base=tmp_path)
    assert found.code in ("bad-tensor-file", "unknown-tensor")


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").mkdir()
    (found,) = errors('data "d.jsonl"\n' + PATCH, base=tmp_path)
    assert (found.code, "directory" in found.message) == ("missing-file", True)
    os.mkfifo(tmp_path / "f.jsonl")
    (found,) = errors('data "f.jsonl"\n' + PATCH, base=tmp_path)
    assert (found.code, "no regular file" in found.message) == ("missing-file", True)
    (found,) = errors('data "a\\u0000.jsonl"\n' + PATCH, base=tmp_path)
    assert found.code == "missing-file"


def test_limits_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_jsonl(tmp_path / "p.jsonl")
    as_parquet(tmp_path / "p.parquet")
    monkeypatch.setattr(data_files, "MAX_PROMPTS", 1)
    assert "2 prompts; at most 1" in errors('data "p.jsonl"\n' + PATCH, base=tmp_path)[0].message
    monkeypatch.setattr(data_files, "MAX_LINE", 50)
    assert "at most 50" in errors('data "p.jsonl"\n' + PATCH, base=tmp_path)[0].message
    monkeypatch.setattr(tables, "MAX_UNPACKED", 10)
    assert errors('data "p.parquet"\n' + PATCH, base=tmp_path)[0].code == "file-too-large"
    with (tmp_path / "big.jsonl").open("wb") as file:
        file.truncate(files.MAX_BYTES + 1)  # holds no bytes on the disk
    assert errors('data "big.jsonl"\n' + PATCH, base=tmp_path)[0].code == "file-too-large"


# ---- special tokens


def test_a_second_bos_token_is_warned_of_once(tmp_path: Path) -> None:
    class Writing(Words):
        """A tokenizer that reads its BOS token where it is written, as most do."""

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            rest = text.removeprefix("<bos>")
            own = super().__call__(rest, add_special_tokens)["input_ids"]
            return {"input_ids": ([0] if rest != text else []) + own}

    records = [{k: v if k == "answer" else f"<bos>{v}" for k, v in r.items() if k != "name"} for r in RECORDS]
    found = resolved(PATCH, data=records, tokenizer=Writing(bos=True))
    assert [(w.code, "'clean'" in w.message) for w in found.warnings] == [("double-bos", True), ("double-bos", False)]
    assert resolved(PATCH, data=records, tokenizer=Writing(bos=True), bos=False).warnings == ()


# ---- hostile files

HOSTILE = st.binary(max_size=3) | st.sampled_from(
    [
        b"[" * 2000,
        b'{"a":' * 2000,
        b"NaN",
        b"1e999",
        b"-",
        b'"',
        b"\\ud800",
        b"\xef\xbb\xbf",
        b"\x00",
        b"\r",
        b"9" * 5000,
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_a_file_with_changed_bytes_gives_diagnostics_alone(tmp_path: Path, name: str, data: st.DataObject) -> None:
    FORMATS[name](tmp_path / name)
    content = bytearray((tmp_path / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(HOSTILE)
    (tmp_path / name).write_bytes(content)
    resolve_or_diagnose(f'data "{name}"[..1] {{ at end -1 }}\n' + AT_NAME, tmp_path)
