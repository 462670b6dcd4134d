"""Runs that are stopped and started again: killed at any point, they come to the identical result; never mixed."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import patchc
from patchc import kept_files
from patchc.api import Compiled, Model
from patchc.cli import main
from patchc.diagnostics import Diagnostic
from patchc.execute.sweep import Sweep
from patchc.report.results import Results
from tests.models import gpt2
from tests.unit.commands import DATA, HEADS, MODEL, ONE, Run, spec

SPEC = """
metric diff = logit(answer) - logit(wrong)
experiment nodes {
  for h in head, p in positions
  run clean
  patch node h @ p with corrupt
  measure diff, kl(corrupt)
  save "nodes.csv"
}
experiment edges {
  for w in writers, r in head[1, *].q | logits
  run clean
  patch edge w -> r with corrupt
  measure diff
  save "edges.json"
}
"""
IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8]],
    "corrupt": [[1, 9, 3, 4], [5, 6, 10, 8]],
    "answer": [11, 12],
    "wrong": [13, 14],
}
MEMORY = 1 << 13
FILES = ("nodes.csv", "edges.json")


@cache
def model() -> Model:
    return patchc.load(gpt2(n_layer=2))


@cache
def uninterrupted() -> tuple[Any, int]:
    """The numbers, and how many passes they take."""
    compiled = model().compile(SPEC, IDS, memory=MEMORY)
    results = compiled.run(progress=False, write=False)
    return results.to_json(), sum(p.n_passes for p in compiled.programs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    out = tmp_path / "a.patch"
    out.write_text(SPEC, encoding="utf-8")
    return out


def compiled(path: Path, data: Any = IDS, memory: int | None = MEMORY, **more: Any) -> Compiled:
    return model().compile(path, data, memory=memory, **more)


def run(made: Compiled, **more: Any) -> Results:
    return made.run(progress=False, keep_every=0, **more)


def kept(path: Path) -> list[Path]:
    return sorted(path.parent.glob("a.patch.partial/*/*.safetensors"))


def stop_after(made: Compiled, passes: int, error: type[BaseException] = KeyboardInterrupt, **more: Any) -> None:
    """Run until so many passes are done."""
    told: list[int] = []

    def tell(_: str, done: int, __: int) -> None:
        told.append(done)
        if len(told) > passes:  # the first time, cells without effect are told of
            raise error

    with pytest.raises(error):
        made.run(progress=tell, **{"keep_every": 0, **more})


def passes_run(made: Compiled, patched: pytest.MonkeyPatch, **more: Any) -> tuple[int, Results]:
    """How many passes a run did not find kept."""
    ran: list[object] = []
    real = Sweep._pass
    patched.setattr(Sweep, "_pass", lambda self, *a: ran.append(a) or real(self, *a))
    return (results := run(made, **more)) and (len(ran), results)


# ---- killed


def killed(act: Callable[[], object], when: Callable[[], bool]) -> bool:
    """Do it in another process, and kill that as soon as `when`; whether it was killed before it was done."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(0)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if when():
            os.kill(child, signal.SIGKILL)
            return os.WIFSIGNALED(os.waitpid(child, 0)[1])
        time.sleep(0.0005)
    return os.WIFSIGNALED(ended[1])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_run_killed_at_random_points_comes_to_the_identical_files(path: Path) -> None:
    expected, n = uninterrupted()
    run(compiled(path))
    whole = {name: (path.parent / name).read_bytes() for name in FILES}
    for name in FILES:
        (path.parent / name).unlink()
    points = sorted(random.Random(0).sample(range(1, n - 8), 4))
    stopped = [killed(lambda: run(compiled(path)), lambda at=at: len(kept(path)) >= at) for at in points]
    assert any(stopped)
    assert kept(path)
    assert not any((path.parent / name).exists() for name in FILES)
    results = run(compiled(path))
    assert results.to_json() == expected
    assert {name: (path.parent / name).read_bytes() for name in FILES} == whole
    assert not (path.parent / "a.patch.partial").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("step", ["replace", "save_file"])
