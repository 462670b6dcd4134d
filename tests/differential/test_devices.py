"""The same program on another device: what a GPU would refuse is refused on a pretended one, and where there is a GPU
it gives the CPU's numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import patchc
from patchc import pipeline
from patchc.api import Compiled, Model
from patchc.execute.sweep import Outcome
from patchc.ir.experiment import ModelChoice
from patchc.model.load import LoadedModel, load
from tests.elsewhere import DEVICE, Elsewhere, MixedDevicesError, OnDevice, moved
from tests.models import MODELS

IDS: dict[str, Any] = {
    "clean": [[1, 2, 3, 4, 8], [5, 6, 7, 8, 3]],
    "corrupt": [[1, 9, 3, 4, 7], [5, 6, 10, 8, 3]],
    "answer": [11, 12],
    "wrong": [13, 14],
}
METRICS = """
metric diff = logit(answer) - logit(wrong)
metric part = diff from clean to corrupt
"""
EXPERIMENTS = {
    "heads": "for h in head run clean patch node h with corrupt measure diff, part",
    "stream": "for l in layers for p in positions run clean patch node resid_pre[l] @ p with corrupt measure diff",
    "edges": "for h in head[0, *] run clean patch path h -> mlp[1] -> logits with corrupt measure kl(clean)",
    "keys": "for h in head run clean patch node h.k with 0.5 * self + 0.5 * mean(corrupt) measure prob(answer)",
    "pattern": "for h in head[0, *] for p in positions run clean patch node h.pattern @ p with corrupt measure diff",
    "scores": "for h in head run clean patch node h.scores with mean(corrupt) measure diff",
    "noise": "for h in head run clean patch node h with self + noise(sigma=1, seed=3) measure logprob(answer)",
    "mlps": "for l in layers run clean patch node mlp[l] with zero measure rank(answer), loss(answer)",
    "neurons": "for n in 0..3 run clean patch node mlp[1].post[n] with corrupt measure diff",
}
SPEC = METRICS + "\n".join(f"experiment {name} {{ {body} }}" for name, body in EXPERIMENTS.items())
KINDS = ["gpt2-sdpa", "llama-eager", "native-rms-rotary", "neox-parallel"]


@cache
def here(kind: str) -> Compiled:
    return patchc.load(MODELS[kind]()).compile(SPEC, IDS)


@cache
def there(kind: str) -> LoadedModel:
    """The same model on the pretended device."""
    return moved(load(MODELS[kind]()))


def outcomes(c: Compiled, model: LoadedModel) -> dict[str, Outcome]:
    return {p.experiment.name: pipeline.execute(p, model, c.given, {}) for p in c.programs}


# ---- a device that there is not


@pytest.mark.parametrize("kind", KINDS[:2])
def test_sweeps_mix_no_devices(kind: str) -> None:
    c = here(kind)
    want = outcomes(c, c.model.loaded)
    with OnDevice() as mode:
        got = outcomes(c, there(kind))
    assert not mode.copied
    for name, outcome in want.items():
        for metric, numbers in outcome.numbers.items():
            assert type(got[name].numbers[metric].mean) is Tensor  # what is reported is on the CPU
            assert torch.allclose(got[name].numbers[metric].mean, numbers.mean, rtol=0, atol=1e-6), (name, metric)


FEW_AND_MANY = [
    (
        "h in head[0, 0] run clean patch node h.pattern @ 2",
        "h in head[0, *] for p in 2..4 run clean patch node h.pattern @ p",
    ),
    ("h in head[0, 0] run clean patch node h.q", "h in head run clean patch node h.q"),
    ("h in head[0, 0] run clean patch node h", "h in head run clean patch node h"),
    ("p in 2..3 run clean patch node resid_pre[1] @ p", "p in positions run clean patch node resid_pre[1] @ p"),
]


@pytest.mark.parametrize(("few", "many"), FEW_AND_MANY)
def test_more_cells_wait_no_more_often_for_the_device(few: str, many: str) -> None:
    model = here("llama-eager").model
    waits: list[int] = []
    for cells in (few, many):
        c = model.compile(f"{METRICS} experiment e {{ for {cells} with corrupt measure diff }}", IDS)
        with OnDevice() as mode:
            pipeline.execute(c.programs[0], there("llama-eager"), c.given, {})
        waits.append(mode.waits.total())
    assert waits[0] == waits[1]


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-eager"])
def test_graphs_mix_no_devices(kind: str) -> None:
    c = here(kind)
    experiment = c.study.experiments[0]
    want = pipeline.to_graph(experiment, c.study.prompts, c.model.loaded, {})
    ids = [torch.tensor(IDS[world]) for world in ("clean", "corrupt")]
    masks = torch.zeros(len(experiment.cells))
    masks[2], masks[5] = 1.0, 0.5
    with OnDevice():
        graph = pipeline.to_graph(experiment, c.study.prompts, there(kind), {})
        got = graph(*(x.as_subclass(Elsewhere) for x in ids), masks.as_subclass(Elsewhere))[0]
        assert isinstance(got, Elsewhere)
        plain = got.cpu()
    assert torch.allclose(plain, want(*ids, masks)[0], rtol=0, atol=1e-5)


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    with OnDevice() as mode:
        x = torch.zeros(3, device=DEVICE)
        assert x.device == DEVICE
        assert (x + 1).device == (x + torch.tensor(1.0)).device == x.device
        with pytest.raises(MixedDevicesError):
            x + torch.zeros(3)
        with pytest.raises(MixedDevicesError):
            x.index_select(0, torch.tensor([1]))
        assert not mode.waits
        assert type(x.cpu()) is Tensor
        assert bool(x.any()) is False
        assert mode.waits == {"torch.Tensor.cpu": 1, "torch.Tensor.__bool__": 1}
        assert x[torch.tensor([0, 1])].shape == (2,)
        assert mode.copied == {"torch.Tensor.__getitem__": 1}


# ---- what cannot be used


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("abacus", "there "),
        ("meta", "patchc runs on cpu and cuda"),
        ("mps", "patchc runs on cpu and cuda"),
        ("cpu:3", "this machine has cpu"),
        ("cuda:99", "this machine has cpu" if torch.cuda.is_available() else "torch finds no CUDA device"),
    ],
)
def test_a_device_that_cannot_be_used_is_named(device: str, message: str) -> None:
    with pytest.raises(patchc.PatchcError) as caught:
        patchc.load(ModelChoice("induction-2l", (("device", device),)))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "model-option"
    assert f'device "{device}" cannot be used: {message}' in diagnostic.message


# ---- a device that there is

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(kind: str, dtype: torch.dtype = torch.float32) -> Model:
    return patchc.load(MODELS[kind]().to("cuda", dtype))


class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("kind", KINDS)
    def test_numbers_are_the_cpus(self, kind: str) -> None:
        c = here(kind)
        want = outcomes(c, c.model.loaded)
        for name, outcome in outcomes(c, on_gpu(kind).loaded).items():
            for metric, numbers in outcome.numbers.items():
                assert torch.allclose(numbers.mean, want[name].numbers[metric].mean, rtol=0, atol=1e-4), (name, metric)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", ["gpt2-sdpa", "llama-eager"])
    def test_hooks_agree(self, kind: str, dtype: torch.dtype) -> None:
        results = on_gpu(kind, dtype).compile(SPEC, IDS).run(check="all", progress=False)
        assert all(r.check is not None and r.check.share <= 1 for r in results.values())

    def test_graph(self) -> None:
        c, model = here("llama-eager"), on_gpu("llama-eager")
        experiment = c.study.experiments[0]
        ids = [torch.tensor(IDS[world]) for world in ("clean", "corrupt")]
        masks = torch.rand(len(experiment.cells), generator=torch.Generator().manual_seed(0))
        want = pipeline.to_graph(experiment, c.study.prompts, c.model.loaded, {})(*ids, masks)[0]
        graph = pipeline.to_graph(experiment, c.study.prompts, model.loaded, {})
        got = graph(*(x.cuda() for x in ids), masks.cuda())[0]
        assert torch.allclose(got.cpu(), want, rtol=0, atol=1e-4)

    def test_single_precision_is_single_precision(self) -> None:
        """torch leaves TF32 off for matrix products, and nothing here turns it on."""
        on_gpu("gpt2-sdpa").compile(SPEC, IDS).run(progress=False)
        assert torch.get_float32_matmul_precision() == "highest"

    def test_options_of_a_spec(self) -> None:
        model = patchc.load(ModelChoice("induction-2l", (("device", "cuda"), ("dtype", "bfloat16"))))
        assert (model.loaded.pieces.device.type, model.loaded.pieces.dtype) == ("cuda", torch.bfloat16)

    def test_memory_is_the_gpus(self) -> None:
        (analysis,) = (
            on_gpu("gpt2-sdpa")
            .compile(METRICS + "experiment e { run clean patch node head[0, 0] with corrupt measure diff }", IDS)
            .analyse()
        )
        assert 0 < analysis.bytes < 1 << 26
