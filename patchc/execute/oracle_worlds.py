"""Forward passes over all prompts, each world's own run kept whole, and patches' values taken from them.

For the hooks backend. A tensor's first axis is the layout's tokens: prompts of one length share a pass, and
none is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from patchc.diagnostics import RULES
from patchc.execute.hook_drivers import At, Driver, Point, points_of
from patchc.ir.bits import bits
from patchc.ir.experiment import FromWorld, Given, Itself, Mean, Prompts, Source, Value
from patchc.ir.graph import BlockKind, Kind, Node, ResidualGraph
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens

TENSOR_SHAPE = RULES.add("hooks-tensor", "a tensor that a patch names is not there, or has not the width of its site")

TokenEdit = Callable[[Tensor, Tensor], Tensor]
"""New values of an activation `[token, ...]`, given the numbers of those tokens `[token]`."""

Record = dict[Point, Tensor]
"""Activations by point, `[token, ...]`."""


class Passes:
    """Forward passes on whole worlds."""

    def __init__(self, driver: Driver, prompts: Prompts, device: torch.device):
        self.driver, self.prompts, self.device = driver, prompts, device
        self.count = 0
        layout = prompts.layout
        self._groups: list[Tensor] = []
        for length in sorted(set(layout.lengths)):
            offsets = [o for o, n in zip(layout.offsets, layout.lengths, strict=False) if n == length]
            self._groups.append(torch.tensor(offsets, device=device)[:, None] + torch.arange(length, device=device))

    def run(self, world: str, edits: Mapping[Point, TokenEdit], capture: Collection[Point]) -> Record:
        """Run the model on a world's tokens; one forward pass a length of prompt."""
        ids = torch.tensor([i for row in self.prompts.world(world).ids for i in row], device=self.device)
        out: Record = {}
        for tokens in self._groups:
            here = {point: _on_tokens(edit, tokens.flatten()) for point, edit in edits.items()}
            got = self.driver.run(ids[tokens], here, capture)
            self.count += 1
            for point, x in got.items():
                if point not in out:
                    out[point] = x.new_zeros(len(ids), *x.shape[2:])
                out[point][tokens.flatten()] = x.flatten(0, 1)
        return out


