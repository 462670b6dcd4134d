"""TransformerLens' activations as sites of a residual graph: which steps set them, and how a plain run has them, in
TransformerLens' shapes. Which rows of a sweep set what is for `cells`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from patchc.execute.base import PlainRun
from patchc.execute.patterns import PlainRows
from patchc.execute.places import attn_out_place, node_place, stream_place
from patchc.ir.bits import bitset
from patchc.ir.graph import Block, BlockKind, Kind, Nodes, ResidualGraph
from patchc.ir.ops import PATTERN, SCORES
from patchc.ir.paths import EVERYWHERE, Site, Step
from patchc.ir.tokens import Layout, Tokens
from patchc.model.pieces import Pieces
from patchc.transformer_lens.errors import BAD_SWEEP, NO_ACTIVATION, SweepError, SweepNameError, failure


class Shape(StrEnum):
    """The axes of an activation."""

    ROWS = "[batch, pos, d]"
    HEADS = "[batch, pos, head, d]"
    ENTRIES = "[batch, head, dest, src]"


HOOKS: dict[str, tuple[str, Shape]] = {
    "hook_resid_pre": ("resid_pre", Shape.ROWS),
    "hook_resid_mid": ("resid_mid", Shape.ROWS),
    "hook_resid_post": ("resid_post", Shape.ROWS),
    "hook_attn_out": ("attn_out", Shape.ROWS),
    "hook_mlp_out": ("mlp_out", Shape.ROWS),
    "mlp.hook_post": ("post", Shape.ROWS),
    "attn.hook_q": ("q", Shape.HEADS),
    "attn.hook_k": ("k", Shape.HEADS),
    "attn.hook_v": ("v", Shape.HEADS),
    "attn.hook_z": ("z", Shape.HEADS),
    "attn.hook_result": ("result", Shape.HEADS),
    "attn.hook_pattern": ("pattern", Shape.ENTRIES),
    "attn.hook_attn_scores": ("attn_scores", Shape.ENTRIES),
}
"""What stands behind `blocks.L.` in the names of the hooks that have a site, their short names and their axes."""

HEAD_SITES = {
    "q": Site.Q,
    "k": Site.K,
    "v": Site.V,
    "z": Site.Z,
    "result": Site.OUT,
    "pattern": Site.PATTERN,
    "attn_scores": Site.SCORES,
}
PORTS = {"q": 0, "k": 1, "v": 2}
STREAMS = ("resid_pre", "resid_mid", "resid_post")


@dataclass(frozen=True)
class Activation:
    """One activation of one layer. `hook` is its full name, `name` its short one."""

    hook: str
    name: str
    shape: Shape
    layer: int
    pieces: Pieces
    layout: Layout
    of_mlp: bool = False
    """Of a stream: whether it is what the layer's MLP reads alone, and not what goes on beside it."""

    @property
    def graph(self) -> ResidualGraph:
        return self.pieces.graph

    @property
    def n_batch(self) -> int:
        return self.layout.n_prompts

    @property
    def n_pos(self) -> int:
        return self.layout.lengths[0]

    @property
    def n_members(self) -> int:
        """How many heads it has: KV heads, of k and v; 1 where it has none."""
        if self.shape is Shape.ROWS:
            return 1
        return self.graph.n_kv_heads if self.name in ("k", "v") else self.graph.n_heads

    # ---- where it stands in the graph
    @cached_property
    def _attention(self) -> Block:
        return self._block(BlockKind.ATTENTION)

    @cached_property
    def _mlp(self) -> Block:
        return self._block(BlockKind.MLP)

    def refuse_post_norm(self) -> None:
        """Raise `sweep-arguments` where what one head writes is no fixed part of what its layer adds to the stream."""
        if self._attention.post_norm:
            what = f"what heads of layer {self.layer} write is normalised together"
            message = f"{what}: a cache's numbers for one head do not say what it adds to the stream"
            fix = "give the clean tokens (in float32, the whole caches of both runs do too)"
            raise failure(SweepError, BAD_SWEEP, message, fix)

    def _block(self, kind: BlockKind) -> Block:
        found = self.graph.layer_block(kind, self.layer)
        if found is None:
            raise failure(SweepNameError, NO_ACTIVATION, f"no {self.hook}: layer {self.layer} has no {kind}")
        return found

    @cached_property
    def rank(self) -> int:
        """The rank below which a stream is read."""
        ranks = [b.rank for b in self.graph.blocks if b.layer == self.layer]
        if self.name != "resid_mid":
            return min(ranks) if self.name == "resid_pre" else max(ranks) + 1
        if self._attention.rank >= self._mlp.rank:
            message = f"no {self.hook}: its attention and its MLP do not stand one after the other"
            raise failure(SweepNameError, NO_ACTIVATION, message, "sweep `resid_pre` or `resid_post`")
        return self._mlp.rank

    def nodes(self, member: int) -> Nodes:
        """The nodes that are set with one member."""
        if self.name in STREAMS:
            return self._mlp.nodes if self.of_mlp else self.graph.below(self.rank)
        if self.name == "attn_out":
            return self._attention.nodes
        if self.name in ("mlp_out", "post"):
            return self._mlp.nodes
        size = self.graph.n_heads // self.n_members
        heads = [self.graph.node(Kind.HEAD, self.layer, member * size + i) for i in range(size)]
        return bitset(h.id for h in heads if h is not None)

    def step(self, member: int, tokens: Tokens = EVERYWHERE, sources: Tokens = EVERYWHERE) -> Step:
        """The start of a path that sets a member at some tokens (of attention entries: of those that ask)."""
        nodes = self.nodes(member)
        if self.of_mlp:
            return Step(nodes, tokens=tokens, site=Site.IN)
        if self.name in STREAMS:
            return Step(nodes, tokens=tokens, site=Site.STREAM, rank=self.rank)
        if self.name == "attn_out":
            return Step(nodes, tokens=tokens, site=Site.ATTN_OUT)
        if self.shape is Shape.ROWS:
            return Step(nodes, tokens=tokens, site=Site.POST if self.name == "post" else Site.OUT)
        return Step(nodes, tokens=tokens, site=HEAD_SITES[self.name], sources=sources)

    # ---- as a run has it
    def read(self, run: PlainRun, world: str, rows: Callable[[Block, int], PlainRows]) -> Tensor:
        """The activation in a plain run, in TransformerLens' shape; a new tensor. `rows` gives the attention rows of a
        block's head."""
        if self.shape is Shape.ENTRIES:
            return self._entries(world, rows)
        return self._by_token(run).unflatten(0, (self.n_batch, self.n_pos)).clone()

    def _by_token(self, run: PlainRun) -> Tensor:
        """`[token, ...]`."""
        graph, pieces = self.graph, self.pieces
        if self.name in STREAMS:
            return stream_place(pieces, self.rank).read(run)
        if self.name == "attn_out":
            return attn_out_place(pieces, graph.blocks.index(self._attention)).read(run)
        if self.shape is Shape.ROWS:
            site = Site.POST if self.name == "post" else Site.OUT
            return node_place(pieces, graph.members(self._mlp.nodes)[0], site).read(run)
        if self.name in PORTS:
            return run.attention[graph.blocks.index(self._attention)].raw[PORTS[self.name]]
        heads = [h for m in self.members() for h in graph.members(self.nodes(m))]
        return torch.stack([node_place(pieces, h, HEAD_SITES[self.name]).read(run) for h in heads], 1)

    def _entries(self, world: str, rows: Callable[[Block, int], PlainRows]) -> Tensor:
        port = PATTERN if self.name == "pattern" else SCORES
        asked = torch.arange(self.layout.n_tokens)
        out = [rows(self._attention, h).of_world(port, world, asked, self.n_pos) for h in range(self.graph.n_heads)]
        return torch.stack(out, 1).unflatten(0, (self.n_batch, self.n_pos)).transpose(1, 2).contiguous()

    def of_member(self, x: Tensor, member: int) -> Tensor:
        """A member's part of an activation in TransformerLens' shape, one row a token: `[token, width]`."""
        if self.shape is Shape.HEADS:
            x = x[:, :, member]
        elif self.shape is Shape.ENTRIES:
            x = x[:, member]
        return x.flatten(0, 1)

    def tokens(self, rows: Tensor) -> Tokens:
        """The tokens at which `rows` `[token]` is true."""
        return bitset(rows.nonzero().flatten().tolist())

    def at(self, position: int) -> Tokens:
        """One position of every prompt."""
        return self.layout.at(position)

    def members(self) -> range:
        return range(self.n_members)


def parsed(hook: str) -> tuple[int, str, Shape] | None:
    """Layer, short name and axes of a hook's full name; None where no site is meant."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    return (int(found[1]), *HOOKS[found[2]]) if found and found[2] in HOOKS else None


def activation(hook: str, pieces: Pieces, layout: Layout, of_mlp: bool = False) -> Activation:
    """The activation of a hook's full name; `of_mlp`: the stream between attention and MLP is what the MLP reads.
    Errors: `unknown-activation`."""
    found = parsed(hook)
    if found is None:
        known = ", ".join(short for short, _ in HOOKS.values())
        message = f"no site of the residual graph is {hook!r}: activations that can be set are {known}"
        raise failure(SweepNameError, NO_ACTIVATION, message)
    layer, name, shape = found
    if layer >= pieces.graph.n_layers:
        message = f"no {hook!r}: the model has layers 0..{pieces.graph.n_layers - 1}"
        raise failure(SweepNameError, NO_ACTIVATION, message)
    return Activation(hook, name, shape, layer, pieces, layout, of_mlp and name == "resid_mid")
