"""Results: every form has the same numbers, no file has half of them, and what is no number is refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from patchc.diagnostics import PatchcError
from patchc.ir.experiment import (
    Cell,
    Constant,
    Dim,
    Expect,
    Experiment,
    Measure,
    Metric,
    ModelChoice,
    Prompts,
    Read,
    Study,
    World,
)
from patchc.ir.tokens import Layout
from patchc.report import Check, Result, Results, failed_expects, run_record
from patchc.report.cells import label, number, strongest
from patchc.report.files import save_picture
from patchc.report.record import Course, input_hashes, write_records
from patchc.report.terminal import print_results, shown
from patchc.writing import write_whole

LAYER, HEAD = Dim("layer", (0, 1)), Dim("head", (0, 1, 2))


def experiment(dims: tuple[Dim, ...] = (LAYER, HEAD), *, missing: tuple[Any, ...] = (), **more: Any) -> Experiment:
    cells = [Cell(index, ()) for index in np.ndindex(*(len(d.coords) for d in dims)) if index not in missing]
    given: dict[str, Any] = {"title": None, "metrics": (Metric("diff", Constant(0.0)),)} | more
    return Experiment("heads", run="clean", dims=dims, cells=tuple(cells), **given)


def result(e: Experiment | None = None, values: Any = None, **more: Any) -> Result:
    e = e or experiment()
    numbers = np.arange(np.prod(e.shape, dtype=int), dtype=float).reshape(e.shape) if values is None else values
    values = {m.name: np.array(numbers) for m in e.metrics}
    stderr = {m.name: np.full(e.shape, 0.5) for m in e.metrics}
    baselines = {m.name: {"clean": 2.0, "corrupt": -1.0} for m in e.metrics}
    return Result(e, values, stderr, **({"n": 3, "baselines": baselines, "passes": 2} | more))


def text_of(r: Result, **more: Any) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"), **more)  # noqa: SIM115
    print_results(Results({r.name: r}, {}), console)
    console.file.close()
    return console.export_text(styles=bool(more))


def codes(error: pytest.ExceptionInfo[PatchcError]) -> list[str]:
    return [d.code for d in error.value.diagnostics]


# ---- forms


def test_json_has_dims_and_null_where_there_is_no_cell() -> None:
    made = result(experiment(missing=((1, 0),)), check=Check(4, 1e-6, 1e-4, 2.0)).to_json()
    assert made == {
        "dims": ["layer", "head"],
        "coords": {"layer": [0, 1], "head": [0, 1, 2]},
        "metrics": {"diff": [[0.0, 1.0, 2.0], [None, 4.0, 5.0]]},
        "stderr": {"diff": [[0.5, 0.5, 0.5], [None, 0.5, 0.5]]},
        "n": 3,
        "baselines": {"diff": {"clean": 2.0, "corrupt": -1.0}},
        "passes": 2,
        "check": {"cells": 4, "max_abs_diff": 1e-6, "tolerance": 1e-4, "largest_effect": 2.0},
    }
    assert json.loads(json.dumps(made, allow_nan=False)) == made


def test_json_without_dims_is_a_bare_number() -> None:
    made = result(experiment(())).to_json()
    assert (made["dims"], made["coords"], made["metrics"]) == ([], {}, {"diff": 0.0})
    assert made["check"] is None


def test_all_results_are_one_object() -> None:
    results = Results({"heads": result()}, {"seeds": {}})
    made = results.to_json()
    assert list(made) == ["format_version", "experiments", "record"]
    assert made["experiments"]["heads"] == results["heads"].to_json()
    assert (list(results), len(results)) == (["heads"], 1)
    with pytest.raises(KeyError, match="this run has heads"):
        results["other"]


def test_xarray_has_the_experiments_dims_and_coords() -> None:
    position = Dim("position", (0, 1), ("When", " Mary"))
    made = result(experiment((LAYER, position), missing=((0, 1),))).to_xarray()
    assert made["diff"].dims == ("layer", "position")
    assert made.attrs["n"] == 3
    assert float(made["diff"].sel(layer=1, position=0)) == 2.0
    assert np.isnan(made["diff"].sel(layer=0, position=1))
    assert list(made["position_label"].values) == ["When", " Mary"]
    assert float(made["diff_stderr"].sel(layer=1, position=0)) == 0.5


def test_a_metric_by_name() -> None:
    assert result()["diff"].shape == (2, 3)
    with pytest.raises(KeyError, match="this experiment measured diff"):
        result()["dif"]


def test_pandas_has_a_row_a_cell() -> None:
    frame = result(experiment(missing=((1, 0),))).to_pandas()
    assert list(frame.columns) == ["layer", "head", "diff", "diff_stderr", "n"]
    assert frame[["layer", "head", "diff"]].values.tolist() == [
        [0, 0, 0],
        [0, 1, 1],
        [0, 2, 2],
        [1, 1, 4],
        [1, 2, 5],
    ]
    assert result(experiment(())).to_pandas().values.tolist() == [[0.0, 0.5, 3]]


def test_a_metric_may_be_called_as_a_dim_or_n() -> None:
    r = result(experiment(metrics=(Metric("n", Constant(0.0)), Metric("layer", Constant(0.0)))))
    assert list(r.to_pandas().columns) == [
        "layer", "head", "n_value", "n_value_stderr", "layer_value", "layer_value_stderr", "n",
    ]  # fmt: skip
    assert r["layer"].shape == (2, 3)
    assert set(r.to_json()["metrics"]) == {"n", "layer"}


# ---- what is no number


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_cell_that_is_no_number_is_refused(bad: float) -> None:
    values = np.zeros((2, 3))
    values[1, 2] = bad
    with pytest.raises(PatchcError, match="layer=1, head=2") as error:
        result(values=values)
    assert codes(error) == ["non-finite"]
    assert error.value.exit == 3
    assert result(experiment(missing=((1, 2),)), values).to_json()["metrics"]["diff"][1][2] is None


def test_a_baseline_that_is_no_number_is_refused() -> None:
    with pytest.raises(PatchcError, match="run of `clean`"):
        result(baselines={"diff": {"clean": np.nan}})


def test_a_standard_error_may_be_unknown() -> None:
    r = Result(experiment(()), {"diff": np.array(1.0)}, {"diff": np.array(np.nan)}, 1, {})
    assert r.to_json()["stderr"] == {"diff": None}
    assert "diff = 1" in text_of(r)


def test_what_was_given_is_not_changed() -> None:
    values = np.zeros((2, 3))
    result(experiment(missing=((0, 0),)), values)
    assert values[0, 0] == 0


# ---- files


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet", ".JSON"])
def test_files_hold_the_numbers(tmp_path: Path, suffix: str) -> None:
    r = result(experiment((LAYER, Dim("s", ("zero", 1, 2.5)), HEAD), missing=((0, 0, 0),)))
    path = r.save(tmp_path / f"out{suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if suffix.lower() == ".json":
        assert json.loads(path.read_text())["experiments"]["heads"] == r.to_json()
    else:
        frame = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
        pd.testing.assert_frame_equal(frame, r.to_pandas(), check_dtype=suffix == ".parquet")


def test_a_suffix_that_is_no_format_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(PatchcError, match=r"\.json, \.csv, \.parquet") as error:
        result().save(tmp_path / "out.xlsx")
    assert codes(error) == ["unknown-format"]
    with pytest.raises(PatchcError, match=r"\.png"):
        save_picture(result(), tmp_path / "out.gif")
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(PatchcError, match="there is no directory") as error:
        result().save(tmp_path / "no" / "out.json")
    assert codes(error) == ["no-such-directory"]
    (tmp_path / "out.json").mkdir()
    with pytest.raises(PatchcError, match="is a directory"):
        result().save(tmp_path / "out.json")


def test_a_failure_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("old")

    def fails(target: Path) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(PatchcError, match="No space left"):
        write_whole(path, fails)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- pictures


@pytest.mark.parametrize(
    "dims",
    [
        (),
        (HEAD,),
        (LAYER, HEAD),
        (LAYER, HEAD, Dim("site", ("q", "k"))),
        (Dim("a.layer", (0, 1)), Dim("a.head", (0, 1)), Dim("b.layer", (0,)), Dim("b.head", (0, 1, 2))),
    ],
    ids=len,
)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_picture_of_any_number_of_dims(tmp_path: Path, dims: tuple[Dim, ...], suffix: str) -> None:
    path = save_picture(result(experiment(dims)), tmp_path / f"heads{suffix}")
    assert path.read_bytes()[:4] == (b"\x89PNG" if suffix == ".png" else b"<?xm")


def test_a_heatmap_is_centred_at_the_unpatched_run_and_labelled() -> None:
    position = Dim("position", (0, 1, 2), ("When", " $x$", " 日本"))
    values = np.array([[-4.0, 1.0, 0.0], [5.0, 0.0, np.nan]])
    figure = result(experiment((LAYER, position), missing=((1, 2),)), values).plot()
    ax = figure.axes[0]
    (image,) = ax.images
    assert image.get_clim() == (-4.0, 8.0)
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer", "position")
    shown = [t.get_text().replace("\\", "") for t in ax.get_xticklabels()]
    assert shown == ['0 "When"', '1 " $x$"', '2 " 日本"']
    rgba = image.to_rgba(image.get_array())
    assert np.allclose(rgba[1, 2], (0.8, 0.8, 0.8, 1))
    assert rgba[0, 0, 2] > rgba[0, 0, 0]
    assert rgba[1, 0, 0] > rgba[1, 0, 2]


def test_each_metric_and_each_further_coordinate_has_a_panel() -> None:
    two = (Metric("diff", Constant(0.0)), Metric("kl", Constant(0.0)))
    r = result(experiment((LAYER, HEAD, Dim("site", ("q", "k"))), metrics=two))
    titles = [ax.get_title() for ax in r.plot().axes]
    assert [t for t in titles if t] == ["diff at site=q", "diff at site=k", "kl at site=q", "kl at site=k"]
    image = r.plot("kl").axes[0].images[0].get_array()
    assert np.array_equal(np.asarray(image), r.values["kl"][:, :, 0])


def test_a_variable_over_heads_is_one_axis_beside_another() -> None:
    dims = (Dim("a.layer", (0, 1)), Dim("a.head", (0, 1)), Dim("b.layer", (0,)), Dim("b.head", (0, 1, 2)))
    r = result(experiment(dims))
    ax = r.plot().axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.0", "0.1", "1.0", "1.1"]
    assert np.array_equal(np.asarray(ax.images[0].get_array()), r.values["diff"].reshape(4, 3))


def test_too_many_panels_are_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchc.report.pictures.MOST_PANELS", 2)
    figure = result(experiment((LAYER, HEAD, Dim("c", (0, 1, 2)), Dim("d", (0, 1, 2))))).plot()
    assert figure.get_suptitle() == "heads (the first 2 panels; 4 more)"


# ---- for people


def test_the_terminal_shows_map_strongest_cells_and_what_it_took() -> None:
    r = result(experiment(title="each [bold]head"), no_effect=1, unfused_passes=6, check=Check(6, 1e-6, 1e-4, 3.0))
    r.files.append(Path("heads.png"))
    text = text_of(r)
    assert "heads  each [bold]head" in text
    first, second = [line.split() for line in text.splitlines() if "±" in line][:2]
    assert first == ["1", "2", "5", "±", "0.5", "+3"]
    assert second[:3] in (["0", "0", "0"], ["1", "1", "4"])
    assert "2 passes for 6 cells" in text
    assert "1 cell without any possible effect" in text
    assert "6 cells off by at most 1e-06" in text
    assert "written: heads.png" in text


def test_without_dims_a_line_a_metric() -> None:
    text = text_of(result(experiment(())))
    assert "diff = 0 ± 0.5  (unpatched: clean 2, corrupt -1)" in text


def test_a_map_that_does_not_fit_is_left_out_or_blocks() -> None:
    wide = result(experiment((LAYER, Dim("position", tuple(range(40))))))
    assert "position" in text_of(wide)
    assert "layer by position" not in text_of(wide)
    assert "layer by position" in text_of(wide, color_system="truecolor", force_terminal=True)


def test_no_line_is_wider_than_the_console() -> None:
    console = Console(width=60)
    for dims in [(), (HEAD,), (LAYER, HEAD), (LAYER, Dim("p", tuple(range(500))))]:
        lines = console.render_lines(shown(result(experiment(dims)), console))
        assert all(sum(s.cell_length for s in line) <= 60 for line in lines)


def test_the_strongest_cells_are_those_farthest_from_the_unpatched_run() -> None:
    assert strongest(result(), "diff", 2) == [(1, 2), (0, 0)]
    assert strongest(result(values=np.full((2, 3), 2.0)), "diff", 2) == []
    assert "no cell differs" in text_of(result(values=np.full((2, 3), 2.0)))


def test_the_columns_of_a_map_stay_apart() -> None:
    values = np.array([[-0.00171, -123456789.0, 1.0], [-1.5e-104, 0.123456, -0.0]])
    rows = [line.split() for line in text_of(result(values=values)).splitlines()]
    assert ["0", "-0.0017", "-1e+08", "1"] in rows
    assert ["1", "-2e-104", "0.123", "0"] in rows


def test_what_rounding_makes_is_no_effect() -> None:
    values = np.array([[2.0, 2.0 + 1e-7, 2.0 - 1e-6], [2.0, 2.1, 2.0]])
    assert strongest(result(values=values), "diff", 8) == [(1, 1)]


def test_html_is_escaped() -> None:
    r = result(experiment((Dim("w", ("<script>", "b")),), title="<i>"))
    made = Results({"heads": r}, {})._repr_html_()
    assert "<script>" not in made
    assert "&lt;i&gt;" in made
    assert "data:image/png;base64," in made


def test_numbers_for_people() -> None:
    assert [number(x) for x in (0.123456, -0.0, 12.0, 1e-9, float("nan"))] == [
        "0.1235",
        "0",
        "12",
        "1e-09",
        "-",
    ]
    assert label(Dim("p", (3,), (" John",)), 0) == '3 " John"'
    assert label(Dim("p", (3,), ("3 John",)), 0) == "3 John"


# ---- expectations


@pytest.mark.parametrize(
    ("op", "bound", "holds"),
    [(">", 2.9, True), (">", 3.0, False), (">=", 3.0, True), ("<", 3.0, False), ("<=", 3.0, True),
     ("<", 3.1, True), ("==", 3.0, True), ("==", 3.0000001, True), ("==", 3.1, False)],
)  # fmt: skip
def test_an_expectation_compares(op: str, bound: float, holds: bool) -> None:
    e = experiment(expects=(Expect("diff", ((1, 0),), op, bound),))
    assert (failed_expects(result(e)) == []) is holds


def test_a_failure_says_what_was_found_and_where() -> None:
    e = experiment(expects=(Expect("diff", ((0, 0), (0, 1), (1, 2)), ">", 1.0),))
    (found,) = failed_expects(result(e))
    assert found.code == "expect-failed"
    assert found.exit == 4
    assert found.message == "`diff` of `heads` is 0 at layer=0, head=0, expected > 1 (2 of 3 cells fail)"


def test_a_near_miss_shows_enough_digits() -> None:
    e = experiment((), expects=(Expect("diff", ((),), ">", 0.1),))
    (found,) = failed_expects(result(e, 0.0999999))
    assert "is 0.0999999, expected > 0.1" in found.message


# ---- the record


def a_study(ids: tuple[int, ...] = (1, 2), answer: int = 3, seeds: tuple[tuple[str, int], ...] = ()) -> Study:
    metric = Metric("m", Read(Measure.LOGIT, ((answer,),), (1,)))
    prompts = Prompts(Layout((2,)), (World("clean", (ids,)),))
    return Study(ModelChoice("toy"), prompts, (experiment(metrics=(metric,)),), seeds=seeds)


def a_record(spec: str = "spec", study: Study | None = None, weights: str = "weights") -> dict[str, Any]:
    more: dict[str, Any] = {"inputs": {}, "settings": {"threads": 1}, "plan": {"heads": (6, 1, 7, 8)}}
    return run_record(spec, study or a_study(), weights, **more)


def test_the_record_changes_with_what_it_records() -> None:
    record = a_record(study=a_study(seeds=(("resample", 0), ("resample", 3))))
    assert record == a_record(study=a_study(seeds=(("resample", 0), ("resample", 3))))
    assert record["spec"] != a_record("spec ")["spec"]
    assert record["data"] != a_record(study=a_study(ids=(1, 3)))["data"]
    assert record["data"] != a_record(study=a_study(answer=4))["data"]
    assert record["weights"] != a_record(weights="weight")["weights"]
    assert record["seeds"] == {"resample": [0, 3]}
    assert record["plan"] == {"heads": {"cells": 6, "passes": 1, "flops": 7, "bytes": 8}}
    assert {"patchc", "torch", "transformers", "transformer-lens", "python"} == set(record["versions"])
    assert json.loads(json.dumps(record)) == record


def test_a_record_beside_results_says_which_files_and_when(tmp_path: Path) -> None:
    made = result()
    (tmp_path / "sub").mkdir()
    for name in ("a.csv", "a.json", "sub/b.csv"):
        made.files.append(made.save(tmp_path / name))
    times = [datetime(2026, 1, 2, 3, 4, second, tzinfo=UTC) for second in (5, 6)]
    write_records(Results({"heads": made}, a_record()), "spec", Course(times[0], times[1], 99, {"heads": 2}))
    assert {p.name for p in tmp_path.rglob("*.record.json")} == {"a.record.json", "b.record.json"}
    found = json.loads((tmp_path / "a.record.json").read_text())
    assert list(found["files"]) == ["a.csv", "a.json"]
    digest = hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest()
    assert found["files"]["a.csv"] == f"sha256:{digest}"
    assert (found["started"], found["finished"]) == ("2026-01-02T03:04:05+00:00", "2026-01-02T03:04:06+00:00")
    assert (found["memory"], found["resumed_passes"], found["spec_text"]) == (99, {"heads": 2}, "spec")
    assert found["checks"] == {"heads": None}
    assert found.items() >= a_record().items()


def test_files_that_a_spec_names_are_hashed(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a")
    (tmp_path / "folder").mkdir()
    found = input_hashes([tmp_path / "data.csv", tmp_path / "folder"], tmp_path)
    assert found == {"data.csv": "sha256:" + hashlib.sha256(b"a").hexdigest()}


def test_reporting_needs_no_torch() -> None:
    code = "import sys, patchc.report; assert not {'torch', 'matplotlib', 'pandas', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
