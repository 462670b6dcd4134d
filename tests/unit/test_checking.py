"""`patchc check`: what it finds in many specs without weights, and what it leaves to the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import patchc
from patchc import checking
from patchc.diagnostics import PatchcError
from patchc.model import blank, load
from patchc.model import outline as outlines
from patchc.model.folders import BAD_CONFIG
from patchc.resources import builtin_model
from tests.unit.commands import DATA, HEADS, MODEL, ONE, Run, spec


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weightless() -> Path:
    """A copy of the built-in model whose weights are rubbish."""
    source = builtin_model("induction-2l")
    assert source is not None
    folder = Path(shutil.copytree(source, "model"))
    (folder / "model.safetensors").write_bytes(b"rubbish")
    return folder


def codes(*specs: str | Path) -> list[str]:
    return [d.code for d in patchc.check(*specs)]


def test_weights_are_not_read_and_may_be_missing(weightless: Path, run: Run) -> None:
    name = spec('model "model"', DATA, HEADS)
    assert codes(name) == []
    (weightless / "model.safetensors").unlink()
    assert codes(name) == []
    assert run("check", name).exit == 0
    assert run("nodes", "model").out == run("nodes", "induction-2l").out.replace("induction-2l", "model")
    assert run("run", name).codes == ["model-weights"]


def test_no_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert codes(spec(MODEL, DATA, HEADS)) == []


def test_each_model_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    outline = outlines.outline

    def counted(name: str, **options: Any) -> Any:
        asked.append((name, options))
        return outline(name, **options)

    monkeypatch.setattr(outlines, "outline", counted)
    names = [spec(MODEL, DATA, ONE, name=f"{i}.patch") for i in range(3)]
    other = spec(
        'model "ioi-tiny" device="cuda:7"', 'data { clean "When Mary and" answer " John" }', ALONE, name="o.patch"
    )
    assert codes(*names, other, other, *names) == []
    assert [name for name, _ in asked] == ["induction-2l", "ioi-tiny"]
    assert "device" not in asked[1][1]  # a spec may be checked where there is none of its kind


ALONE = "experiment e { run clean patch node head[0, 0] with zero measure logit(answer) as out }"


def test_what_is_wrong_with_a_model_is_said_in_each_spec_and_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Path] = []

    def refuse(folder: Path, *_: Any) -> Any:
        traced.append(folder)
        raise BAD_CONFIG.error("no model")

    monkeypatch.setenv("PATCHC_CACHE", "off")
    monkeypatch.setattr(blank, "blank_facts", refuse)
    names = [spec("# a comment", MODEL, DATA, ONE, name="a.patch"), spec(MODEL, DATA, ONE, name="b.patch")]
    found = patchc.check(*names)
    assert [(d.code, d.span and d.span.source.name) for d in found] == [("model-config", n) for n in names]
    assert [d.span and d.span.source.position(d.span.start)[0] for d in found] == [2, 1]
    assert len(traced) == 1


def test_errors_and_warnings_of_all_specs_in_order() -> None:
    warned = spec(MODEL, DATA.replace("wrong", "other"), ONE.replace(" - logit(wrong)", ""), name="warned.patch")
    wrong = spec(MODEL, DATA, ONE.replace("head[0, 0]", "head[7, 0]"), name="wrong.patch")
    nowhere = spec('model "nowhere/to be found"', DATA, ONE, name="nowhere.patch")
    unread = spec(MODEL, DATA, "experiment", name="unread.patch")
    expected = ["unused-column", "unknown-node", "model-not-found", "syntax-error", "missing-spec"]
    assert codes(warned, wrong, nowhere, unread, "none.patch") == expected
    assert codes("\n".join((MODEL, DATA, ONE))) == []  # a spec's text


LATE = """
experiment late {
  for h in head
  run clean
  patch node h @ -1 with corrupt
  measure logit(answer) @ 5 - logit(wrong) @ 5 as early
}
"""
"""Measures before what it patches."""


def test_what_lowering_finds_is_found() -> None:
    name = spec(MODEL, DATA, LATE)
    assert codes(name) == ["no-effect"]
    with pytest.raises(PatchcError) as caught:
        patchc.load("induction-2l").compile(name)
    assert patchc.check(name) == list(caught.value.diagnostics)


def test_a_large_sweep_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    name = spec(MODEL, DATA, LATE)
    monkeypatch.setattr(checking, "LOWERED", 4)
    assert codes(name) == ["no-effect"]
    monkeypatch.setattr(checking, "LOWERED", 3)
    assert codes(name) == []


def test_files_that_a_spec_names_are_opened() -> None:
    assert codes(spec(MODEL, 'data "none.jsonl"', ONE)) == ["missing-file"]
    save_file({"v": torch.full((64,), float("nan")), "matrix": torch.zeros(2, 2)}, "v.safetensors")
    for key, expected in (("v", ["unused-column"]), ("w", ["unknown-tensor"]), ("matrix", ["tensor-shape"])):
        value = f'with tensor("v.safetensors", "{key}")'
        assert (
            codes(spec(MODEL, DATA, ONE.replace("head[0, 0]", "resid_pre[1]").replace("with corrupt", value)))
            == expected
        )


def test_places_for_results_are_looked_at(run: Run) -> None:
    Path("in.csv").write_text("clean,corrupt,answer,wrong\na b c,a b d, d, e\n")
    for place, code in (("no/out.csv", "no-such-directory"), ("in.csv", "overwrites-input")):
        name = spec(MODEL, 'data "in.csv"', HEADS.replace("kl(clean)", f'kl(clean)\n  save "{place}"'))
        assert codes(name) == [code]
        ran = run("check", "--format", "json", name)
        assert (ran.exit, [d["code"] for d in ran.json["diagnostics"]]) == (1, [code])
    record = spec(MODEL, DATA, HEADS.replace("kl(clean)", 'kl(clean)\n  save "a.csv"\n  save "a.record.json"'))
    assert codes(record) == ["same-file"]
    twice = spec(MODEL, DATA, HEADS.replace("kl(clean)", 'kl(clean)\n  save "out.csv"\n  save "out.csv"'))
    assert codes(twice) == ["same-file"]


def test_a_config_that_describes_no_model(weightless: Path, run: Run) -> None:
    config = json.loads((weightless / "config.json").read_text())
    config["config"]["no such option"] = 7
    (weightless / "config.json").write_text(json.dumps(config))
    ran = run("check", spec('model "model"', DATA, ONE))
    assert (ran.exit, ran.codes) == (1, ["model-config"])
