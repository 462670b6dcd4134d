"""Modules that were placed, wrapped, compiled or quantised: refused with the name, or traced as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from patchc.diagnostics import PatchcError
from patchc.model.load import load
from patchc.model.placed import refuse_placement
from tests.models import gpt2, llama, loaded_model, logits_of, native


def refused(module: nn.Module) -> tuple[str, str]:
    with pytest.raises(PatchcError) as caught:
        refuse_placement(module)
    (diagnostic,) = caught.value.diagnostics
    return diagnostic.code, diagnostic.message


class Params4bit(nn.Parameter):
    """Named as the class of a library that quantises."""


def with_weight(weight: nn.Parameter) -> nn.Module:
    module: Any = gpt2()
    module.transformer.h[1].mlp.c_fc.weight = weight
    return module


def with_buffer(buffer: Tensor) -> nn.Module:
    module: Any = gpt2()
    module.transformer.h[1].register_buffer("turns", buffer)
    return module


def on_meta(name: str) -> nn.Module:
    module: Any = gpt2()
    getattr(module.transformer, name).to("meta")
    return module


def dispatched(places: dict[str, Any]) -> nn.Module:
    module: Any = gpt2()
    module.hf_device_map = places
    return module


def hooked() -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(gpt2(), torch.device("cpu"))


def compiled(which: Callable[[Any], nn.Module]) -> nn.Module:
    module = gpt2()
    which(module).compile(backend="eager")
    return module


def by_torch_compile() -> nn.Module:
    made: Any = torch.compile(gpt2(), backend="eager")
    return made


def holding(wrap: Callable[[nn.Module], Any]) -> nn.Module:
    module: Any = gpt2()
    module.transformer.h[0] = wrap(module.transformer.h[0])
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "data parallel": (lambda: nn.DataParallel(gpt2()), "model-wrapped", "the model is a `DataParallel`"),
    "a wrapped layer": (lambda: holding(nn.DataParallel), "model-wrapped", "module `transformer.h.0` is a"),
    "torch.compile": (by_torch_compile, "model-wrapped", "the model is a `OptimizedModule`"),
    "compiled in place": (lambda: compiled(lambda m: m), "model-wrapped", "the model was compiled in place"),
    "a part compiled in place": (
        lambda: compiled(lambda m: m.transformer.h[1]), "model-wrapped", "module `transformer.h.1` was compiled",
    ),
    "several devices": (lambda: dispatched({"a": 0, "b": "cpu"}), "model-placement", "dispatched to 0, cpu"),
    "offloaded": (hooked, "model-placement", "accelerate has put a hook on"),
    "meta": (lambda: on_meta("wpe"), "model-placement", "`transformer.wpe.weight` is on the device meta"),
    "int8": (
        lambda: with_weight(nn.Parameter(torch.zeros(32, 128, dtype=torch.int8), requires_grad=False)),
        "quantised-weights", "`transformer.h.1.mlp.c_fc.weight` is a Parameter of int8",
    ),
    "a class of its own": (
        lambda: with_weight(Params4bit(torch.zeros(32, 128))), "quantised-weights", "is a Params4bit of float32",
    ),
    "float8": (
        lambda: with_weight(nn.Parameter(torch.zeros(32, 128).to(torch.float8_e4m3fn), requires_grad=False)),
        "quantised-weights", "is a Parameter of float8_e4m3fn",
    ),
    "a complex buffer": (
        lambda: with_buffer(torch.zeros(4, dtype=torch.complex64)),
        "quantised-weights", "buffer `transformer.h.1.turns` is a Tensor of complex64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_by_name(what: str) -> None:
    build, code, message = REFUSED[what]
    found = refused(build())
    assert found[0] == code
    assert message in found[1]


def test_two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second device is here: one parameter says that it is elsewhere."""
    module: Any = gpt2()
    elsewhere = module.transformer.h[1].ln_1.weight
    plain = Tensor.device.__get__

    def device(tensor: Tensor) -> torch.device:
        return torch.device("cuda:1") if tensor is elsewhere else plain(tensor)

    monkeypatch.setattr(Tensor, "device", property(device), raising=False)
    message = "`transformer.wte.weight` is on cpu, `transformer.h.1.ln_1.weight` on cuda:1"
    assert refused(module) == ("model-placement", f"{message}; patchc runs a model on one device")


@pytest.mark.parametrize(
    "module",
    [gpt2(), llama(), native(), dispatched({"": "cpu"}), with_buffer(torch.zeros(4, dtype=torch.int8))],
    ids=["gpt2", "llama", "native", "one device", "a buffer of whole numbers"],
)
def test_what_is_accepted(module: nn.Module) -> None:
    refuse_placement(module.train())


def test_loading_refuses_them() -> None:
    with pytest.raises(PatchcError, match="model-wrapped"):
        load(nn.DataParallel(gpt2()))


def test_a_model_that_is_moved_after_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model("gpt2-sdpa")
    loaded.check_unchanged()
    monkeypatch.setattr(loaded.pieces, "device", torch.device("cuda:0"))
    with pytest.raises(PatchcError, match="was moved from cuda:0 to cpu after it was traced"):
        loaded.check_unchanged()


def test_weights_that_are_shared() -> None:
    """Tied embeddings, and an MLP that two layers share: each is one tensor, read in several places."""
    module: Any = gpt2()
    assert module.lm_head.weight is module.transformer.wte.weight
    module.transformer.h[1].mlp.c_fc.weight = module.transformer.h[0].mlp.c_fc.weight
    loaded = load(module)
    read = loaded.pieces.weights
    shared = module.transformer.wte.weight.data_ptr()
    assert sum(t.data_ptr() == shared for t in read.values()) >= 1
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    from patchc.model.prove import Prover

    stream = Prover(loaded.pieces, module)._composed(ids)
    assert torch.allclose(loaded.pieces.unembed(stream), logits_of(module, ids)[0], atol=1e-4)
