"""Plain runs of the model with every stored value kept: the base run and the worlds that patches take values from.

Rows are tokens of all prompts one after another (`ir.tokens.Layout`), so prompts of different lengths stand side by
side; only attention is computed prompt by prompt, prompts of one length together.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchc.execute.packing import even
from patchc.ir.experiment import World
from patchc.ir.graph import BlockKind
from patchc.ir.program import FULL
from patchc.ir.tokens import Layout
from patchc.model.pieces import Pieces, Tables


@dataclass
class AttentionRun:
    """One layer's attention. `raw`: q, k, v before rotary; `ready`: as the attention core takes them; z: `[token, head,
    d_head]`. k and v have KV heads."""

    raw: tuple[Tensor, Tensor, Tensor]
    ready: tuple[Tensor, Tensor, Tensor]
    z: Tensor


@dataclass
class PlainRun:
    """One world's run. `embed` `[node, token, d_model]`; `stream[rank]` `[token, d_model]`, the stream below that
    rank. `written` `[token, d_model]`: what the heads and bias of a block write together, of blocks that have a norm
    after it. `post`: MLPs' neurons, of those that are asked for."""

    embed: Tensor
    stream: list[Tensor] = field(default_factory=list[Tensor])
    attention: dict[int, AttentionRun] = field(default_factory=dict[int, AttentionRun])
    mlp: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    written: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    post: dict[int, Tensor] = field(default_factory=dict[int, Tensor])


def by_length(layout: Layout) -> dict[int, list[int]]:
    """The prompts of each length."""
    out: dict[int, list[int]] = {}
    for prompt, length in enumerate(layout.lengths):
        out.setdefault(length, []).append(prompt)
    return out


def token_numbers(layout: Layout, prompts: list[int], device: torch.device) -> Tensor:
    """`[prompt, pos]` token numbers of prompts of one length."""
    first = torch.tensor([layout.offsets[p] for p in prompts], device=device)
    return first[:, None] + torch.arange(layout.lengths[prompts[0]], device=device)


def run_world(pieces: Pieces, world: World, layout: Layout, tables: Tables) -> PlainRun:
    """Run one world and keep everything."""
    embed = _embed(pieces, world, layout)
    run = PlainRun(embed, [torch.zeros_like(embed[0]), embed.sum(0)])
    tokens = torch.arange(layout.n_tokens, device=pieces.device)
    written = torch.zeros_like(embed[0])
    for i, block in enumerate(pieces.graph.blocks[1:], 1):
        if block.rank == len(run.stream):
            run.stream.append(run.stream[-1] + written)
            written = torch.zeros_like(written)
        assert block.layer is not None
        x = run.stream[block.rank]
        if block.kind is BlockKind.ATTENTION:
            run.attention[i] = _attention(pieces, block.layer, x, tokens, layout, tables)
            raw = pieces.write(block.layer, run.attention[i].z)
            bias = pieces.attn_bias(block.layer)
            raw = raw if bias is None else raw + bias
            if block.post_norm:
                run.written[i] = raw
            written = written + pieces.post_norm(block.layer, raw)
        else:
            run.mlp[i] = torch.cat([pieces.mlp(block.layer, some) for some in even(x, FULL.rows)])
            written = written + run.mlp[i]
    run.stream.append(run.stream[-1] + written)
    return run


def _embed(pieces: Pieces, world: World, layout: Layout) -> Tensor:
    n_nodes = pieces.graph.blocks[0].size
    out = torch.empty(n_nodes, layout.n_tokens, pieces.graph.d_model, device=pieces.device, dtype=pieces.dtype)
    for prompts in by_length(layout).values():
        ids = torch.tensor([world.ids[p] for p in prompts], device=pieces.device)
        out[:, token_numbers(layout, prompts, pieces.device)] = pieces.embed(ids)
    return out


def _attention(pieces: Pieces, layer: int, x: Tensor, tokens: Tensor, layout: Layout, tables: Tables) -> AttentionRun:
    normed = [pieces.norm(layer, 0, x)]
    normed += normed * 2 if pieces.shares_norm(layer) else [pieces.norm(layer, p, x) for p in (1, 2)]
    raw = [pieces.project(layer, p, y) for p, y in enumerate(normed)]
    q, k, v = (pieces.prepare(layer, p, r, tokens, tables) for p, r in enumerate(raw))
    heads = _kv_heads(pieces)
    z = torch.empty(layout.n_tokens, pieces.graph.n_heads, v.shape[-1], device=x.device, dtype=x.dtype)
    for length, prompts in by_length(layout).items():
        at = token_numbers(layout, prompts, x.device)
        positions = torch.arange(length, device=x.device).expand(len(prompts), length)
        keys, values = (x[at] if heads is None else x[at].index_select(2, heads) for x in (k, v))
        z[at] = pieces.attend(layer, q[at], keys, values, positions, length, tables)
    return AttentionRun((raw[0], raw[1], raw[2]), (q, k, v), z)


def _kv_heads(pieces: Pieces) -> Tensor | None:
    """The key/value head that each head reads, None where each has its own."""
    heads = [pieces.kv_head(h) for h in range(pieces.graph.n_heads)]
    return None if heads == list(range(pieces.graph.n_kv_heads)) else torch.tensor(heads, device=pieces.device)