def test_killed_while_it_writes(path: Path, monkeypatch: pytest.MonkeyPatch, step: str, at: int) -> None:
    expected, n = uninterrupted()
    module = os if step == "replace" else kept_files
    real, calls = getattr(module, step), list[object]()

    def deadly(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > at:
            if step == "save_file":
                Path(arguments[1]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(module, step, deadly)
        assert killed(lambda: run(compiled(path)), lambda: False)
    done = at - (step == "replace")  # the first file says what the others are of
    assert len([p for p in kept(path) if not p.name.startswith(".")]) == done
    again, results = passes_run(compiled(path), monkeypatch)
    assert again == n - done
    assert results.to_json() == expected
    assert not (path.parent / "a.patch.partial").exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_command_killed_is_resumed_and_records_it(run: Run, tmp_path: Path) -> None:
    sweep = HEADS.replace("for h in head", "for h in head, p in positions").replace("node h", "node h @ p")
    name = spec(MODEL, DATA, sweep.replace("kl(clean)", 'kl(clean) save "a.csv"'))
    assert run("run", name, "--memory", "1").exit == 0
    whole = Path("a.csv").read_bytes()
    assert json.loads(Path("a.record.json").read_text())["resumed_passes"] == {"heads": 0}
    line = ("run", name, "--quiet", "--keep-every", "0")
    assert killed(lambda: main([*line, "--memory", "1"]), lambda: len(kept(tmp_path / name)) > 2)
    n = len([p for p in kept(tmp_path / name) if not p.name.startswith(".")])
    Path("a.csv").unlink()
    ran = run(*line)
    assert (ran.exit, ran.err) == (0, "")
    assert Path("a.csv").read_bytes() == whole
    record = json.loads(Path("a.record.json").read_text())
    assert (record["resumed_passes"], record["memory"]) == ({"heads": n}, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", name, "a.record.json"]


# ---- stopped


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_run_goes_on(path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    expected, n = uninterrupted()
    stop_after(compiled(path), 5, error)
    assert 0 < len(kept(path)) < n
    done = len(kept(path))
    again, results = passes_run(compiled(path), monkeypatch)
    assert (again, results.to_json()) == (n - done, expected)


def test_an_interrupt_keeps_what_was_not_written_yet_and_says_so(path: Path) -> None:
    made, told = compiled(path), list[int]()

    def tell(_: str, done: int, __: int) -> None:
        told.append(done)
        if len(told) == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        made.run(progress=tell)
    (file,) = kept(path)  # passes that are finished together are one file
    passes = [p for program in made.programs for p in program.passes]
    done, n = (sum(len(p.cells) for p in some) for some in (passes[:3], passes))
    assert stopped.value.__notes__ == [f"{done} of {n} cells are kept in {file.parent}"]


def test_a_short_run_keeps_nothing(path: Path) -> None:
    stop_after(compiled(path), 5, RuntimeError, keep_every=60)
    assert [p.name for p in path.parent.iterdir()] == ["a.patch"]


def test_a_run_that_could_not_write_its_results_need_not_run_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path.parent / "edges.json").mkdir()
    with pytest.raises(patchc.PatchcError, match="cannot-write"):
        run(compiled(path))
    (path.parent / "edges.json").rmdir()
    assert passes_run(compiled(path), monkeypatch)[0] == 0


# ---- what may be resumed


def test_another_budget_is_another_run_and_none_is_the_kept_one(path: Path) -> None:
    stop_after(compiled(path), 5)
    other = compiled(path, memory=MEMORY * 2)
    (warning,) = other.warnings
    assert (warning.code, warning.is_error) == ("not-resumed", False)
    assert f"the memory ({MEMORY} then, {MEMORY * 2} now)" in warning.message
    same = compiled(path, memory=None)
    assert (same.memory, same.warnings) == (MEMORY, ())
    assert run(same).to_json() == uninterrupted()[0]


def other_weights() -> Any:
    module: Any = gpt2(n_layer=2)
    with torch.no_grad():
        module.transformer.h[0].mlp.c_fc.bias[0] += 1e-3
    return module


def other_settings() -> Any:
    module: Any = gpt2(n_layer=2)
    module.transformer.ln_f.eps = 1e-3
    return module


def _edited(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_what_differs_is_named_and_nothing_is_mixed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(compiled(path), 5)
    before = kept(path)
    data = {**IDS, "wrong": [13, 15]}
    others = {
        "the data": lambda: compiled(path, data),
        "the spec": lambda: (_edited(path, "h @ p with corrupt", "h @ p with zero"), compiled(path))[1],
        "the weights": lambda: patchc.load(other_weights()).compile(path, IDS, memory=MEMORY),
        "what the model computes": lambda: patchc.load(other_settings()).compile(path, IDS, memory=MEMORY),
    }
    for what, make in others.items():
        made = make()
        (warning,) = made.warnings
        assert (warning.code, warning.message.endswith(f"what differs: {what}")) == ("not-resumed", True), warning
        total = sum(p.n_passes for p in made.programs)
        with monkeypatch.context() as patched:
            assert passes_run(made, patched)[0] == total
        assert kept(path) == before
        path.write_text(SPEC)
    assert compiled(path).warnings == ()
    assert run(compiled(path)).to_json() == uninterrupted()[0]


def test_words_that_change_no_number_do_not_matter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(compiled(path), 5)
    _edited(path, "experiment edges {", 'experiment edges "every edge" {  # of all layers')
    _edited(path, "edges.json", "others.json")
    made = compiled(path)
    assert made.warnings == ()
    assert passes_run(made, monkeypatch)[0] < uninterrupted()[1]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads; afterwards they are as before."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_code_and_the_way_of_computing_count(
    path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    threads(1)
    stop_after(compiled(path), 5)
    threads(7)
    assert compiled(path).warnings[0].message.endswith("what differs: the threads (1 then, 7 now)")
    monkeypatch.setattr("patchc.resuming._code", lambda: "another")
    assert "the code of patchc, the threads" in compiled(path).warnings[0].message


def test_threads_that_change_between_compiling_and_running_count(
    path: Path, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    threads(1)
    stop_after(compiled(path), 5)
    made = compiled(path)
    assert made.warnings == ()
    threads(7)
    assert passes_run(made, monkeypatch)[0] == uninterrupted()[1]
    assert kept(path)


def test_what_was_half_written_goes_with_the_run(path: Path) -> None:
    stop_after(compiled(path), 5)
    (kept(path)[0].parent / ".half-written").write_text("half")
    run(compiled(path))
    assert not (path.parent / "a.patch.partial").exists()


def test_fresh_discards_what_is_kept(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(compiled(path), 5)
    (path.parent / "a.patch.partial" / "mine.txt").write_text("mine")
    made = compiled(path, fresh=True)
    assert not kept(path)
    assert (path.parent / "a.patch.partial" / "mine.txt").exists()
    assert passes_run(made, monkeypatch)[0] == uninterrupted()[1]


ABOUT = '{"format_version": 1, "binding": {}}'


@pytest.mark.parametrize(
    ("folder", "about"),
    [("mine", ABOUT), ("0123456789abcdef", "{}"), ("0123456789abcdef", '{"binding": 7}'), ("link", ABOUT)],
)
def test_fresh_leaves_what_is_somebody_elses(path: Path, folder: str, about: str) -> None:
    place = path.parent / "kept" / folder
    place.mkdir(parents=True)
    if folder == "link":
        place = place.rename(path.parent / "elsewhere")
        (path.parent / "kept" / "0123456789abcdef").symlink_to(place)
    (place / "run.json").write_text(about)
    for name in ("model.safetensors", "0-00000000-00000001.safetensors"):
        (place / name).write_text("mine")
    before = sorted(path.parent.rglob("*"))
    compiled(path, partial=path.parent / "kept", fresh=True)
    assert sorted(path.parent.rglob("*")) == before


def test_fresh_leaves_files_of_other_names_beside_the_kept(path: Path) -> None:
    stop_after(compiled(path), 5)
    (about,) = path.parent.glob("a.patch.partial/*/run.json")
    mine = about.with_name("model.safetensors")
    mine.write_text("mine")
    about.with_name(".0-00000000-00000001-0123abcd.safetensors").write_text("half")
    compiled(path, fresh=True)
    assert list(about.parent.iterdir()) == [mine]


def _damaged(path: Path, how: str) -> None:
    content = path.read_bytes()
    match how:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "empty":
            path.write_bytes(b"")
        case "flipped":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "other":
            save_file({"passes": torch.tensor([0])}, path)
        case _:
            shutil.copyfile(sorted(path.parent.glob("1-*"))[0], path)


@pytest.mark.parametrize("how", ["cut", "empty", "flipped", "other", "of another experiment"])
def test_a_damaged_file_counts_as_absent(path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    expected, n = uninterrupted()
    made = compiled(path)
    stop_after(made, made.programs[0].n_passes + 3)
    found = kept(path)
    _damaged(found[2], how)
    again, results = passes_run(compiled(path), monkeypatch)
    assert (again, results.to_json()) == (n - len(found) + 1, expected)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{}", '{"format_version": 1, "binding": 7}', "\udcff"])
def test_a_damaged_description_is_another_run(path: Path, text: str) -> None:
    stop_after(compiled(path), 5)
    (about,) = path.parent.glob("a.patch.partial/*/run.json")
    about.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert [w.code for w in compiled(path).warnings] in ([], ["not-resumed"])
    assert run(compiled(path)).to_json() == uninterrupted()[0]


# ---- where nothing can be kept


def test_a_place_that_cannot_be_written_stops_nothing(path: Path) -> None:
    path.with_name("a.patch.partial").write_text("a file")
    said: list[Diagnostic] = []
    assert run(compiled(path), say=said.append).to_json() == uninterrupted()[0]
    assert [d.code for d in said] == ["not-kept"]
    with pytest.warns(UserWarning, match="not-kept"):
        run(compiled(path))


def test_a_text_keeps_its_passes_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stop_after(compiled(SPEC), 5, write=False)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    told: dict[str, Any] = {"partial": tmp_path / "kept"}
    stop_after(compiled(SPEC, **told), 5, write=False)  # type: ignore[arg-type]
    assert list(tmp_path.glob("kept/*/run.json"))
    assert passes_run(compiled(SPEC, **told), monkeypatch, write=False)[0] < uninterrupted()[1]  # type: ignore[arg-type]


def test_a_python_metric_is_not_kept(tmp_path: Path) -> None:
    text = "experiment e { for h in head run clean patch node h with corrupt measure f }"
    given: dict[str, Any] = {"f": lambda logits: logits[:, -1, 0]}
    made = model().compile(text, IDS, metrics=given, memory=1, partial=tmp_path / "kept")
    assert [w.code for w in made.warnings] == ["not-kept"]
    run(made)
    assert not list(tmp_path.iterdir())


def test_files_hold_whole_passes(path: Path) -> None:
    stop_after(compiled(path), 5)
    found = load_file(kept(path)[0])
    assert {k: v.dtype for k, v in found.items()} == {
        "passes": torch.int64,
        "silent": torch.bool,
        "0": torch.float64,
        "1": torch.float64,
    }


# ---- the command


def test_an_interrupted_command_says_how_to_resume(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = spec(MODEL, DATA, HEADS, ONE, name="my spec.patch")
    line = ("run", name, "--memory", "1", "--fresh", "--check")
    whole = run("run", "--format", "json", name, "--memory", "1").json
    real = Sweep._pass
    calls: list[object] = []

    def stopping(self: Sweep, *arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 2:
            signal.raise_signal(signal.SIGINT)
        return real(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Sweep, "_pass", stopping)
        ran = run(*line)
    assert (ran.exit, ran.out, ran.codes) == (130, "", ["interrupted"])
    said = re.search(r"interrupted: ([1-4]) of 5 cells are kept in my spec.patch.partial/", ran.err)
    assert said
    assert "to resume it: `patchc run 'my spec.patch' --memory 1 --check`" in ran.err
    with monkeypatch.context() as patched:
        patched.setattr(Sweep, "_pass", lambda *_: signal.raise_signal(signal.SIGINT))
        ran = run("run", name, "--format", "json")
    assert (ran.exit, [d["code"] for d in ran.json["diagnostics"]]) == (130, ["interrupted"])
    assert f"{said[1]} of 5 cells are kept" in ran.json["diagnostics"][0]["message"]
    calls.clear()
    monkeypatch.setattr(Sweep, "_pass", lambda self, *a: calls.append(a) or real(self, *a))
    assert run("run", "--format", "json", name).json == whole
    assert 0 < len(calls) < 3
    assert [p.name for p in tmp_path.iterdir()] == [name]
