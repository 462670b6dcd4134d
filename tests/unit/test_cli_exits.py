"""The command's exit status for all that can go wrong, with a diagnostic and without a traceback."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from patchc.resources import builtin_model
from tests.unit.commands import DATA, FAILS, MODEL, ONE, SAVING, Run, spec

DIAGNOSTIC = {
    "code", "severity", "message", "file", "line", "column", "end_line", "end_column", "notes", "fix",
}  # fmt: skip


# ---- what is wrong with the spec or its data: 1


def prompt(clean: str = "a b c", corrupt: str = "a b d", answer: str = " d") -> str:
    return f'data {{ clean "{clean}" corrupt "{corrupt}" answer "{answer}" }}'


LOGIT = "experiment e { run clean patch node head[0, 0] with corrupt measure logit(answer) }"


@pytest.mark.parametrize(
    ("parts", "code"),
    [
        ((MODEL, DATA, ONE, "experiment {"), "syntax-error"),
        ((DATA, ONE), "no-model"),
        (('model "induction-l2"', DATA, ONE), "model-not-found"),
        (('model "no/such/model"', DATA, ONE), "model-not-found"),
        (("",), "no-model"),
        ((MODEL, DATA), "no-experiment"),
        ((MODEL, ONE), "empty-data"),
        ((MODEL, 'data "empty.jsonl"', ONE), "empty-data"),
        ((MODEL, 'data "none.jsonl"', ONE), "missing-file"),
        ((MODEL, 'data "broken.jsonl"', ONE), "bad-json"),
        ((MODEL, prompt(corrupt="a b"), LOGIT), "unequal-lengths"),
        ((MODEL, prompt(answer=" d e"), LOGIT), "multi-token-answer"),
        ((MODEL, prompt(clean="a b hello"), LOGIT), "unknown-token"),
        ((MODEL, prompt(), LOGIT.replace("head[0, 0]", "head[0, 9]")), "unknown-node"),
        ((MODEL, prompt(), LOGIT.replace("with corrupt", "with clean")), "worlds-equal"),
        ((MODEL, prompt(), LOGIT.replace("}", 'save "a.xlsx" }')), "unknown-suffix"),
    ],
)
def test_faults_of_the_spec_are_1(run: Run, parts: tuple[str, ...], code: str) -> None:
    Path("empty.jsonl").write_text("\n")
    Path("broken.jsonl").write_text('{"clean": \n')
    name = spec(*parts)
    ran = run("run", name)
    assert (ran.exit, ran.out) == (1, "")
    assert code in ran.codes
    ran = run("run", "--format", "json", name)
    assert (ran.exit, set(ran.json)) == (1, {"format_version", "diagnostics"})
    (found,) = (d for d in ran.json["diagnostics"] if d["code"] == code)
    assert set(found) == DIAGNOSTIC
    assert found["severity"] == "error"
    if parts != ("",):
        assert found["file"] in (name, "broken.jsonl")
        assert found["line"] >= 1
        assert found["column"] >= 1


@pytest.mark.parametrize("command", ["run", "plan", "check"])
def test_spec_files_that_cannot_be_read(run: Run, tmp_path: Path, command: str) -> None:
    (tmp_path / "latin.patch").write_bytes(b'model "caf\xe9"')
    (tmp_path / "folder.patch").mkdir()
    for name, words in [("none.patch", "No such file"), ("folder.patch", "directory"), ("latin.patch", "UTF-8")]:
        code = "not-utf8" if name == "latin.patch" else "missing-spec"
        ran = run(command, name)
        assert (ran.exit, ran.codes, ran.out) == (1, [code], "")
        assert name in ran.err
        assert words in ran.err
        made = run(command, "--format", "json", name).json
        assert [d["code"] for d in made["diagnostics"]] == [code]


def test_a_node_listing_of_no_model(run: Run) -> None:
    ran = run("nodes", "./nowhere")
    assert (ran.exit, ran.codes, ran.out) == (1, ["model-not-found"], "")


# ---- wrong usage: 2


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("rum", "a.patch"), ("run",), ("run", "a.patch", "b.patch"), ("run", "--chekc", "a.patch"), ("check",),
        ("run", "--check=0", "a.patch"), ("run", "--check=-1", "a.patch"), ("run", "--check=most", "a.patch"),
        ("run", "--check=\u00b2", "a.patch"), ("run", "--check=1.5", "a.patch"), ("run", "--check=", "a.patch"),
        ("run", "--format", "yaml", "a.patch"), ("run", "--threads", "0", "a.patch"),
        ("run", "--memory", "much", "a.patch"), ("run", "--memory", "0", "a.patch"),
        ("run", "--memory", "nan", "a.patch"), ("plan", "--check", "a.patch"),
    ],
)  # fmt: skip
def test_wrong_usage_is_2(run: Run, arguments: tuple[str, ...]) -> None:
    spec(MODEL, DATA, ONE)
    ran = run(*arguments)
    assert (ran.exit, ran.out) == (2, "")
    assert "Usage: patchc" in ran.err


@pytest.mark.parametrize("arguments", [
    ("run", "--format", "json"), ("run", "--format=json", "--chek", "a.patch"), ("frobnicate", "--format", "json"),
    ("run", "a.patch", "--check=none", "--format", "json"), ("check", "--format", "json"),
])  # fmt: skip
def test_wrong_usage_as_json_is_the_one_object(run: Run, arguments: tuple[str, ...]) -> None:
    spec(MODEL, DATA, ONE)
    ran = run(*arguments)
    assert (ran.exit, ran.err) == (2, "")
    (found,) = ran.json["diagnostics"]
    assert (found["code"], set(found)) == ("usage", DIAGNOSTIC)
    assert found["message"]


def test_several_diagnostics_are_counted(run: Run) -> None:
    two = ONE.replace("head[0, 0]", "haed").replace("measure", "measure kl(klean),")
    ran = run("run", spec(MODEL, DATA, two))
    assert ran.exit == 1
    assert len(ran.codes) == 2
    assert ran.err.splitlines()[-1] == "2 errors; `patchc explain CODE` says more about a code"
    assert "explain" not in run("run", spec(MODEL, DATA, ONE.replace("head[0, 0]", "haed"))).err


def test_explain(run: Run) -> None:
    ran = run("explain", "unknown-node")
    assert (ran.exit, ran.err) == (0, "")
    assert ran.out.startswith("# unknown-node: ")
    made = run("explain", "unknown-node", "--format", "json").json
    assert set(made) == {"format_version", "code", "summary", "topic", "severity", "exit", "text"}
    assert (made["code"], made["severity"], made["exit"]) == ("unknown-node", "error", 1)
    listed = run("explain")
    assert (listed.exit, listed.err) == (0, "")
    assert "\n  unknown-node " in listed.out
    codes = [c["code"] for c in run("explain", "--format", "json").json["codes"]]
    assert all(f"\n  {code} " in listed.out for code in codes)
    ran = run("explain", "unknown-nodes")
    assert (ran.exit, ran.codes, ran.out) == (2, ["unknown-code"], "")
    assert "did you mean `unknown-node`?" in ran.err


def test_help_and_version(run: Run) -> None:
    ran = run("--help")
    assert (ran.exit, ran.err) == (0, "")
    assert all(command in ran.out for command in ("run", "plan", "check", "nodes"))
    assert run("--version").out.startswith("patchc")


# ---- what is wrong with the run or the model: 3


@pytest.fixture
def copied(tmp_path: Path, run: Run) -> Path:
    """The built-in model's directory, to be damaged."""
    source = builtin_model("induction-2l")
    assert source is not None
    return Path(shutil.copytree(source, tmp_path / "model"))


