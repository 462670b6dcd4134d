"""Hostile data and tensor files: each is refused with a diagnostic, or read; nothing hangs and nothing is run."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from patchc.diagnostics import PatchcError
from patchc.model.folders import model_folder
from tests.hostile import survive

CODES = {
    "bad-json",
    "bad-prompt-file",
    "bad-table",
    "bad-tensor-file",
    "bad-token-id",
    "not-utf8",
    "empty-data",
    "empty-text",
    "file-too-large",
    "missing-column",
    "missing-file",
    "name-clash",
    "tensor-shape",
    "unknown-tensor",
    "unknown-token",
    "unsafe-file",
    "wrong-kind",
}
"""What may be wrong with a file."""


def codes(file: str, folder: Path) -> set[str]:
    """What is said of a spec that names the file as data, and as a tensor's."""
    data = f'model "small" data "{file}"\nexperiment e {{ run clean patch node mlp[0] with corrupt measure kl(clean) }}'
    tensor = (
        'model "small" data { clean "When Mary" corrupt "When John" }\n'
        f'experiment e {{ run clean patch node mlp[0] with tensor("{file}", "k") measure kl(clean) }}'
    )
    texts = [tensor] if file.endswith(".safetensors") else [data, tensor]
    return {d.code for text in texts for d in survive(text, folder) if d.is_error}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


ROW = '{"clean": "When Mary", "corrupt": "When John"'
TEXTS = {
    "empty.jsonl": b"",
    "empty.json": b"",
    "empty.csv": b"",
    "empty.parquet": b"",
    "deep.json": b"[" * 100_000,
    "deep.jsonl": b'{"clean":' * 100_000,
    "closed.json": b"[" * 100_000 + b"]" * 100_000,
    "digits.jsonl": f'{ROW}, "x": {"9" * 100_000}}}'.encode(),
    "twice.jsonl": f'{ROW}, "clean": "When John"}}'.encode(),
    "nan.jsonl": f'{ROW}, "x": NaN}}'.encode(),
    "half.jsonl": rb'{"clean": "\ud800", "corrupt": "When"}',
    "nul.jsonl": b'{"clean": "\\u0000", "corrupt": "\\u0000"}',
    "bytes.jsonl": b"\xff\xfe\x00",
    "types.jsonl": b'{"clean": {"a": 1}, "corrupt": [[1]]}',
    "bools.jsonl": b'{"clean": true, "corrupt": 1.5}',
    "ids.jsonl": b'{"clean": [1, -1], "corrupt": [99999999999999999999, 2]}',
    "number.json": b"7",
    "prompts.json": b'{"prompts": [7]}',
    "words.json": b'{"prompts": [], "word_idxs": {"a": "b"}}',
    "names.csv": b"clean,,clean\n1,2,3\n",
    "quotes.csv": b'clean,corrupt\n"When',
    "nul.csv": b"clean,corrupt\nWhen\0,Mary\n",
    "field.csv": b"clean,corrupt\n" + b"a" * 200_000 + b",b\n",
    "magic.parquet": b"PAR1" + b"\xff" * 100 + b"PAR1",
    "lies.parquet": b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
    "pickle.jsonl": pickle.dumps(os.getcwd),
    "pickle.parquet": pickle.dumps([1]),
    "pickle.safetensors": pickle.dumps([1], protocol=2),
    "short.safetensors": b"\x01",
    "huge.safetensors": struct.pack("<Q", 2**63),
    "long.safetensors": struct.pack("<Q", 99_000_000) + b"{}",
}


@pytest.mark.parametrize("name", TEXTS)
def test_what_is_wrong_is_said(name: str, folder: Path) -> None:
    (folder / name).write_bytes(TEXTS[name])
    found = codes(name, folder)
    assert found
    assert found <= CODES


def _entry(**entry: object) -> dict[str, object]:
    return {"k": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128], **entry}}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"k": 7},
        {"k": {}},
        _entry(shape=[-1]),
        _entry(shape="32"),
        _entry(shape=[10**30]),
        _entry(shape=[1.5]),
        _entry(shape=[True]),
        _entry(shape=[[32]]),
        {"k": _entry(), "__metadata__": 7},
        _entry(data_offsets=[0, 10**18]),
        _entry(data_offsets=[128, 0]),
        _entry(data_offsets=[-128, 0]),
        _entry(dtype="OBJECT"),
    ],
)
def test_headers_that_lie(header: object, folder: Path) -> None:
    raw = json.dumps(header).encode()
    (folder / "v.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert codes("v.safetensors", folder) <= CODES


def test_archives_are_not_opened(folder: Path) -> None:
    for name in ("bomb.jsonl", "bomb.parquet", "bomb.safetensors"):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", bytes(10**7))
        assert codes(name, folder) == {"unsafe-file"}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".safetensors"])
@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        os.mkfifo,
        lambda p: p.symlink_to("/dev/zero"),
        lambda p: p.symlink_to(p),
        lambda p: p.symlink_to("no"),
    ],
    ids=["directory", "fifo", "zero", "loop", "dangling"],
)
def test_what_is_no_regular_file(make: Callable[[Path], object], suffix: str, folder: Path) -> None:
    make(folder / f"odd{suffix}")
    assert codes(f"odd{suffix}", folder) == {"missing-file"}


@pytest.mark.parametrize("name", ["", "/", "..", "a/b.jsonl", "\\u0000.jsonl", "x" * 5000 + ".jsonl", "/dev/zero"])
def test_names_that_no_file_has(name: str, folder: Path) -> None:
    assert codes(name, folder) <= {"missing-file", "unknown-data-format"}


@pytest.mark.parametrize(
    "name", ["\\u0000.json", "x" * 5000 + ".json", "x" * 5000 + "/a.json", "loop.json", "no/a.json"]
)
def test_places_that_cannot_be_written(name: str, folder: Path) -> None:
    (folder / "loop.json").symlink_to("loop.json")
    data = 'model "small" data { clean "When Mary" corrupt "When John" }\n'
    clauses = f'run clean patch node mlp[0] with corrupt measure kl(clean) save "{name}"'
    found = {d.code for d in survive(f"{data}experiment e {{ {clauses} }}", folder)}
    assert found <= {"cannot-write", "no-such-directory"}
    assert found or name.startswith("x" * 5000 + ".")


@pytest.mark.parametrize("name", ["\0", "x" * 5000, "x" * 5000 + "/a", "/dev/zero"])
def test_models_that_cannot_be(name: str) -> None:
    with pytest.raises(PatchcError) as raised:
        model_folder(name, Path())
    assert [d.code for d in raised.value.diagnostics] == ["model-not-found"]
