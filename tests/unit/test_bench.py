"""The benchmark on a tiny model: its rows, their arithmetic, that the peers agree. Nothing here looks at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from io import StringIO

import pytest
import torch
from rich.console import Console

from patchc import api
from patchc.bench import PEERS, others, sweeps
from patchc.bench import run as run_module
from patchc.bench.drop_in import drop_in
from patchc.bench.measure import product_gflops, with_use
from patchc.bench.peers.autocircuit import node_name
from patchc.bench.peers.hooks import Hooks
from patchc.bench.peers.transformer_lens import TransformerLens
from patchc.bench.row import Bound, PeerTime, Row, scaled
from patchc.bench.run import OTHERS, Options, rows, steps
from patchc.bench.shape import ALL_DIFFERENT, GPT2_SMALL, IOI_LIKE, SETTINGS, Shape, random_model, random_worlds
from patchc.bench.sweeps import FULL, Bench, Effort, Part, measure, spread, strongest
from patchc.bench.table import COLUMNS, markdown, print_table, to_json
from patchc.bench.targets import TARGETS, bounds
from patchc.bench.works import EDGES, HEAD_OUT, PATH, PATTERN, RESID_PRE, WORKS, Work
from patchc.commands.bench import measure_rows
from tests.unit.commands import Run

TINY = Shape(n_layers=3, n_heads=2, d_model=16, d_vocab=40, n_ctx=16, prompts=2, length=5, shared=2)
TABLE = (
    "resid_pre [layer, pos]",
    "head out, all positions",
    "head q, k, v, all positions (each)",
    "head out [layer, pos, head]",
    "pattern [layer, head, dest, src]",
    "sender -> mlp* -> one receiver's q",
    "all edges",
)
ROW_KEYS = {
    "work", "setting", "cells", "cpu_s", "extrapolated", "peers", "ratio", "flops", "limit_ratio", "extra_bytes",
    "max_abs_diff", "largest_effect",
}  # fmt: skip
FEW = Effort(side_s=0.02, part_s=0.05, turns=2, wall=False)
SAMPLED = Effort(side_s=1e-9, part_s=0.05, layers_s=1e-9, wall=True)


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    def make() -> torch.nn.Module:
        return random_model(TINY)

    with torch.no_grad():
        yield Bench(api.load(make()), TINY, [TransformerLens(make), Hooks()], FEW, threads=1)


@pytest.fixture(autouse=True)
def speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of the size that is measured take longer than all else here."""
    for module in (sweeps, others):
        monkeypatch.setattr(module, "product_gflops", lambda: 80.0)


# ---- what is measured


def test_every_work_of_the_table_has_its_rows_and_targets_by_name() -> None:
    assert tuple(dict.fromkeys(work.name for work in WORKS)) == TABLE
    assert set(TARGETS) == {(name, setting) for name in TABLE for setting in SETTINGS}
    full = [(s.work, s.setting) for s in steps(Options())]
    assert set(TARGETS) <= set(full)
    assert full.count(("head q, k, v, all positions (each)", IOI_LIKE)) == 3


def test_a_quick_run_has_every_work_and_is_part_of_the_full_one() -> None:
    full, quick = ([(s.title, s.setting) for s in steps(Options(quick=q))] for q in (False, True))
    assert {s.work for s in steps(Options(quick=True))} >= set(TABLE)
    assert set(quick) < set(full)


@pytest.mark.parametrize(
    ("pattern", "works"),
    [("all edges", {"all edges", "planning all edges"}), ("all edges*", {"all edges"}), ("*[layer, pos]", {TABLE[0]})],
)
def test_rows_are_chosen_by_a_part_of_the_name_or_a_pattern(pattern: str, works: set[str]) -> None:
    assert {s.work for s in steps(Options(rows=pattern))} == works


def test_worlds_share_the_tokens_that_their_setting_says() -> None:
    for setting, shared in ((IOI_LIKE, GPT2_SMALL.shared), (ALL_DIFFERENT, 0)):
        worlds = random_worlds(GPT2_SMALL, setting)
        assert torch.equal(worlds.clean[:, :shared], worlds.corrupt[:, :shared])
        assert bool((worlds.clean[:, shared] != worlds.corrupt[:, shared]).all())


@pytest.mark.parametrize("work", WORKS, ids=lambda w: w.title)
def test_the_cells_of_all_layers_are_those_of_the_whole_sweep(bench: Bench, work: Work) -> None:
    data = random_worlds(TINY, ALL_DIFFERENT).columns()
    whole, some = (
        bench.model.compile(work.spec(TINY, layers), data=data).study.experiments[0].cells
        for layers in (None, work.some_layers(TINY, TINY.n_layers))
    )
    left_out = 1 + TINY.n_layers * (TINY.n_heads + 1) if work is EDGES else 0  # what the logits read has no layer
    assert len(some) == len(whole) - left_out


