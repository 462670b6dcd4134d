"""The command from the outside: what stands on stdout and stderr, and which files are left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.unit.commands import DATA, FAILS, HEADS, MODEL, ONE, SAVING, TWO, Run, spec


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env={"PYTHONPATH": str(root)}
    )


RECORD = {"spec", "parameters", "data", "inputs", "model", "weights", "versions", "seeds", "settings", "plan"}

# ---- what works


def test_text_has_results_on_stdout_and_nothing_on_stderr(run: Run) -> None:
    ran = run("run", spec(MODEL, DATA, HEADS))
    assert (ran.exit, ran.err) == (0, "")
    assert "heads  each head" in ran.out
    assert "1 pass for 4 cells" in ran.out


def test_json_is_one_object_with_the_fixed_keys(run: Run) -> None:
    ran = run("run", "--format", "json", "--check=2", spec(MODEL, DATA, HEADS, ONE))
    assert ran.exit == 0
    assert ran.out.count("\n") == 1
    assert set(ran.json) == {"format_version", "experiments", "record"}
    assert ran.json["format_version"] == 1
    assert set(ran.json["record"]) == RECORD
    assert list(ran.json["experiments"]) == ["heads", "one"]
    heads, one = ran.json["experiments"].values()
    keys = {"dims", "coords", "metrics", "stderr", "n", "baselines", "passes", "check"}
    assert set(heads) == set(one) == keys
    assert heads["dims"] == ["layer", "head"]
    assert heads["coords"] == {"layer": [0, 1], "head": [0, 1]}
    assert set(heads["metrics"]) == set(heads["stderr"]) == set(heads["baselines"]) == {"diff", "kl(clean)"}
    assert heads["check"]["cells"] == 2
    assert set(heads["check"]) == {"cells", "max_abs_diff", "tolerance", "largest_effect"}
    assert one["metrics"]["diff"] == pytest.approx(heads["metrics"]["diff"][0][0], abs=1e-5)  # a bare number
    assert one["stderr"] == {"diff": None}
    assert set(one["baselines"]["diff"]) == {"clean", "corrupt"}


def test_pairs_that_are_no_edge_are_null(run: Run) -> None:
    edges = """experiment edges {
      for w in input | head[1, 0], r in head[1, 1].{q, k} | logits
      run clean
      patch edge w -> r with corrupt
      measure logit(answer) as out
    }"""
    made = run("run", "--format", "json", spec(MODEL, DATA.replace('wrong " e" ', ""), edges)).json
    (edges,) = made["experiments"].values()
    assert edges["coords"] == {"w": ["input", "head[1, 0]"], "r": ["head[1, 1].q", "head[1, 1].k", "logits"]}
    above, below = edges["metrics"]["out"]
    assert all(isinstance(x, float) for x in above)
    assert below[:2] == [None, None]
    assert isinstance(below[2], float)


def test_each_prompt_counts(run: Run) -> None:
    (one,) = run("run", "--format", "json", spec(MODEL, DATA, TWO, ONE)).json["experiments"].values()
    assert one["n"] == 2
    assert one["stderr"]["diff"] > 0


def test_warnings_and_progress_go_to_stderr(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    unused = DATA.replace("wrong", "other")
    ran = run("run", "--format", "json", spec(MODEL, unused, ONE.replace(" - logit(wrong)", "")))
    assert ran.exit == 0
    assert set(ran.json) == {"format_version", "experiments", "record"}
    assert "warning[unused-column]" in ran.err
    assert "a.patch:2:" in ran.err
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    name = spec(MODEL, DATA, ONE)
    loud, quiet = run("run", "--format", "json", name), run("run", "--format", "json", "--quiet", name)
    assert "one" in loud.err
    assert quiet.err == ""
    assert loud.out == quiet.out


@pytest.mark.parametrize(("check", "cells"), [("--check", 4), ("--check=all", 4), ("--check=3", 3), ("--check=5", 4)])
def test_a_check_says_how_many_cells_it_recomputed(run: Run, check: str, cells: int) -> None:
    ran = run("run", check, "--format", "json", spec(MODEL, DATA, HEADS))
    found = ran.json["experiments"]["heads"]["check"]
    assert found["cells"] == cells
    assert 0 <= found["max_abs_diff"] < 1e-4
    if check == "--check":
        assert "checked with hooks: 4 cells" in run("run", check, "a.patch").out


def test_any_budget_of_memory_gives_the_same_numbers(run: Run) -> None:
    name = spec(MODEL, DATA, HEADS)
    roomy, tight = (run("run", "--format", "json", "--memory", m, name).json for m in ("1GiB", "1"))
    assert roomy["experiments"]["heads"]["passes"] == 1
    assert tight["experiments"]["heads"]["passes"] > 1
    found = (torch.tensor(r["experiments"]["heads"]["metrics"]["diff"]) for r in (roomy, tight))
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_threads_are_set_only_where_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    name = spec(MODEL, DATA, ONE)
    assert run("run", name).exit == 0
    assert asked == []
    assert run("run", "--threads", "3", name).exit == 0
    assert asked == [3]


def test_a_plan_runs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchc.pipeline.execute", lambda *_: pytest.fail("something ran"))
    name = spec(MODEL, DATA, HEADS, ONE)
    ran = run("plan", name)
    assert ran.exit == 0
    assert "experiment heads: 4 cells in 1 pass" in ran.out
    assert "experiment one: 1 cell in 1 pass" in ran.out
    made = run("plan", "--format", "json", name).json
    assert [(p["experiment"], p["n_cells"], p["n_passes"]) for p in made["plans"]] == [("heads", 4, 1), ("one", 1, 1)]
    assert made["format_version"] == 1


def test_nodes_counts_the_graph(run: Run) -> None:
    ran = run("nodes", "induction-2l")
    assert ran.exit == 0
    assert "head[1, 0..1]" in ran.out
    assert "5 writers (input, heads, MLPs), 13 readers, 29 edges" in ran.out
    made = run("nodes", "--format", "json", "induction-2l").json
    assert made["counts"] == {"writers": 5, "readers": 13, "edges": 29}
    assert [n["name"] for n in made["nodes"]][:3] == ["embed", "pos_embed", "head[0, 0]"]


def test_check_reports_every_error_of_every_spec(run: Run) -> None:
    good = spec(MODEL, DATA, ONE, name="good.patch")
    bad = spec(MODEL, DATA, ONE.replace("head[0, 0]", "head[7, 0]").replace("wrong", "wrng"), name="bad.patch")
    ran = run("check", good, bad, "missing.patch")
    assert (ran.exit, ran.out) == (1, "")
    assert ran.codes == ["unknown-node", "unknown-name", "missing-spec"]
    assert "3 checked, 3 errors" in ran.err
    assert run("check", good).err == "1 checked, no errors\n"
    made = run("check", "--format", "json", good, bad).json
    assert set(made) == {"format_version", "diagnostics"}
    assert [d["file"] for d in made["diagnostics"]] == ["bad.patch", "bad.patch"]


# ---- files


def test_files_are_written_where_the_spec_stands(run: Run, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    saved = HEADS.replace(
        "kl(clean)",
        """kl(clean)
  save "out.json"
  save "out.csv"
  save "out.parquet"
  show heatmap
  show heatmap "picture.svg\"""",
    )
    ran = run("run", spec(MODEL, DATA, saved, name="sub/study.patch"))
    assert ran.exit == 0
    files = {"out.json", "out.csv", "out.parquet", "study.heads.png", "picture.svg"}
    records = {"out.record.json", "study.heads.record.json", "picture.record.json"}
    assert {p.name for p in (tmp_path / "sub").iterdir()} == files | records | {"study.patch"}
    assert all(f"written: {Path('sub') / name}" in ran.out for name in files)
    assert (tmp_path / "sub" / "study.heads.png").read_bytes().startswith(b"\x89PNG")
    table = pd.read_parquet("sub/out.parquet")
    pd.testing.assert_frame_equal(pd.read_csv("sub/out.csv"), table, check_dtype=False)
    values = json.loads(Path("sub/out.json").read_text())["experiments"]["heads"]["metrics"]["diff"]
    assert table["diff"].tolist() == [x for row in values for x in row]