def test_damaged_weights_are_3(run: Run, copied: Path) -> None:
    name = spec('model "model"', DATA, ONE)
    path = copied / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:-50], b"", b"\x00" * 100):
        path.write_bytes(damaged)
        ran = run("run", name)
        assert (ran.exit, ran.codes, ran.out) == (3, ["model-weights"], "")
        assert "a.patch:1:1" in ran.err
    path.write_bytes(whole)
    assert run("run", name).exit == 0


def test_weights_that_are_no_numbers_are_3(run: Run, copied: Path) -> None:
    weights = load_file(copied / "model.safetensors")
    name, tensor = next(iter(weights.items()))
    save_file({**weights, name: tensor * float("nan")}, copied / "model.safetensors")
    ran = run("run", "--format", "json", spec('model "model"', DATA, ONE))
    assert ran.exit == 3
    assert [d["code"] for d in ran.json["diagnostics"]] == ["nan-in-weights"]
    assert name in ran.json["diagnostics"][0]["message"]


def test_a_metric_that_is_no_number_is_3(run: Run) -> None:
    ran = run("run", spec(MODEL, DATA, ONE, FAILS))
    assert (ran.exit, set(ran.codes), ran.out) == (3, {"non-finite"}, "")


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_bug_is_3_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("no number")

    monkeypatch.setattr("patchc.pipeline.execute", broken)
    ran = run("run", "--format", output, spec(MODEL, DATA, ONE))
    assert ran.exit == 3
    if output == "json":
        (found,) = ran.json["diagnostics"]
        assert (found["code"], set(found)) == ("internal", DIAGNOSTIC)
    else:
        assert (ran.codes, ran.out) == (["internal"], "")
        assert "ZeroDivisionError: no number (test_cli_exits.py:" in ran.err


def test_an_interrupt_is_130(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("patchc.pipeline.execute", interrupted)
    ran = run("run", spec(MODEL, DATA, SAVING))
    said = "error[interrupted]: interrupted\n  = help: to start it again: `patchc run a.patch`"
    assert (ran.exit, ran.out, ran.err.strip()) == (130, "", said)
    ran = run("run", "--format", "json", spec(MODEL, DATA, SAVING))
    assert (ran.exit, ran.err.strip()) == (130, "")
    assert [(d["code"], set(d)) for d in ran.json["diagnostics"]] == [("interrupted", DIAGNOSTIC)]
    assert [p.name for p in tmp_path.iterdir()] == ["a.patch"]
