"""A decoder by hand, as somebody would write one: its own names, its own order of weights, no config, no library."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.models import D_VOCAB, jittered

D, HEADS, GROUPS = 32, 4, 2
WIDTH = D // HEADS


class Mixer(nn.Module):
    """Attention of two heads that share keys and values, all in one matrix that is multiplied from the right."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(D, (HEADS + 2 * GROUPS) * WIDTH) / 6)
        self.w_out = nn.Parameter(torch.randn(D, D) / 6)
        self.shift = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = (x @ self.w_in).view(batch, length, -1, WIDTH).permute(0, 2, 1, 3)
        k, v, q = parts.split((GROUPS, GROUPS, HEADS), dim=1)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH) - 0.1 * distance
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(batch, length, D) @ self.w_out + self.shift


class Reader(nn.Module):
    """A gated MLP on a flat list of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, 48), nn.Linear(D, 48), nn.Linear(48, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        return self.down(self.up(tokens) * torch.sigmoid(self.gate(tokens))).view_as(x)


class Unknown(nn.Module):
    """Two layers between an embedding and logits; learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(D_VOCAB, D), nn.Embedding(64, D)
        self.mixers, self.readers = (nn.ModuleList(kind() for _ in range(2)) for kind in (Mixer, Reader))
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(5))
        self.answer = nn.Linear(D, D_VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for i, (mixer, reader) in enumerate(zip(self.mixers, self.readers, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + reader(self.norms[2 * i + 1](x))
        return self.answer(self.norms[-1](x))


def unknown() -> nn.Module:
    torch.manual_seed(0)
    return jittered(Unknown())
