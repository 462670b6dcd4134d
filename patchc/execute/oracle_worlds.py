"""Every world's own run, kept whole, and where the model's sites stand in it.

For the hooks backend. A head's output is kept as its z `[token, d_head]`, since what it writes follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from patchc.execute.hook_points import At, Point, points_of
from patchc.execute.oracle_passes import Passes, Record
from patchc.execute.oracle_states import ENTRY_SITES, Start
from patchc.execute.oracle_values import Change, Place, Values
from patchc.ir.bits import bits
from patchc.ir.experiment import Given, Noise, Probe, Value
from patchc.ir.graph import BlockKind, Kind, Node, ResidualGraph
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens

PROJECTIONS = (At.Q, At.K, At.V)
INSIDE = {Site.Q: At.Q, Site.K: At.K, Site.V: At.V, Site.Z: At.Z, Site.SCORES: At.SCORES, Site.PATTERN: At.PATTERN,
          Site.IN: At.MLP_IN, Site.POST: At.POST}  # fmt: skip
"""Where a pass has each site inside a node."""


class Worlds:
    """Every world's own run, and values made of them."""

    def __init__(self, passes: Passes, graph: ResidualGraph, tensors: Mapping[str, Tensor]):
        self.passes, self.graph = passes, graph
        self.prompts = passes.prompts
        self.layout = passes.prompts.layout
        self.values = Values(passes.prompts, self.record, tensors)
        self._records: dict[str, Record] = {}
        self._w_o = [passes.driver.w_o(layer) for layer in range(graph.n_layers)]
        self.mask = lru_cache(maxsize=4096)(self._mask)

    def record(self, world: str) -> Record:
        """All that a world's own run computes."""
        if world not in self._records:
            kept = self.passes.run(world, {}, points_of(self.graph))
            self._records[world] = Record(kept, lambda point: self.passes.run(world, {}, [point])[point])
        return self._records[world]

    # ---- where things stand in a record
    def own(self, record: Record, node: Node) -> Tensor:
        """A node's output: a head's z `[token, d_head]`, any other's `[token, d_model]`."""
        match node.kind:
            case Kind.HEAD:
                return record[Point(At.Z, _layer(node))][:, node.head]
            case Kind.MLP:
                return record[Point(At.MLP_OUT, _layer(node))]
            case Kind.EMBED:
                return record[Point(At.EMBED)]
            case _:
                return record[Point(At.POS_EMBED)]

    def written(self, node: Node, own: Tensor) -> Tensor:
        """What a node with this output writes, `[token, d_model]`: before its block's norm, where there is one."""
        return own @ self._w_o[_layer(node)][node.head] if node.kind is Kind.HEAD else own

    def inside(self, record: Record, node: Node, site: Site) -> Tensor:
        """A head's own view of a site inside it, or an MLP's, `[token, width]`."""
        x = record[Point(INSIDE[site], _layer(node))]
        return x[:, self.column(node, site)] if node.kind is Kind.HEAD else x

    def column(self, node: Node, site: Site) -> int:
        """Which of a layer's heads holds a head's site: grouped queries share k and v."""
        head = node.head or 0
        return head // (self.graph.n_heads // self.graph.n_kv_heads) if site in (Site.K, Site.V) else head

    def stream(self, record: Record, rank: int) -> Tensor:
        """The stream below a rank, `[token, d_model]`."""
        return record[self.stream_point(rank)]

    def stream_point(self, rank: int) -> Point:
        """Where a pass has the stream below a rank."""
        if rank == self.graph.top:
            return Point(At.FINAL_IN)
        block = next(b for b in self.graph.blocks if b.rank == rank)
        return Point(At.RESID_PRE if block.kind is BlockKind.ATTENTION else At.MLP_IN, block.layer or 0)

    def attn_out(self, record: Record, block: int) -> Tensor:
        """What an attention block adds to the stream, `[token, d_model]`."""
        return record[Point(At.ATTN_OUT, self.graph.blocks[block].layer or 0)]

    def heads_point(self, block: int) -> Point:
        """Where a pass has what a block's heads and bias write together."""
        normed, layer = self.graph.blocks[block].post_norm, self.graph.blocks[block].layer or 0
        return Point(At.HEADS_OUT if normed else At.ATTN_OUT, layer)

    def added(self, record: Record, block: int, more: Tensor) -> Tensor:
        """What a block adds to the stream beyond a record's, where its nodes together write `more` than there."""
        if not self.graph.blocks[block].post_norm:
            return more
        written = record[self.heads_point(block)] + more
        layer = self.graph.blocks[block].layer or 0
        return self.passes.driver.post_norm(layer, written) - self.attn_out(record, block)

    def probed(self, record: Record, probe: Probe) -> Tensor:
        """What stands at a probe, `[token, width]`; of attention the width is that of the longest prompt."""
        if probe.site is Site.STREAM:
            return self.stream(record, probe.rank)
        node = self.graph.nodes[next(bits(probe.nodes))]
        if probe.site is Site.ATTN_OUT:
            return self.attn_out(record, node.block)
        return self.place(node, probe.site).read(record)

    # ---- places and values
    def place(self, node: Node, site: Site) -> Place:
        """A site of a node."""
        if site is Site.OUT:
            return Place(node.name, lambda record: self.written(node, self.own(record, node)))
        name = f"{node.name}.{site}"
        return Place(name, lambda record: self.inside(record, node, site), site in ENTRY_SITES)

    def stream_place(self, rank: int, block: int | None) -> Place:
        """The stream below a rank, or with `block` that block's whole output."""
        if block is None:
            return Place(f"stream[{rank}]", lambda record: self.stream(record, rank))
        return Place(f"attn_out[{self.graph.blocks[block].layer}]", lambda record: self.attn_out(record, block))

    def output_change(self, value: Value, where: Tensor, node: Node, site: Site, run: str) -> Entering:
        """A value for a node's output, in the form of `own`; and what a head then adds to the stream besides its z,
        where the value for the output itself is none that z can have: a tensor, or noise."""
        if node.kind is not Kind.HEAD:
            return self.values.change(value, where, self.place(node, Site.OUT), run), None
        beside = tuple(t for t in value.terms if site is Site.OUT and isinstance(t[1], Given | Noise))
        inside = Value(tuple(t for t in value.terms if t not in beside))
        change = self.values.change(inside, where, self.place(node, Site.Z), run)
        if not beside:
            return change, None
        direct = self.values.change(Value(beside), where, self.place(node, Site.OUT), run)
        return change, torch.where(where[:, None], direct.constant, 0.0)

    # ---- where a value enters
    def where(self, starts: Iterable[Start], node: Node, run: str) -> Tensor:
        """What starts at one site of a node replace: bool, `[token]`, or of entries and neurons `[token, width]`."""
        masks = [self._where(start, node, run) for start in starts]
        return torch.stack(masks).any(0)

    def _where(self, start: Start, node: Node, run: str) -> Tensor:
        tokens = self.mask(start.tokens)
        if start.site in ENTRY_SITES:
            shown = self.inside(self.record(run), node, Site.SCORES) > -torch.inf
            return tokens[:, None] & self._row_of(self.mask(start.sources)) & shown
        if start.site is Site.POST:
            width = self.inside(self.record(run), node, Site.POST).shape[1]
            neurons = [start.neurons < 0 or bool(start.neurons >> i & 1) for i in range(width)]
            return tokens[:, None] & torch.tensor(neurons, device=tokens.device)
        return tokens

    def _row_of(self, sources: Tensor) -> Tensor:
        """Tokens as the positions that each token of their prompt looks at, `[token, width]`."""
        return torch.cat([sources, sources.new_zeros(1)])[self._looked_at]

    @cached_property
    def _looked_at(self) -> Tensor:
        """The token that stands at each position of each token's prompt; beyond its end the number of tokens."""
        layout, none = self.layout, self.layout.n_tokens
        rows: list[list[int]] = []
        for offset, n in zip(layout.offsets, layout.lengths, strict=False):
            rows += n * [[*range(offset, offset + n), *(self.passes.width - n) * [none]]]
        return torch.tensor(rows, device=self.passes.device)

    def _mask(self, tokens: Tokens) -> Tensor:
        mask = torch.zeros(self.layout.n_tokens, dtype=torch.bool, device=self.passes.device)
        mask[list(bits(tokens & self.layout.all))] = True
        return mask


Entering = tuple[Change, Tensor | None]
"""What becomes of a node's own output, and what it adds to the stream besides."""


def _layer(node: Node) -> int:
    assert node.layer is not None
    return node.layer
