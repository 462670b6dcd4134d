"""A decoder by hand, as somebody would write one: its own names, its own order of weights, no config, no library."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchc.execute.hook_drivers import ForwardHooks
from patchc.execute.hook_points import At, Point
from patchc.execute.hook_taps import FusedTap, Tap
from patchc.ir.graph import ResidualGraph
from tests.models import D_VOCAB, jittered

D, HEADS, GROUPS = 32, 4, 2
WIDTH = D // HEADS


class Matrix(nn.Module):
    """A projection whose matrix is multiplied from the right."""

    def __init__(self, width: int, shifts: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(D, width) / 6)
        self.shift = nn.Parameter(torch.randn(width)) if shifts else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w if self.shift is None else self.shift + x @ self.w


class Mixer(nn.Module):
    """Attention of heads that share keys and values in pairs, all in one matrix: keys, values, queries."""

    def __init__(self) -> None:
        super().__init__()
        self.w_in, self.w_out = Matrix((HEADS + 2 * GROUPS) * WIDTH, False), Matrix(D, True)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.w_in(x).view(batch, length, -1, WIDTH).permute(0, 2, 1, 3)
        k, v, q = parts.split((GROUPS, GROUPS, HEADS), dim=1)
        k, v = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH) - 0.1 * distance
        weights = scores.masked_fill(distance < 0, float("-inf")).softmax(-1)
        return self.w_out((weights @ v).transpose(1, 2).reshape(batch, length, D))


class Reader(nn.Module):
    """A gated MLP on a flat list of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(D, 48), nn.Linear(D, 48), nn.Linear(48, D)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, D)
        return self.down(self.up(tokens) * torch.sigmoid(self.gate(tokens))).view_as(x)


class Stage(nn.Module):
    """Both of them, each beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.before_mixer, self.mixer = nn.LayerNorm(D), Mixer()
        self.before_reader, self.reader = nn.LayerNorm(D), Reader()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.before_mixer(x))
        return x + self.reader(self.before_reader(x))


class Unknown(nn.Module):
    """Two stages between an embedding and logits; learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(D_VOCAB, D), nn.Embedding(64, D)
        self.stages = nn.ModuleList(Stage() for _ in range(2))
        self.last, self.answer = nn.LayerNorm(D), nn.Linear(D, D_VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device)[None])
        for stage in self.stages:
            x = stage(x)
        return self.answer(self.last(x))


def unknown() -> nn.Module:
    torch.manual_seed(0)
    return jittered(Unknown())


class UnknownHooks(ForwardHooks):
    """Plain forward hooks on such a decoder."""

    def __init__(self, model: Any, graph: ResidualGraph) -> None:
        self.model, self.n_layers = model.eval(), graph.n_layers
        self._attentions = [stage.mixer for stage in model.stages]
        self._weights = [stage.mixer.w_out.w.detach().unflatten(0, (-1, WIDTH)) for stage in model.stages]
        self._taps = {Point(At.EMBED): Tap(model.words), Point(At.POS_EMBED): Tap(model.places)}
        for layer, stage in enumerate(model.stages):
            mixer, spans = stage.mixer, ((At.K, 0, GROUPS), (At.V, GROUPS, 2 * GROUPS), (At.Q, 2 * GROUPS, None))
            taps = {
                at: FusedTap(mixer.w_in, d_head=WIDTH, first=first, last=last or HEADS + 2 * GROUPS)
                for at, first, last in spans
            } | {
                At.RESID_PRE: Tap(stage, is_input=True),
                At.Z: Tap(mixer.w_out, is_input=True, d_head=WIDTH),
                At.ATTN_OUT: Tap(mixer.w_out),
                At.MLP_IN: Tap(stage.before_reader, is_input=True),
                At.MLP_OUT: Tap(stage.reader),
            }
            self._taps |= {Point(at, layer): tap for at, tap in taps.items()}
        self._taps[Point(At.FINAL_IN)] = Tap(model.last, is_input=True)

    @contextmanager
    def _eager(self, needed: bool) -> Generator[None]:
        yield

    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids)
