"""A mask for every edge, or every node, of a model, as one variant DAG: what an experiment's one value does there,
whichever of them its cells name.

With every edge's mask 1 the run is the value's own, where that is a world's; with all 0, the base run. The derivative
at 0 is edge attribution patching's score (Syed et al. 2023), for nodes attribution patching's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from patchc.diagnostics import RULES
from patchc.ir.dag import Dag
from patchc.ir.experiment import Blocked, Experiment, Prompts, Value
from patchc.ir.graph import Block, BlockKind, Reader, ResidualGraph
from patchc.ir.ops import EQUAL_TO_BASE, VariantId
from patchc.ir.tokens import Tokens
from patchc.lower.changes import Changes, relative
from patchc.lower.masked import MaskedCells

ONE_VALUE = RULES.add("masks-need-one-value", "masks for a whole model were asked for, and patches have several values")


class Every(StrEnum):
    """What has a mask each."""

    NONE = "none"
    NODE = "node"
    EDGE = "edge"


def lower_every(
    experiment: Experiment, prompts: Prompts, graph: ResidualGraph, every: Every, by_position: bool = False
) -> MaskedCells:
    """The run of an experiment with a mask a writer, or an edge (`[edge]`, and with `by_position` `[edge, pos]`); the
    value is that of all its patches. Edges are in order of their readers, then of their writers."""
    dag = Dag(graph, prompts.layout)
    if every is Every.NONE:
        return MaskedCells(dag, EQUAL_TO_BASE, (0,), prompts)
    n = prompts.layout.lengths[0] if by_position else 1
    positions = _positions(prompts) if by_position else [dag.layout.all]
    run = _Run(dag, Changes(dag, prompts, experiment.run, any_data=True), _value(experiment), experiment.run, positions)
    root = run.edges() if every is Every.EDGE else run.nodes()
    shape = (len(run.names), n) if by_position else (len(run.names),)
    return MaskedCells(dag, root, shape, prompts, starts=tuple(run.names))


def _positions(prompts: Prompts) -> list[Tokens]:
    """The tokens of all prompts at each position."""
    layout = prompts.layout
    return [sum(1 << first + p for first in layout.offsets) for p in range(layout.lengths[0])]


def _value(experiment: Experiment) -> Value:
    values = {patch.value for cell in experiment.cells for patch in cell.patches}
    if len(values) > 1 or any(isinstance(source, Blocked) for value in values for _, source in value.terms):
        raise ONE_VALUE.error(
            f"a mask for every node or edge of the model patches them all with one value; `{experiment.name}` has "
            f"{len(values)}" + (" (no attention is none for a node)" if len(values) == 1 else ""),
            fix="make an experiment for each value",
            span=experiment.span,
        )
    return values.pop()


@dataclass
class _Run:
    """The run that is folded. `names` are those of its starts, in order of their masks."""

    dag: Dag
    changes: Changes
    value: Value
    base: str
    positions: list[Tokens]
    names: list[str] = field(default_factory=list[str])
    writers: list[tuple[str, VariantId, VariantId]] = field(default_factory=list[tuple[str, VariantId, VariantId]])
    """Each writer so far: its name, what it writes in this run, and the value."""

    # ---- every edge
    def edges(self) -> VariantId:
        """The final stream."""
        self._add_input()
        for rank in range(1, self.dag.graph.top):
            found = [self._read_by_each(i, b) for i, b in self._blocks(rank)]
            for block, variants in zip((b for _, b in self._blocks(rank)), found, strict=True):
                self._add(block, variants)
        return self._private(Reader(self.dag.graph.logits))

    def _read_by_each(self, index: int, block: Block) -> list[VariantId]:
        """What the writers of a block write, each of whose ports reads the stream with its own masks."""
        if block.kind is BlockKind.MLP:
            return [self.dag.tokenwise(index, self._private(Reader(self.dag.graph.nodes[block.first])))]
        nodes = self.dag.graph.nodes[block.first : block.first + self.dag.graph.n_heads]
        cores = [self.dag.core(index, *(self._private(Reader(node, p)) for p in range(3))) for node in nodes]
        return [self.dag.out(core, 1 << h) for h, core in enumerate(cores)]

    def _private(self, reader: Reader) -> VariantId:
        """The stream that one reader sees."""
        return self.dag.sum([self._masked(f"{name} -> {reader.name}", x, value) for name, x, value in self.writers])

    # ---- every node
    def nodes(self) -> VariantId:
        """The final stream."""
        self._add_input()
        x = self.dag.sum(self._started())
        for rank in range(1, self.dag.graph.top):
            for index, block in self._blocks(rank):
                self._add(block, self._read_by_all(index, block, x))
            x = self.dag.sum([x, *self._started()])
        return x

    def _started(self) -> list[VariantId]:
        """What the writers that were added last write, with their masks."""
        parts = [self._masked(name, x, value) for name, x, value in self.writers]
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
        value = self.dag.sum(self._stored(n.id) for n in self.dag.graph.members(self.dag.graph.input))
        self.writers.append(("input", EQUAL_TO_BASE, value))

    def _add(self, block: Block, variants: list[VariantId]) -> None:
        for i, x in enumerate(variants):
            node = self.dag.graph.nodes[block.first + i]
            self.writers.append((node.name, x, self._stored(node.id)))

    def _stored(self, node: int) -> VariantId:
        """The value that takes a writer's place."""
        block, value = self.dag.graph.nodes[node].block, relative(self.value, self.base)[0]
        tokens = self.changes.at_node(value, self.dag.graph.nodes[node].kind)
        return self.dag.const(block, 1 << node - self.dag.graph.blocks[block].first, value, tokens)

    def _masked(self, name: str, x: VariantId, value: VariantId) -> VariantId:
        own = relative(self.value, self.base)[1]
        value = self.dag.sum([value, self.dag.scale(own, x)]) if own else value
        first = len(self.names) * len(self.positions)
        self.names.append(name)
        return self.dag.masked(x, tuple(self._starts(first, value)))

    def _starts(self, first: int, value: VariantId) -> Iterator[tuple[int, Tokens, VariantId]]:
        for i, tokens in enumerate(self.positions):
            yield first + i, tokens, value