@pytest.mark.parametrize("output", [(), ("--format", "json")])
def test_a_later_failure_leaves_no_file(run: Run, tmp_path: Path, output: tuple[str, ...]) -> None:
    ran = run("run", *output, spec(MODEL, DATA, SAVING, FAILS))
    assert ran.exit == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.patch"]
    if output:
        assert {d["code"] for d in ran.json["diagnostics"]} == {"non-finite"}
    else:
        assert (set(ran.codes), ran.out) == ({"non-finite"}, "")


def test_a_failed_check_leaves_no_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOLERANCE", "RATIO"):
        monkeypatch.setattr(f"patchc.execute.check.{name}", -1.0)
    expects = SAVING.replace("show heatmap", "expect diff > 1000")
    ran = run("run", "--check=all", spec(MODEL, DATA, expects))
    assert (ran.exit, ran.codes) == (3, ["check-failed"])  # 3 wins over 4
    assert [p.name for p in tmp_path.iterdir()] == ["a.patch"]


def test_a_failed_expectation_is_4_and_the_results_stand(run: Run, tmp_path: Path) -> None:
    ran = run("run", "--format", "json", spec(MODEL, DATA, SAVING.replace("show heatmap", "expect diff > 1000")))
    assert (ran.exit, ran.codes) == (4, ["expect-failed"])
    assert set(ran.json) == {"format_version", "experiments", "record"}
    assert (tmp_path / "out.csv").exists()
    assert run("run", spec(MODEL, DATA, SAVING.replace("show heatmap", "expect diff > -1000"))).exit == 0