# ---- rows


@pytest.mark.parametrize("effort", [FULL, SAMPLED], ids=["whole", "sampled"])
def test_the_functions_of_transformer_lens_give_what_its_own_do(bench: Bench, effort: Effort) -> None:
    row = drop_in(dataclasses.replace(bench, effort=effort), "get_act_patch_attn_head_out_by_pos")
    assert row.cells == TINY.n_layers * TINY.length * TINY.n_heads
    assert row.peers["transformer-lens"].extrapolated == (row.compared < row.cells) == (effort is SAMPLED)
    assert row.max_abs_diff is not None
    assert row.largest_effect is not None
    assert row.max_abs_diff < 1e-5 < 1e-3 < row.largest_effect


@pytest.mark.parametrize("work", [RESID_PRE, HEAD_OUT, PATH, EDGES], ids=lambda w: w.title)
def test_every_peer_agrees(bench: Bench, work: Work) -> None:
    row = measure(bench, work, ALL_DIFFERENT)
    assert set(row.peers) == {"transformer-lens", "hooks"} == set(row.ratio)
    assert row.max_abs_diff is not None
    assert row.largest_effect is not None
    assert row.max_abs_diff < 1e-5 < 1e-3 < row.largest_effect
    assert row.compared > 1
    assert not row.bounds  # the targets are those of another shape


@pytest.mark.parametrize("work", WORKS[2:6], ids=lambda w: w.title)
def test_transformer_lens_functions_have_the_spec_s_cells(bench: Bench, work: Work) -> None:
    """Each number stands in the cell of its own coordinates: were two dims exchanged, they would differ."""
    lens = [p for p in bench.peers if p.name == "transformer-lens"]
    row = measure(dataclasses.replace(bench, peers=lens), work, ALL_DIFFERENT)
    assert row.max_abs_diff is not None
    assert row.largest_effect is not None
    assert row.max_abs_diff < 1e-5 < 1e-3 < row.largest_effect


def test_a_disagreement_shows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    by_cell = sweeps.by_cell
    monkeypatch.setattr(sweeps, "by_cell", lambda result: {c: v + 0.5 for c, v in by_cell(result).items()})
    row = measure(bench, HEAD_OUT, ALL_DIFFERENT)
    assert row.max_abs_diff == pytest.approx(0.5, abs=1e-5)


def test_a_sweep_too_long_runs_some_layers_and_says_so(bench: Bench) -> None:
    whole = measure(dataclasses.replace(bench, peers=()), PATTERN, ALL_DIFFERENT)
    row = measure(dataclasses.replace(bench, effort=SAMPLED), PATTERN, ALL_DIFFERENT)
    assert row.extrapolated
    assert not whole.extrapolated
    assert all(peer.extrapolated for peer in row.peers.values())
    assert (row.cells, row.planned_flops) == (whole.cells, whole.planned_flops)
    assert whole.flops is not None
    assert row.flops == pytest.approx(whole.flops, rel=0.01)
    assert row.wall_s is not None
    assert "patchc ran the cells of layer 1," in row.notes[0]


@pytest.mark.parametrize(
    "other",
    [o for o in OTHERS if o.name.startswith(("compiled", "planning")) or o.name in ("cells: 1,000", "memory 0.5 GiB")],
    ids=lambda o: o.name,
)
def test_the_other_rows(bench: Bench, other: others.Other) -> None:
    row = other.measure(bench)
    assert row.cpu_s > 0
    assert all(b.met for b in row.bounds)


# ---- arithmetic


def test_extrapolation_scales_all_but_what_every_run_has() -> None:
    part = Part("", (1,), flops=30, whole_flops=110, fixed_flops=10, whole_cells=9, rows_a_layer=1, planning_s=0.0)
    assert part.whole(2.5, 0.5) == pytest.approx(0.5 + 2.0 * 100 / 20)
    assert dataclasses.replace(part, layers=None).whole(2.5, 0.5) == 2.5
    assert scaled(3.0, 6, 60) == 30.0


def test_some_layers_are_evenly_spread() -> None:
    assert HEAD_OUT.some_layers(GPT2_SMALL, 3) == (2, 6, 10)
    assert HEAD_OUT.some_layers(GPT2_SMALL, 1) == (6,)
    assert PATH.some_layers(GPT2_SMALL, 99) == tuple(range(9))


