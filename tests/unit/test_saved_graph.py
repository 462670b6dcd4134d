"""Compiled graphs on disk: the same numbers from the same weights, and nothing that a file says is run unseen."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchc
from patchc.api import Model
from patchc.codegen import saved
from patchc.model import fx_json
from tests.models import gemma2, gpt2, llama, native_rms_rotary

SPEC = """
metric diff = logit(answer) - logit(wrong)
experiment heads { for h in head run clean patch node h @ 1 with corrupt measure diff }
experiment keys { for h in head[1, *] run clean patch node h.k with 0.5 * corrupt + 0.5 * self measure diff }
experiment steer { run clean patch node mlp[0] with self + 3 * tensor("v") measure diff }
"""
IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4], [5, 6, 7, 8]], "corrupt": [[1, 9, 3, 4], [5, 6, 10, 8]],
    "answer": [11, 12], "wrong": [13, 14],
}  # fmt: skip
BUILDS: dict[str, Callable[[], nn.Module]] = {"gpt2": gpt2, "llama": llama, "native": native_rms_rotary,
          "gemma2": gemma2}  # fmt: skip


@cache
def model(kind: str = "gpt2") -> Model:
    return patchc.load(BUILDS[kind]())


@cache
def compiled(kind: str = "gpt2") -> patchc.Compiled:
    return model(kind).compile(SPEC, IDS, tensors={"v": torch.linspace(-1, 1, 32)})


def output(graph: Any) -> Tensor:
    masks = torch.linspace(0, 1, max(1, torch.Size(graph.mask_shape).numel())).view(graph.mask_shape) + 0.25
    ids = [torch.tensor(IDS[world]) for world in graph.worlds]
    with torch.no_grad():
        return graph(*ids, masks)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return compiled().save(tmp_path / "graph", "heads")


def code_of(caught: pytest.ExceptionInfo[patchc.PatchcError]) -> str:
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.exit == 3
    return diagnostic.code


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("experiment", ["heads", "keys", "steer"])
def test_a_loaded_graph_gives_the_same_numbers(tmp_path: Path, kind: str, experiment: str) -> None:
    graph = compiled(kind).graphs[experiment]
    folder = compiled(kind).save(tmp_path / "new" / "folder", experiment)
    assert sorted(p.name for p in folder.iterdir()) == ["graph.json", "tensors.safetensors"]
    loaded = patchc.load_graph(folder, model(kind))
    assert (loaded.worlds, loaded.mask_shape) == (graph.worlds, graph.mask_shape)
    assert torch.equal(output(loaded), output(graph))
    assert loaded.code.splitlines()[1:] == graph.code.splitlines()[1:]


def test_a_loaded_graph_has_gradients(folder: Path) -> None:
    graphs = (compiled().graphs["heads"], patchc.load_graph(folder, model()))
    masks = [torch.full(g.mask_shape, 0.5, requires_grad=True) for g in graphs]
    ids = [torch.tensor(IDS[world]) for world in ("clean", "corrupt")]
    found = [torch.autograd.grad(g(*ids, m)[0][:, -1, 3].sum(), m)[0] for g, m in zip(graphs, masks, strict=True)]
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_weights_are_the_models_own(folder: Path) -> None:
    """No copy of them is on disk, nor made by loading."""
    loaded = patchc.load_graph(folder, model())
    own = {p.data_ptr() for p in model().loaded.eager.parameters()}
    assert {p.data_ptr() for p in loaded.parameters()} <= own
    assert len(list(loaded.parameters())) > 10
    weights = sum(p.numel() * 4 for p in model().loaded.eager.parameters())
    assert (folder / "tensors.safetensors").stat().st_size < weights / 10


def test_the_same_weights_in_another_module_will_do(folder: Path) -> None:
    again = patchc.load_graph(folder, gpt2())
    assert torch.equal(output(again), output(compiled().graphs["heads"]))


def test_other_weights_are_refused(folder: Path) -> None:
    other = gpt2()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-6
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load_graph(folder, other)
    assert code_of(caught) == "other-weights"


def test_weights_edited_since_are_refused(folder: Path) -> None:
    module = gpt2()
    loaded = patchc.load(module)
    next(module.parameters()).data[0, 0] += 1
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load_graph(folder, loaded)
    assert code_of(caught) in ("model-changed", "other-weights")
    with pytest.raises(patchc.PatchcError) as caught:
        loaded.compile(SPEC, IDS, tensors={"v": torch.zeros(32)})
    assert code_of(caught) == "model-changed"


def test_saving_over_a_graph_replaces_it(folder: Path) -> None:
    assert compiled().save(folder, "steer") == folder
    assert patchc.load_graph(folder, model()).mask_shape == ()
    assert len(list(folder.iterdir())) == 2


def test_a_spec_of_several_experiments_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(patchc.PatchcError, match="heads, keys, steer"):
        compiled().save(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- what does not load


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    content = json.loads((folder / "graph.json").read_text())
    change(content)
    (folder / "graph.json").write_text(json.dumps(content))
    return folder


def called(content: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in content["modules"][""] if n["op"] == "call_function")


def placeholders(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [n for n in content["modules"][""] if n["op"] == "placeholder"]


@pytest.mark.parametrize(
    "name",
    [
        "aten.from_file.default", "aten.save.default", "os.system", "operator.attrgetter", "operator.methodcaller",
        "operator.add.default", "builtins.eval", "torch.load", "aten.add", "aten.add.nowhere", "aten.add.__class__",
        "aten.add.Tensor.op", "prims.add.default", "operator.__class__", "eval", "",
    ],
)  # fmt: skip
def test_a_function_that_is_not_allowed(folder: Path, name: str) -> None:
    edited(folder, lambda content: called(content).update(target=name))
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load_graph(folder, model())
    assert code_of(caught) == "bad-graph"


def test_only_known_functions_are_allowed() -> None:
    """Nothing that reads or writes files, makes pickles, or changes its argument in place."""
    assert not {name for name in fx_json.ATEN if name.endswith("_") and not name.endswith("__")}
    assert not {"from_file", "save", "load", "set_", "resize", "_print", "record_stream"} & fx_json.ATEN


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "format": lambda c: c.update(format="other"),
    "version": lambda c: c.update(version=2),
    "no modules": lambda c: c.pop("modules"),
    "no worlds": lambda c: c.pop("worlds"),
    "a method": lambda c: called(c).update(op="call_method", target="numpy"),
    "an unknown node": lambda c: called(c).update(args=[{"node": "nowhere"}]),
    "an unknown argument": lambda c: called(c).update(args=[{"python": "print(1)"}]),
    "an unknown type": lambda c: called(c).update(args=[{"typed": "dtype:nothing"}]),
    "an attribute of python": lambda c: c["modules"][""].insert(
        0, {"op": "get_attr", "name": "x", "target": "__class__.__init__", "args": []}
    ),
    "a name that is code": lambda c: c["modules"][""][0].update(name="x): import os #"),
    "a default that is code": lambda c: placeholders(c)[-1].update(target="masks=print('run')"),
    "a placeholder that is no name": lambda c: placeholders(c)[0].update(target="class"),
    "an argument that is code": lambda c: called(c).update(kwargs={"alpha=print('run'), x": 1}),
    "a module that is code": lambda c: next(n for n in c["modules"][""] if n["op"] == "call_module").update(
        target="x(); print('run'); self.embed"
    ),
    "another file's tensors": lambda c: c.update(tensors_sha256="0" * 64),
    "a deep argument": lambda c: called(c).update(args=[{"dict": {"a": [{"slice": [1, 2, {"code": 3}]}]}}]),
    "an unknown weight": lambda c: c["weights"].update({next(iter(c["weights"])): "nowhere"}),
    "no object": lambda c: c["modules"].update({"": [3]}),
    "no text": lambda c: called(c).update(target=3),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_graph(folder: Path, change: str, capfd: pytest.CaptureFixture[str]) -> None:
    edited(folder, CHANGES[change])
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load_graph(folder, model())
    assert code_of(caught) == "bad-graph"
    assert capfd.readouterr().out == ""


class Bomb:
    """Goes off where it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("file", ["graph.json", "tensors.safetensors"])
@pytest.mark.parametrize("content", [pickle.dumps(Bomb()), b"", b"[]", b"\xff\xfe", b"{", b"3", None])
def test_files_that_are_no_graph(folder: Path, file: str, content: bytes | None) -> None:
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load_graph(folder, model())
    assert code_of(caught) == "bad-graph"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load_graph(tmp_path / "none", model())
    assert code_of(caught) == "bad-graph"


def test_a_failure_while_saving_leaves_the_old_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "save_file", fails)
    with pytest.raises(patchc.PatchcError, match="No space left") as caught:
        compiled().save(folder, "steer")
    assert code_of(caught) == "cannot-save-graph"
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
