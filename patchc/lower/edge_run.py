"""A run in which masks act on edges, or on whole nodes, as one variant DAG: built reader by reader, writer by writer.

What `lower.fold` makes of any path set, for these starts alone, in time that grows with the edges and not with their
square. Which masks act where, the caller says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from patchc.ir.dag import Dag
from patchc.ir.experiment import Value
from patchc.ir.graph import Block, BlockKind, Nodes, Reader
from patchc.ir.ops import EQUAL_TO_BASE, VariantId
from patchc.ir.tokens import Tokens
from patchc.lower.changes import Changes, relative

Starts = Iterable[tuple[int, Tokens, Value]]
"""Masks, the tokens at which they act, and the values that they put in."""


@dataclass(frozen=True, slots=True)
class Writer:
    """A writer so far: the embeddings together, a head or an MLP, and what it writes in this run."""

    name: str
    nodes: Nodes
    variant: VariantId


@dataclass
class EdgeRun:
    """`starts(writer, reader)`: the masks on an edge, or with None for the reader on all that a writer writes."""

    dag: Dag
    changes: Changes
    base: str
    starts: Callable[[Writer, Reader | None], Starts]
    writers: list[Writer] = field(default_factory=list[Writer])
    _values: dict[tuple[Nodes, Value, VariantId], VariantId] = field(
        default_factory=dict[tuple[Nodes, Value, VariantId], VariantId]
    )

    # ---- edges
    def edges(self) -> VariantId:
        """The final stream where each reader has masks of its own."""
        self._add_input()
        for rank in range(1, self.dag.graph.top):
            blocks = self._blocks(rank)
            found = [self._read_by_each(i, b) for i, b in blocks]
            for (_, block), variants in zip(blocks, found, strict=True):
                self._add(block, variants)
        return self._private(Reader(self.dag.graph.logits))

    def _read_by_each(self, index: int, block: Block) -> list[VariantId]:
        """What the writers of a block write, each of whose ports reads its own stream."""
        if block.kind is BlockKind.MLP:
            return [self.dag.tokenwise(index, self._private(Reader(self.dag.graph.nodes[block.first])))]
        nodes = self.dag.graph.nodes[block.first : block.first + self.dag.graph.n_heads]
        out: list[VariantId] = []
        for h, node in enumerate(nodes):
            q, k, v = (self._private(Reader(node, port)) for port in range(3))
            out.append(self.dag.out(self.dag.core(index, q, k, v), 1 << h))
        return out

    def _private(self, reader: Reader) -> VariantId:
        """The stream that one reader sees."""
        return self.dag.sum(self._seen(reader))

    # ---- nodes
    def nodes(self) -> VariantId:
        """The final stream where all readers see a writer's mask."""
        self._add_input()
        x = self.dag.sum(self._taken())
        for rank in range(1, self.dag.graph.top):
            for index, block in self._blocks(rank):
                self._add(block, self._read_by_all(index, block, x))
            x = self.dag.sum([x, *self._taken()])
        return x

    def _taken(self) -> list[VariantId]:
        """What the writers that were added last write, with their masks."""
        parts = self._seen(None)
        self.writers.clear()
        return parts

    def _read_by_all(self, index: int, block: Block, x: VariantId) -> list[VariantId]:
        """What the writers of a block write on one stream."""
        if block.kind is BlockKind.MLP:
            return [self.dag.tokenwise(index, x)]
        core = self.dag.core(index, x, x, x)
        return [self.dag.out(core, 1 << h) for h in range(self.dag.graph.n_heads)]

    # ---- both
    def _blocks(self, rank: int) -> list[tuple[int, Block]]:
        return [(i, b) for i, b in enumerate(self.dag.graph.blocks) if b.rank == rank]

    def _add_input(self) -> None:
        self.writers.append(Writer("input", self.dag.graph.input, EQUAL_TO_BASE))

    def _add(self, block: Block, variants: list[VariantId]) -> None:
        for i, x in enumerate(variants):
            node = self.dag.graph.nodes[block.first + i]
            self.writers.append(Writer(node.name, 1 << node.id, x))

    def _seen(self, reader: Reader | None) -> list[VariantId]:
        """What the writers add to the stream as a reader sees them: of a block with a norm, the norm of their sum."""
        by_block: dict[int, list[VariantId]] = {}
        for writer in self.writers:
            by_block.setdefault(self.dag.graph.members(writer.nodes)[0].block, []).append(self._masked(writer, reader))
        out: list[VariantId] = []
        for index, parts in by_block.items():
            normed = self.dag.graph.blocks[index].post_norm
            out += [self.dag.post_norm(index, self.dag.sum(parts))] if normed else parts
        return out

    def _masked(self, writer: Writer, reader: Reader | None) -> VariantId:
        starts = tuple((mask, t, self._value(writer, value)) for mask, t, value in self.starts(writer, reader))
        return self.dag.masked(writer.variant, starts) if starts else writer.variant

    def _value(self, writer: Writer, value: Value) -> VariantId:
        """A value in a writer's place."""
        key = (writer.nodes, value, writer.variant)
        if key not in self._values:
            stored, own = relative(value, self.base)
            parts = [self._stored(n.id, stored) for n in self.dag.graph.members(writer.nodes)]
            self._values[key] = self.dag.sum([*parts, self.dag.scale(own, writer.variant)] if own else parts)
        return self._values[key]

    def _stored(self, node: int, value: Value) -> VariantId:
        block = self.dag.graph.nodes[node].block
        tokens = self.changes.at_node(value, self.dag.graph.nodes[node].kind)
        return self.dag.const(block, 1 << node - self.dag.graph.blocks[block].first, value, tokens)
