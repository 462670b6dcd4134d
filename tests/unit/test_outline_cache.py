"""The graphs that are kept on disk: when one is taken, when it is made anew, and what may happen to its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from patchc.ir.graph import residual_graph
from patchc.ir.program import Rates
from patchc.model import blank, outline_cache
from patchc.model import cache as disk
from patchc.model.cache import cache_folder
from patchc.model.outline import outline
from patchc.model.outline_cache import Facts, cache_key, keep_facts, read_facts

CONFIG = {"model_type": "some-model", "sizes": [1, 2.5, None]}
GRAPH = residual_graph("", n_layers=2, n_heads=2, d_model=8, d_head=4, d_vocab=9, has_pos_embed=True, n_ctx=8)
FACTS = Facts(GRAPH, Rates({1: 2, 3: 4}, 5, 6, 7, 8), 4)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


@pytest.fixture
def entry(folder: Path) -> Path:
    """The file that a graph is kept in."""
    keep_facts(cache_key(CONFIG, None, None), FACTS)
    (path,) = kept(folder)
    return path


def test_a_graph_is_kept_and_read(entry: Path) -> None:
    assert read_facts(cache_key(dict(reversed(CONFIG.items())), None, None)) == FACTS
    assert json.loads(entry.read_text())["key"] == cache_key(CONFIG, None, None)


def changed(part: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(key: dict[str, Any]) -> dict[str, Any]:
        versions = key["versions"]
        return {**key, "versions": {**versions, part: "0"}} if part in versions else {**key, part: "other"}

    return change


PARTS = ("format", "config", "dtype", "attention", "tracer", "patchc", "torch", "transformers", "transformer-lens")


@pytest.mark.usefixtures("entry")
@pytest.mark.parametrize("part", PARTS)
def test_a_graph_of_anything_else_is_not_taken(part: str) -> None:
    key = cache_key(CONFIG, None, None)
    assert set(PARTS) == (set(key) | set(key["versions"])) - {"versions"}
    assert read_facts(changed(part)(key)) is None
    assert read_facts(key) == FACTS


def other_number(text: str) -> str:
    content = json.loads(text)
    content["content"]["graph"]["n_ctx"] += 1
    return json.dumps(content)


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut": lambda text: text[: len(text) // 2],
    "no object": lambda _: "[]",
    "nothing in it": lambda _: "{}",
    "another number": other_number,
    "another's": lambda text: text.replace("some-model", "another"),
    "no text": lambda _: "\udcff",
    "deep": lambda _: "[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_counts_as_absent(entry: Path, damage: str) -> None:
    key, whole = cache_key(CONFIG, None, None), entry.read_text()
    entry.write_bytes(DAMAGE[damage](whole).encode("utf-8", "surrogateescape"))
    assert read_facts(key) is None
    keep_facts(key, FACTS)
    assert entry.read_text() == whole


def test_a_directory_in_its_place(entry: Path) -> None:
    entry.unlink()
    entry.mkdir()
    keep_facts(cache_key(CONFIG, None, None), FACTS)
    assert read_facts(cache_key(CONFIG, None, None)) is None
    assert kept(entry.parent) == []  # nor is a half-written file left


def test_where_nothing_can_be_written_nothing_is_kept(folder: Path) -> None:
    folder.write_text("a file")
    keep_facts(cache_key(CONFIG, None, None), FACTS)
    assert read_facts(cache_key(CONFIG, None, None)) is None
    assert folder.read_text() == "a file"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for off in ("0", "off", "OFF"):
        monkeypatch.setenv("PATCHC_CACHE", off)
        assert cache_folder() is None
        keep_facts(cache_key(CONFIG, None, None), FACTS)
        assert read_facts(cache_key(CONFIG, None, None)) is None
    assert kept(tmp_path) == []
    for users in ("", None):
        monkeypatch.delenv("PATCHC_CACHE", raising=False)
        if users is not None:
            monkeypatch.setenv("PATCHC_CACHE", users)
        assert cache_folder() == Path(platformdirs.user_cache_dir("patchc"))


def test_many_at_once(folder: Path) -> None:
    """A reader gets a whole graph or none, never a part."""
    key = cache_key(CONFIG, None, None)

    def work(_: int) -> bool:
        whole = True
        for _ in range(20):
            keep_facts(key, FACTS)
            whole &= read_facts(key) == FACTS
        return whole

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
    assert len(kept(folder)) == 1


# ---- through outlines


def test_a_model_is_traced_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[Any] = []

    def trace(_: Path, config: dict[str, Any], *__: Any) -> Facts:
        traced.append(config["format"])
        return FACTS

    monkeypatch.setattr(blank, "blank_facts", trace)
    assert outline("induction-2l").graph.model == "induction-2l"
    assert outline("induction-2l") == outline("induction-2l", revision="main")
    assert traced == ["patchc-native"]
    outline("induction-2l", dtype="float64")
    assert len(traced) == len(kept(folder)) == 2
    monkeypatch.setattr(outline_cache, "FORMAT", 0)
    outline("induction-2l")
    assert len(traced) == 3


def test_a_checkouts_own_changes_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The key follows the text of the modules that find graphs."""
    package = tmp_path / "patchc"
    for name in ("__init__.py", "model/trace.py", "ir/graph.py", "ir/paths.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1")
    monkeypatch.setattr(disk.patchc, "__file__", str(package / "__init__.py"))
    fresh = disk._tracer.__wrapped__  # type: ignore[attr-defined]
    before = fresh()
    (package / "ir/paths.py").write_text("2")
    assert fresh() == before
    (package / "model/trace.py").write_text("2")
    assert fresh() != before
