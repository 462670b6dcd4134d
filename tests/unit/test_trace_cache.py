"""Traces that are kept on disk: taken for the same module and weights alone, and never run where they are damaged."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchc.diagnostics import PatchcError
from patchc.model import load as loading
from patchc.model import trace_cache
from patchc.model.cache import digest
from patchc.model.export import export
from patchc.model.identity import identity
from patchc.model.load import LoadedModel, load
from patchc.model.pieces import TracedPieces
from patchc.model.prove import Prover
from patchc.model.state import content_fingerprint
from patchc.model.trace import trace
from patchc.model.trace_cache import computed, keep_trace, read_trace, trace_key
from tests.models import TRACED, gpt2, llama, loaded_model
from tests.unit.test_model_refusals import Model


@pytest.fixture(scope="module", autouse=True)
def loaded_before() -> None:
    """So that it does not come into a test's own cache."""
    loaded_model("gpt2-sdpa")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATCHC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "traces"


def entry(folder: Path) -> Path:
    (path,) = folder.glob("*.json")
    return path


def composed(pieces: TracedPieces, eager: nn.Module) -> Tensor:
    """The final stream of some tokens, by the pieces alone."""
    return Prover(pieces, eager)._composed(torch.arange(10).reshape(2, 5))


def key_of(loaded: LoadedModel) -> dict[str, Any]:
    key = trace_key(loaded.eager, loaded.content)
    assert key is not None
    return key


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-sdpa", "neox-parallel", "native-rms-rotary", "olmo2"])
def test_what_is_kept_is_what_was_proved(kind: str) -> None:
    fresh = load(TRACED[kind]())
    keep_trace(key_of(fresh), fresh.pieces, fresh.eager)
    pieces = read_trace(key_of(fresh), fresh.eager, fresh.name)
    assert pieces is not None
    assert (pieces.graph, pieces.not_apart, pieces.dtype) == (fresh.graph, fresh.pieces.not_apart, torch.float32)
    assert torch.equal(composed(pieces, fresh.eager), composed(fresh.pieces, fresh.eager))
    ours, theirs = (p.modules for p in (pieces, fresh.pieces))
    assert {name: m.code for name, m in ours.items()} == {name: m.code for name, m in theirs.items()}
    again, told = (computed(p.structure.exported, fresh.eager) for p in (pieces, fresh.pieces))
    assert again[:2] == told[:2]
    assert again[2].keys() == told[2].keys()
    own = {t.data_ptr() for t in (*fresh.eager.parameters(), *fresh.eager.buffers())}
    assert all(t.data_ptr() in own for t in pieces.weights.values() if t.numel() > 1)


def test_a_model_is_traced_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str] = []
    pieces = loaded_model("gpt2-sdpa").pieces

    def proved(module: nn.Module, name: str, _: Any) -> Any:
        traced.append(name)
        return pieces

    monkeypatch.setattr(loading, "_proved", proved)
    module = loaded_model("gpt2-sdpa").eager
    for _ in range(2):
        assert load(module).graph == pieces.graph
    load(Model("plain"))
    load(Model("plain"))
    assert traced == ["GPT2LMHeadModel", "Model", "Model"]
    assert len(list(folder.glob("*.json"))) == 1


def test_another_process_makes_the_same_key() -> None:
    code = "from tests.models import *; from patchc.model.identity import identity; print(identity(gpt2()))"
    root, path = str(Path(__file__).parents[2]), os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert out.stdout.strip() == identity(gpt2())


def reach(module: Any) -> Any:
    return module.transformer.h[0]


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight": lambda m: reach(m).mlp.c_fc.weight.data[3, 5].add_(1e-3),
    "a buffer": lambda m: m.register_buffer("more", torch.zeros(1)),
    "a setting": lambda m: setattr(reach(m).ln_1, "eps", 1e-3),
    "a config's setting": lambda m: setattr(m.config, "scale_attn_by_inverse_layer_idx", True),
    "a flag of one part": lambda m: setattr(reach(m).attn, "scaling", 0.2),
    "an order of parts": lambda m: setattr(m.transformer, "h", nn.ModuleList(reversed(m.transformer.h))),
    "a part of another class": lambda m: setattr(reach(m).mlp, "act", nn.ReLU()),
    "a dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_another_key(change: str) -> None:
    def key() -> dict[str, Any] | None:
        return trace_key(module, content_fingerprint(module))

    module = gpt2()
    before = key()
    assert before == key()
    CHANGES[change](module)
    assert key() != before


def test_who_made_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("gpt2-sdpa")
    keep_trace(key_of(loaded), loaded.pieces, loaded.eager)
    monkeypatch.setattr(trace_cache, "makers", lambda: {"versions": {}, "tracer": "another"})
    assert read_trace(key_of(loaded), loaded.eager, "") is None


# ---- modules whose code may be anything


class Mine(nn.Identity):
    """A class of the user's own."""


