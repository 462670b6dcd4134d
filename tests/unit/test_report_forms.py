"""Dims over prompts, intervals, tables, bars and lines, and what `expect` says of ranks: the less common forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from patchc.ir.experiment import Constant, Dim, Expect, Interval, Metric, PromptDim, Show
from patchc.report import Result
from patchc.report.expects import failed_expects
from patchc.report.files import save_picture, save_table
from patchc.report.pictures import draw
from tests.unit.test_report import HEAD, LAYER, experiment, result, text_of

PROMPTS = PromptDim(1, "prompt", (0, 2))


def by_prompt(**more: object) -> Result:
    """[layer 2, prompt 2, head 3], of prompts 0 and 2 of three."""
    e = experiment(by_prompt=PROMPTS, **more)
    values = np.arange(12.0).reshape(2, 2, 3)
    own = {"diff": np.array([1.0, 100.0, 3.0])}
    unknown = np.full((2, 2, 3), np.nan)
    return Result(
        e, {"diff": values}, {"diff": unknown}, 1, {"diff": {"clean": 2.0}}, prompts=PROMPTS, own_baselines=own
    )


def with_interval() -> Result:
    e = experiment(metrics=(Metric("diff", Constant(0.0), interval=Interval(0.9)),))
    values = np.arange(6.0).reshape(2, 3)
    return result(e, values, low={"diff": values - 1}, high={"diff": values + 2})


# ---- a dim over prompts


def test_the_dim_over_prompts_stands_at_its_place() -> None:
    r = by_prompt()
    assert [d.name for d in r.dims] == ["layer", "prompt", "head"]
    assert r["diff"].sel(layer=1, prompt=2, head=0) == 9.0
    assert r.to_json()["coords"]["prompt"] == [0, 2]
    assert r.to_json()["n"] == 1
    assert len(r.to_pandas()) == 12


def test_a_prompt_is_compared_with_its_own_unpatched_run() -> None:
    np.testing.assert_array_equal(by_prompt().effects("diff")[0], [[-1, 0, 1], [0, 1, 2]])


def test_where_the_sweep_has_no_cell_no_prompt_has() -> None:
    e = experiment(missing=((0, 1),), by_prompt=PROMPTS)
    r = Result(e, {"diff": np.zeros((2, 2, 3))}, {"diff": np.zeros((2, 2, 3))}, 1, {}, prompts=PROMPTS)
    assert np.isnan(r.values["diff"][0, :, 1]).all()
    assert np.isnan(r.values["diff"]).sum() == 2


def test_an_expectation_speaks_of_prompts_where_the_spec_does() -> None:
    (found,) = failed_expects(by_prompt(expects=(Expect("diff", ((1, 1, 0),), "<", 9.0),)))
    assert "is 9 at layer=1, prompt=2, head=0" in found.message


def test_an_expectation_speaks_of_means_where_only_the_command_asked_for_prompts() -> None:
    added = PromptDim(2, "prompt", (0, 1))
    values = np.stack([np.full((2, 3), 1.0), np.full((2, 3), 3.0)], -1)
    expects = (Expect("diff", ((0, 0),), "==", 2.0), Expect("diff", ((0, 0),), "<", 2.0))
    e = experiment(expects=expects)
    r = Result(e, {"diff": values}, {"diff": values}, 1, {}, prompts=added)
    (found,) = failed_expects(r)
    assert found.message == "`diff` of `heads` is 2 at layer=0, head=0, expected < 2"


# ---- intervals


def test_an_interval_is_in_every_form() -> None:
    r = with_interval()
    assert r.to_json()["intervals"]["diff"]["level"] == 0.9
    assert r.to_json()["intervals"]["diff"]["high"][1] == [5.0, 6.0, 7.0]
    assert list(r.to_pandas().columns) == ["layer", "head", "diff", "diff_stderr", "diff_low", "diff_high", "n"]
    assert r.to_xarray()["diff_low"].sel(layer=1, head=2) == 4.0
    assert "5 [4, 7]" in text_of(r)
    json.dumps(r.to_json(), allow_nan=False)


def test_without_an_interval_json_has_no_such_key() -> None:
    assert "intervals" not in result().to_json()


# ---- pictures and tables


@pytest.mark.parametrize("kind", ["bar", "line", "heatmap"])
@pytest.mark.parametrize("dims", [(), (HEAD,), (LAYER, HEAD), (Dim("c", (-1.5, 0, 2)), LAYER, HEAD)])
def test_every_kind_of_picture_of_any_dims(tmp_path: Path, kind: str, dims: tuple[Dim, ...]) -> None:
    path = save_picture(result(experiment(dims)), tmp_path / "x.png", kind=kind)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_lines_run_along_the_first_variable() -> None:
    axes = draw(with_interval(), ("diff",), "line").axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in lines] == [[0, 3], [1, 4], [2, 5]]
    assert axes.get_xlabel() == "layer"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["0", "1", "2"]
    assert len(axes.collections) == 3  # the bands of the intervals


def test_bars_are_all_cells_and_their_errors() -> None:
    axes = draw(with_interval(), ("diff",), "bar").axes[0]
    assert len(axes.patches) == 6
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]


def test_a_picture_of_no_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="heatmap, bar, line"):
        draw(result(), ("diff",), "pie")


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".csv"])
def test_a_table_has_a_row_a_cell(tmp_path: Path, suffix: str) -> None:
    text = save_table(result(experiment(missing=((0, 1),))), tmp_path / f"t{suffix}").read_text()
    lines = [line for line in text.splitlines() if "±" in line or suffix == ".csv"]
    assert len(lines) == (6 if suffix == ".csv" else 5)
    assert "diff" in text


def test_a_bar_in_a_label_does_not_break_a_markdown_table(tmp_path: Path) -> None:
    text = save_table(result(experiment((Dim("p", ("a|b",)),))), tmp_path / "t.md").read_text()
    assert r"| a\|b |" in text


def test_show_table_prints_every_cell() -> None:
    shown = text_of(result(experiment(shows=(Show("table"),))))
    assert sum("±" in line for line in shown.splitlines()) == 6


# ---- expectations


@pytest.mark.parametrize(("bound", "within", "holds"), [(2.9, 0.2, True), (2.9, 0.05, False), (3.0, 0.0, True)])
def test_equal_within_a_tolerance(bound: float, within: float, holds: bool) -> None:
    e = experiment(expects=(Expect("diff", ((1, 0),), "==", bound, tolerance=within),))
    assert (failed_expects(result(e)) == []) is holds


@pytest.mark.parametrize(
    ("top", "index", "holds"), [(1, (1, 2), True), (1, (0, 0), False), (2, (0, 0), True), (3, (0, 2), False)]
)
def test_the_top_are_the_largest_changes_either_way(top: int, index: tuple[int, int], holds: bool) -> None:
    e = experiment(expects=(Expect("diff", (index,), "includes", 0.0, top=top),))  # 0..5, unpatched 2
    assert (failed_expects(result(e)) == []) is holds


def test_equal_sizes_are_on_top_together() -> None:
    e = experiment(expects=(Expect("diff", ((0, 0), (1, 1)), "includes", 0.0, top=3),))
    assert failed_expects(result(e)) == []  # changes -2, -1, 0, 1, 2, 3: the second and third are 2 in size


def test_a_cell_that_is_not_on_top_says_who_is() -> None:
    e = experiment(expects=(Expect("diff", ((0, 1),), "includes", 0.0, top=1),))
    (found,) = failed_expects(result(e))
    assert found.message == (
        "layer=0, head=1 is number 4 of `heads` by the size of its effect on `diff`, expected among the top 1"
    )
    assert [n.message for n in found.notes] == ["the strongest: layer=1, head=2: 3", "its own effect: 1"]


# ---- columns


def test_no_metric_takes_the_column_of_what_belongs_to_another() -> None:
    names = ("x_stderr", "x", "y")
    r = result(experiment(metrics=tuple(Metric(n, Constant(0.0)) for n in names)))
    columns = list(r.to_pandas().columns)
    assert len(columns) == len(set(columns)) == 2 + 2 * len(names) + 1
    assert float(r["x_stderr"].sel(layer=1, head=2)) == 5.0  # its own numbers, not the error of x