def test_spread_cells_hold_the_strongest() -> None:
    values = {(i,): float(i == 7) for i in range(100)}
    assert strongest(values) == (7,)
    chosen = spread(list(values), 5, (7,))
    assert chosen == [(7,), (10,), (30,), (50,), (70,), (90,)]


def test_a_matrix_product_s_flops_are_counted_and_its_memory_is_seen() -> None:
    x = torch.ones(512, 512)
    _, _, used = with_use(lambda: None, lambda _: [x @ x for _ in range(3)])
    assert used.flops == 3 * 2 * 512**3
    assert product_gflops(1) > 0


def row(**settings: object) -> Row:
    values: dict[str, object] = {
        "work": HEAD_OUT.name, "setting": IOI_LIKE, "cells": 144, "cpu_s": 4.0, "flops": 200 * 10**9,
        "peers": {"transformer-lens": PeerTime(36.0, extrapolated=True)}, "limit_ratio": 1.5, "extra_bytes": 10**8,
        "max_abs_diff": 1e-6, "largest_effect": 0.5,
    }  # fmt: skip
    return Row(**{**values, **settings})  # type: ignore[arg-type]


def test_targets_met_and_missed() -> None:
    met = {b.unit: b.met for b in bounds(row(), GPT2_SMALL, rows_a_layer=1000)}
    assert met == {"GFLOP": True, "x TransformerLens": False, "x FLOP limit": False, "MB": True, "difference": True}
    small = {b.unit: b.met for b in bounds(row(), GPT2_SMALL, rows_a_layer=50)}
    assert small["x FLOP limit"]  # a sweep of few rows may be further from the limit
    assert bounds(row(), TINY, rows_a_layer=50) == ()


# ---- forms


def test_json_has_the_keys_that_are_promised() -> None:
    found = json.loads(json.dumps(to_json([row(bounds=(Bound("MB", 1.0, 2.0),))]), allow_nan=False))
    assert found["format_version"] == 1
    assert set(found["rows"][0]) == ROW_KEYS
    assert found["rows"][0]["peers"] == {"transformer-lens": {"cpu_s": 36.0, "extrapolated": True}}
    assert found["rows"][0]["ratio"] == {"transformer-lens": 9.0}
    assert found["details"][0]["bounds"] == [
        {"unit": "MB", "measured": 1.0, "limit": 2.0, "at_most": True, "met": True}
    ]
    assert {"processor", "cores", "versions"} <= set(found["machine"])


def test_tables_show_what_was_extrapolated_and_whether_targets_are_met() -> None:
    found = row(bounds=(Bound("x TransformerLens", 9.0, 10.0, at_most=False),), notes=("transformer-lens ran 6 cells",))
    console = Console(width=200, record=True, file=StringIO())
    print_table([found], console)
    for text in (markdown([found]), console.export_text()):
        assert "transformer-lens ~36 s = 9x" in text
        assert "NOT 9 x TransformerLens (at least 10)" in text
        assert "transformer-lens ran 6 cells" in text
        assert "Measured on" in text
    assert markdown([found]).splitlines()[0].count("|") == len(COLUMNS) + 1


def test_names_of_nodes_in_autocircuit_s_spelling() -> None:
    names = {"input": "Resid Start", "head[1, 0]": "A1.0", "head[1, 0].q": "A1.0.Q", "mlp[2]": "MLP 2"}
    assert {name: node_name(name) for name in names} == names
    assert node_name("logits") == "Resid End"


# ---- the command


def test_missing_peers_are_said_and_threads_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    set_to: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    asked = Options(rows="planning*", peers=("autocircuit",), autocircuit="no-such-python", shape=TINY)
    (found,) = rows(asked, said.append)
    assert found.peers == {}
    assert any(text.startswith("without autocircuit: no-such-python does not run") for text in said)
    assert set_to == [1, 3]


def test_a_row_that_there_is_not_is_an_error_that_names_them(run: Run) -> None:
    ran = run("bench", "--rows", "no such row", "--format", "json")
    assert ran.exit == 2
    (found,) = ran.json["diagnostics"]
    assert found["code"] == "no-such-row"
    assert all(name in found["message"] for name in TABLE)


def test_the_command_prints_one_json_object(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "rows", lambda *_: [row()])
    ran = run("bench", "--quick", "--format=json", "--peers", PEERS[0])
    assert ran.exit == 0
    assert len(ran.json["rows"]) == 1


def test_a_benchmark_that_is_stopped_prints_the_rows_that_are_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> Iterator[Row]:
        yield Row("one work", "", 3, 1.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "rows", stopped)
    with pytest.raises(KeyboardInterrupt):
        measure_rows(Options(), "markdown")
    assert "| one work |" in capsys.readouterr().out