def test_a_class_of_the_users_own_has_no_identity() -> None:
    assert identity(Model("plain")) is None
    module: Any = gpt2()
    module.transformer.drop = Mine()
    assert identity(module) is None


def test_a_librarys_function_that_was_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    module = llama()
    assert identity(module) is not None
    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama, "rotate_half", lambda x: x)
        assert identity(module) is None
    with monkeypatch.context() as patched:
        patched.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
        assert identity(module) is None
    with monkeypatch.context() as patched:
        patched.setitem(modeling_llama.ALL_ATTENTION_FUNCTIONS, "sdpa", lambda *_: None)
        assert identity(module) is None
    module.setting = lambda x: x
    assert identity(module) is None


def typed(name: str = "<stdin>") -> Any:
    """A function that was typed, not read from a file."""
    made: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def forward(self, x): return x", name, "exec"), made)
    return made["forward"]


class Called:
    """An object that can be called."""

    def __call__(self, *_: Any) -> None: ...


PUT: dict[str, Callable[[], Any]] = {
    "typed": typed,
    "in a notebook": lambda: typed("<ipython-input-1>"),
    "a function of one's own behind torch's decorator": lambda: torch.no_grad()(typed()),
    "a property": lambda: property(typed()),
    "a static method of torch's decorator": lambda: staticmethod(torch.no_grad()(typed())),
    "a partial function": lambda: partial(typed()),
    "an object": Called,
}


@pytest.mark.parametrize("put", PUT)
def test_code_put_in_a_librarys_class(put: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    module = llama()
    assert identity(module) is not None
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", PUT[put]())
    assert identity(module) is None


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "gelu", "linear"])
@pytest.mark.parametrize("put", PUT)
def test_a_function_of_torchs_that_was_replaced(put: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = gpt2()
    monkeypatch.setattr(nn.functional, name, PUT[put]())
    assert identity(module) is None
    monkeypatch.undo()
    assert identity(module) is not None


# ---- damaged entries


def resealed(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """An entry that was changed by somebody who knows how entries are sealed."""

    def made(text: str) -> str:
        content = json.loads(text)
        change(content["content"])
        nothing = hashlib.blake2b(b"", digest_size=16).hexdigest()
        return json.dumps({**content, "digest": digest([content["content"], nothing])})

    return made


def call(content: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in content["graph"] if n["op"] == "call_function")


DAMAGE: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "cut": lambda text: text[: len(text) // 2],
    "another number": lambda text: text.replace('"causal": true', '"causal": false'),
    "another function": resealed(lambda c: call(c).update(target="os.system")),
    "a function of aten's that is not allowed": resealed(lambda c: call(c).update(target="aten.from_file.default")),
    "a name that is code": resealed(lambda c: c["graph"][0].update(name="x): import os #")),
    "a weight that is none": resealed(lambda c: c["weights"].update(dict.fromkeys(c["weights"], "lm_head.no"))),
    "a weight under a name that is code": resealed(lambda c: c["weights"].update({"a b": "lm_head.weight"})),
    "no output": resealed(lambda c: c["graph"].pop()),
    "no graph": resealed(lambda c: c.update(graph=[])),
    "a node of another kind": resealed(lambda c: c["graph"].__setitem__(0, 3)),
    "a shape that is none": resealed(lambda c: [n.update(tensor=[["1"], "float32"]) for n in c["graph"]]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_counts_as_absent(damage: str, folder: Path) -> None:
    loaded = loaded_model("gpt2-sdpa")
    key = key_of(loaded)
    keep_trace(key, loaded.pieces, loaded.eager)
    path = entry(folder)
    whole = path.read_text()
    path.write_text(DAMAGE[damage](whole))
    assert path.read_text() != whole
    assert read_trace(key, loaded.eager, "") is None
    keep_trace(key, loaded.pieces, loaded.eager)
    assert path.read_text() == whole


def test_constants_are_kept_beside(folder: Path) -> None:
    """A tensor that is no weight of the model's stands in a file of its own."""
    loaded = loaded_model("gpt2-sdpa")
    key, module = key_of(loaded), loaded.eager
    structure = trace(export(module))
    root: Any = structure.exported.module
    held = next(name for name in root._parameters if name.endswith("ln_f_bias"))
    del root._parameters[held]
    root.register_buffer(held, torch.full((32,), 3.0))
    keep_trace(key, TracedPieces(structure, loaded.graph), module)
    kept = read_trace(key, module, "")
    assert kept is not None
    assert torch.equal(kept.weights[held], torch.full((32,), 3.0))
    (tensors,) = folder.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-4] + b"abcd")
    assert read_trace(key, module, "") is None


def test_a_refused_model_leaves_nothing(folder: Path) -> None:
    module: Any = gpt2()
    module.transformer.h[0].ln_1.weight.data[0] = torch.nan
    with pytest.raises(PatchcError):
        load(module)
    assert not list(folder.glob("*"))
