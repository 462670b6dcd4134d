"""An unpatched run put together from a model's pieces, over prompts of any lengths, packed: what the tests
compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.tokens import Layout
from patchc.model.pieces import Pieces, Tables


def packed_embedding(pieces: Pieces, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The stream below the first layer, [n, d_model]."""
    return torch.cat([pieces.embed(torch.tensor([ids])).sum(0)[0] for ids in prompts])


def packed_qkv(pieces: Pieces, layer: int, x: Tensor, tables: Tables) -> tuple[Tensor, Tensor, Tensor]:
    """Prepared q, k and v of every token, one per query head, [n, head, d_head]."""
    shared = [pieces.kv_head(h) for h in range(pieces.graph.n_heads)]
    tokens = torch.arange(x.shape[0])
    q, k, v = (
        pieces.prepare(layer, port, pieces.project(layer, port, pieces.norm(layer, port, x)), tokens, tables)
        for port in range(3)
    )
    return q, k[:, shared], v[:, shared]


def attention(pieces: Pieces, layer: int, x: Tensor, tables: Tables) -> Tensor:
    """What attention adds to the stream, [n, d_model]."""
    q, k, v = packed_qkv(pieces, layer, x, tables)
    z: list[Tensor] = []
    for start, n in zip(tables.layout.offsets, tables.layout.lengths, strict=False):
        rows = slice(start, start + n)
        z.append(pieces.attend(layer, q[None, rows], k[None, rows], v[None, rows], torch.arange(n)[None], n, tables)[0])
    bias = pieces.attn_bias(layer)
    out = pieces.write(layer, torch.cat(z))
    return pieces.post_norm(layer, out if bias is None else out + bias)


def streams(pieces: Pieces, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The stream as each rank reads it, [n, d_model]; the last is the final one."""
    graph: ResidualGraph = pieces.graph
    tables = pieces.tables(Layout(tuple(len(ids) for ids in prompts)))
    read: list[Tensor] = [torch.empty(0), packed_embedding(pieces, prompts)]
    written = read[-1]
    for block in graph.blocks[1:]:
        if block.rank == len(read):
            read.append(written)
        assert block.layer is not None
        if block.kind is BlockKind.ATTENTION:
            written = written + attention(pieces, block.layer, read[block.rank], tables)
        else:
            written = written + pieces.mlp(block.layer, read[block.rank])
    return [*read, written]