def _on_tokens(edit: TokenEdit, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: edit(x.flatten(0, 1), tokens).view(x.shape)


@dataclass(frozen=True, slots=True)
class Change:
    """At `tokens` (`[token]`, bool): `constant + scale * what is there`; elsewhere what is there."""

    tokens: Tensor
    constant: Tensor
    scale: float = 0.0

    def __call__(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        tokens, constant = (self.tokens, self.constant) if rows is None else (self.tokens[rows], self.constant[rows])
        new = constant + self.scale * x if self.scale else constant
        return torch.where(tokens.view(-1, *[1] * (x.dim() - 1)), new, x)

    @property
    def forgets(self) -> bool:
        """Nothing of what was there is left."""
        return not self.scale and bool(self.tokens.all())


class Worlds:
    """Every world's own run, and values made of them."""

    def __init__(self, passes: Passes, graph: ResidualGraph, tensors: Mapping[str, Tensor]):
        self.passes, self.graph, self.tensors = passes, graph, tensors
        self.layout = passes.prompts.layout
        self._records: dict[str, Record] = {}
        self._w_o = [passes.driver.w_o(layer) for layer in range(graph.n_layers)]
        self.mask = lru_cache(maxsize=4096)(self._mask)

    def record(self, world: str) -> Record:
        """All that a world's own run computes."""
        if world not in self._records:
            self._records[world] = self.passes.run(world, {}, points_of(self.graph))
        return self._records[world]

    def _mask(self, tokens: Tokens) -> Tensor:
        mask = torch.zeros(self.layout.n_tokens, dtype=torch.bool, device=self.passes.device)
        mask[list(bits(tokens & self.layout.all))] = True
        return mask

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
        """What an output adds to the stream, `[token, d_model]`."""
        return own @ self._w_o[_layer(node)][node.head] if node.kind is Kind.HEAD else own

    def projection(self, record: Record, node: Node, port: int) -> Tensor:
        """A head's view of its q, k or v, `[token, d_head]`."""
        return record[Point(PROJECTIONS[port], _layer(node))][:, self.column(node, port)]

    def column(self, node: Node, port: int) -> int:
        """Which of a layer's q, k or v heads a head reads."""
        head = node.head or 0
        return head if port == 0 else head // (self.graph.n_heads // self.graph.n_kv_heads)

    def stream(self, record: Record, rank: int) -> Tensor:
        """The stream below a rank, `[token, d_model]`."""
        return record[self.stream_point(rank)]

    def stream_point(self, rank: int) -> Point:
        """Where a pass has the stream below a rank."""
        if rank == self.graph.top:
            return Point(At.FINAL_IN)
        block = next(b for b in self.graph.blocks if b.rank == rank)
        return Point(At.RESID_PRE if block.kind is BlockKind.ATTENTION else At.MLP_IN, block.layer or 0)

    # ---- values
    def node_change(self, value: Value, tokens: Tokens, node: Node, site: Site) -> tuple[Change, Tensor | None]:
        """A value for a node's output, in the form of `own`; and what a head then adds to the stream besides
        its z, where a tensor is given for the output itself."""
        beside = node.kind is Kind.HEAD and site is Site.OUT
        change = self.change(value, tokens, lambda record: self.own(record, node), skip_given=beside)
        given = [(c, s) for c, s in value.terms if isinstance(s, Given)]
        if not beside or not given:
            return change, None
        whole = self.written(node, change.constant)
        direct = self.change(Value(tuple(given)), tokens, lambda _: whole)
        return change, torch.where(direct.tokens[:, None], direct.constant, 0.0)

    def change(
        self, value: Value, tokens: Tokens, read: Callable[[Record], Tensor], skip_given: bool = False
    ) -> Change:
        """A value at some tokens; `read` finds the site in a record."""
        scale = sum(c for c, source in value.terms if isinstance(source, Itself))
        template = read(next(iter(self._records.values())))
        constant = torch.zeros_like(template)
        for c, source in value.terms:
            if not isinstance(source, Itself) and not (skip_given and isinstance(source, Given)):
                constant = constant + c * self._source(source, read, template)
        return Change(self.mask(tokens), constant, scale)

    def _source(self, source: Source, read: Callable[[Record], Tensor], template: Tensor) -> Tensor:
        match source:
            case FromWorld(world):
                return read(self.record(world))
            case Mean(world, over_positions):
                return self._mean(read(self.record(world)), over_positions)
            case Given(key):
                return self._given(key, template)
            case Itself():
                raise AssertionError("what is there is no constant")

    def _mean(self, x: Tensor, over_positions: bool) -> Tensor:
        if over_positions:
            return x.mean(0, keepdim=True).expand_as(x)
        total = x.new_zeros(max(self.layout.lengths), *x.shape[1:]).index_add(0, self._positions, x)
        counts = torch.bincount(self._positions).to(x.dtype)
        return (total / counts.view(-1, *[1] * (x.dim() - 1)))[self._positions]

    @cached_property
    def _positions(self) -> Tensor:
        places = [self.layout.place(t)[1] for t in range(self.layout.n_tokens)]
        return torch.tensor(places, device=self.passes.device)

    def _given(self, key: str, template: Tensor) -> Tensor:
        if key not in self.tensors:
            raise TENSOR_SHAPE.error(f"no tensor {key!r} was given; there are: {', '.join(self.tensors) or 'none'}")
        x = self.tensors[key].to(template)
        if x.shape != template.shape[1:]:
            wanted = list(template.shape[1:])
            raise TENSOR_SHAPE.error(f"tensor {key!r} has shape {list(x.shape)}; here it must be {wanted}")
        return x.expand_as(template)


PROJECTIONS = (At.Q, At.K, At.V)


def _layer(node: Node) -> int:
    assert node.layer is not None
    return node.layer
