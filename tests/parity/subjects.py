"""The models that both sides are run on: small bridges of TransformerLens, with two prompts of six tokens."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import patchc
from patchc.ir.experiment import ModelChoice
from patchc.ir.graph import ResidualGraph
from patchc.transformer_lens.traced import traced
from tests.models import D_VOCAB, gemma2, gpt2, llama, native


@dataclass(frozen=True)
class Subject:
    """A bridge and its prompts. `clean`, `corrupt`: `[prompt, pos]`; `answer`, `wrong`: `[prompt]`, token ids."""

    name: str
    bridge: Any
    clean: Tensor
    corrupt: Tensor
    answer: Tensor
    wrong: Tensor
    plain: nn.Module | None = None
    """The same model without a bridge, for plain hooks; None where the bridge's own module can be hooked."""

    @cached_property
    def model(self) -> patchc.Model:
        """The traced model: the one that patchc's functions find too, so that it is traced once."""
        return patchc.Model(traced(self.bridge).loaded, ModelChoice(self.name))

    @property
    def graph(self) -> ResidualGraph:
        return self.model.graph

    @cached_property
    def clean_cache(self) -> Any:
        return self._cache(self.clean)

    @cached_property
    def corrupt_cache(self) -> Any:
        return self._cache(self.corrupt)

    def _cache(self, ids: Tensor) -> Any:
        with torch.no_grad():
            return self.bridge.run_with_cache(ids)[1]

    @cached_property
    def data(self) -> dict[str, list[Any]]:
        """The columns that the example specs read."""
        worlds = {"clean": self.clean.tolist(), "corrupt": self.corrupt.tolist()}
        answers = {"answer": self.answer.tolist(), "wrong": self.wrong.tolist()}

        return {**worlds, **answers}

    # ---- metrics as TransformerLens takes them: functions of the logits [prompt, pos, d_vocab]

    def each_diff(self, logits: Tensor) -> Tensor:
        """logit(answer) - logit(wrong) at the last position, `[prompt]`."""
        last, rows = logits[:, -1], torch.arange(len(logits))
        return last[rows, self.answer] - last[rows, self.wrong]

    def diff(self, logits: Tensor) -> Tensor:
        """Their mean, a scalar."""
        return self.each_diff(logits).mean()

    def each_nats(self, logits: Tensor) -> Tensor:
        """logprob(answer) at the last position, `[prompt]`."""
        return logits[:, -1].log_softmax(-1)[torch.arange(len(logits)), self.answer]


def bridged(module: nn.Module, *, processed: bool = False) -> Any:
    """A bridge around a module, which belongs to it from then on."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config: Any = module.config
    bridge: Any = build_bridge_from_module(module, type(module).__name__, hf_config=config)
    if processed:
        bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge.eval()


def native_bridge() -> Any:
    """A bridge around TransformerLens' own kind of model, which does not show what each head writes."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    module: Any = native()
    return build_bridge_from_module(module, "TransformerLensNative", tl_config=copy.deepcopy(module.cfg)).eval()


def _drawn(name: str, bridge: Any, plain: nn.Module | None = None) -> Subject:
    """Random prompts; the worlds have their first token in common, so that some cells change nothing."""
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = torch.randint(0, D_VOCAB, (2, 2, 6), generator=generator)
    corrupt[:, 0] = clean[:, 0]
    return Subject(name, bridge, clean, corrupt, torch.tensor([3, 5]), torch.tensor([4, 6]), plain)


def _ioi(name: str, *, processed: bool = False) -> Subject:
    """The built-in model on sentences that are shorter than those that it knows."""
    loaded = patchc.load("ioi-tiny", attention="eager").loaded
    tokenizer: Any = loaded.tokenizer

    def ids(*texts: str) -> Tensor:
        return torch.tensor([tokenizer(text)["input_ids"] for text in texts])

    return Subject(
        name,
        bridged(copy.deepcopy(loaded.eager), processed=processed),
        ids(" Mary and John, John to", " Tom and Anna, Anna to"),
        ids(" Mary and Paul, Mary to", " Tom and Lucy, Tom to"),
        ids(" Mary", " Tom")[:, 0],
        ids(" John", " Anna")[:, 0],
    )


_MAKERS: dict[str, Callable[[str], Subject]] = {
    "GPT-2": lambda name: _drawn(name, bridged(gpt2("eager"))),
    "GPT-2, compatibility mode": lambda name: _drawn(name, bridged(gpt2("eager"), processed=True)),
    "Llama GQA": lambda name: _drawn(name, bridged(llama("eager"))),
    "Llama GQA, compatibility mode": lambda name: _drawn(name, bridged(llama("eager"), processed=True)),
    "ioi-tiny": _ioi,
    "Gemma 2": lambda name: _drawn(name, bridged(gemma2()), gemma2()),
    "native": lambda name: _drawn(name, native_bridge(), native()),
}
SUBJECTS = tuple(_MAKERS)


@functools.cache
def subject(name: str) -> Subject:
    """A model and its prompts, made once for all tests of a process."""
    return _MAKERS[name](name)
