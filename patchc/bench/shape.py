"""What everything is measured on: a GPT-2 of random weights and prompts of random tokens.

The weights are scaled so that patches have effects that show, which freshly initialised ones do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

IOI_LIKE, ALL_DIFFERENT = "ioi-like", "all-different"
SETTINGS = (IOI_LIKE, ALL_DIFFERENT)
SPREAD = 1.1
"""Standard deviation of the weights, times the root of the width: with half of it patches have hardly an effect."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes, and those of the data: `prompts` of `length` tokens, of which two worlds share the first
    `shared` in the setting `ioi-like`."""

    n_layers: int = 12
    n_heads: int = 12
    d_model: int = 768
    d_vocab: int = 50257
    n_ctx: int = 1024
    prompts: int = 4
    length: int = 15
    shared: int = 9

    @property
    def receiver(self) -> tuple[int, int]:
        """Layer and head whose query the path sweep ends at: 9.9 in GPT-2 small."""
        return 3 * self.n_layers // 4, 3 * self.n_heads // 4


GPT2_SMALL = Shape()


@dataclass(frozen=True, slots=True)
class Worlds:
    """Token ids of two texts `[prompt, pos]`, and of two answers `[prompt]`: the metric is the difference of the
    answers' logits at the last position, mean over prompts."""

    clean: Tensor
    corrupt: Tensor
    answer: list[int]
    wrong: list[int]

    def columns(self) -> dict[str, Any]:
        """As `Model.compile` takes them."""
        return {"clean": self.clean, "corrupt": self.corrupt, "answer": self.answer, "wrong": self.wrong}

    def difference(self, logits: Tensor) -> Tensor:
        """The metric, of logits `[prompt, pos, d_vocab]`."""
        rows = torch.arange(len(self.answer))
        return (logits[rows, -1, self.answer] - logits[rows, -1, self.wrong]).mean()


def random_model(shape: Shape) -> nn.Module:
    """A Hugging Face GPT-2 of this shape, the same at every call."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": shape.d_model, "n_head": shape.n_heads, "n_layer": shape.n_layers}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    config: Any = GPT2Config(**sizes, **ends, n_positions=shape.n_ctx, vocab_size=shape.d_vocab)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config).eval()
    _enlarge(module, SPREAD / math.sqrt(shape.d_model) / config.initializer_range)
    return module


def _enlarge(module: nn.Module, times: float) -> None:
    """Matrices so many times as large; biases and norms, which start as zeros and ones, moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(times)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def random_worlds(shape: Shape, setting: str) -> Worlds:
    """Random tokens; in `ioi-like` both texts of a prompt start with the same ones."""
    generator = torch.Generator().manual_seed(2)

    def tokens(*sizes: int) -> Tensor:
        return torch.randint(0, shape.d_vocab, sizes, generator=generator)

    clean, corrupt = tokens(shape.prompts, shape.length), tokens(shape.prompts, shape.length)
    corrupt[:, 0] = (clean[:, 0] + 1) % shape.d_vocab
    if setting == IOI_LIKE:
        corrupt[:, : shape.shared] = clean[:, : shape.shared]
        corrupt[:, shape.shared] = (clean[:, shape.shared] + 1) % shape.d_vocab
    answers: list[list[int]] = tokens(2, shape.prompts).tolist()
    return Worlds(clean, corrupt, answers[0], answers[1])