@pytest.mark.parametrize("command", ["run", "check"])
def test_files_that_cannot_be_written_are_found_before_anything_runs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("patchc.pipeline.execute", lambda *_: pytest.fail("something ran"))
    ran = run(command, spec(MODEL, DATA, SAVING.replace("out.csv", "no/out.csv")))
    assert (ran.exit, ran.codes, ran.out) == (1, ["no-such-directory"], "")
    ran = run(command, spec(MODEL, DATA, SAVING, ONE.replace("as diff", 'as diff save "out.csv"')))
    assert (ran.exit, ran.codes, ran.out) == (1, ["same-file"], "")
    ran = run(command, spec(MODEL, DATA, SAVING.replace("show heatmap", "show heatmap show heatmap")))
    assert (ran.exit, ran.codes, ran.out) == (1, ["same-file"], "")
    assert [p.name for p in tmp_path.iterdir()] == ["a.patch"]


def test_a_file_that_cannot_be_replaced(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.csv").mkdir()
    ran = run("run", spec(MODEL, DATA, SAVING))
    assert (ran.exit, ran.codes, ran.out) == (3, ["cannot-write"], "")


# ---- as a process


def test_help_and_syntax_errors_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "bad.patch").write_text(f"{MODEL}\nexperiment e {{ run }}\n")
    code = """
import sys
from patchc.cli import main
for arguments, status in ((["--help"], 0), (["run", "--help"], 0), (["check", "bad.patch"], 1), (["check", "no"], 1)):
    try:
        main(arguments)
    except SystemExit as stopped:
        assert stopped.code == status, (arguments, stopped.code)
assert not {"torch", "transformers", "numpy", "pandas"} & set(sys.modules)
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "error[syntax-error]" in done.stderr


def test_a_process_from_the_start(tmp_path: Path) -> None:
    data = 'data { clean "When Mary and John went" corrupt "When Mary and Mary went" answer " to" wrong " and" }'
    (tmp_path / "a.patch").write_text("\n".join(('model "ioi-tiny"', data, ONE)))
    done = python("-m", "patchc.cli", "run", "--threads", "1", "--format", "json", "a.patch", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(json.loads(done.stdout)["experiments"]) == ["one"]
