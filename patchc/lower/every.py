"""A mask for every edge, or every node, of a model: what an experiment's one value does there, whichever of them its
cells name.

With every mask 1 the run is the value's own, where that is a world's; with all 0, the base run. The derivative at 0 is
edge attribution patching's score (Syed et al. 2023), for nodes attribution patching's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from patchc.diagnostics import RULES
from patchc.ir.dag import Dag
from patchc.ir.experiment import Blocked, Experiment, Prompts, Value
from patchc.ir.graph import Reader, ResidualGraph
from patchc.ir.ops import EQUAL_TO_BASE
from patchc.ir.tokens import Tokens
from patchc.lower.changes import Changes
from patchc.lower.edge_run import EdgeRun, Writer
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
    names = _Names(_value(experiment), _positions(prompts) if by_position else [dag.layout.all])
    run = EdgeRun(dag, Changes(dag, prompts, experiment.run, any_data=True), experiment.run, names.starts)
    root = run.edges() if every is Every.EDGE else run.nodes()
    shape = (len(names.names), len(names.positions)) if by_position else (len(names.names),)
    return MaskedCells(dag, root, shape, prompts, starts=tuple(names.names))


@dataclass
class _Names:
    """Numbers masks as a run asks for them."""

    value: Value
    positions: list[Tokens]
    names: list[str] = field(default_factory=list[str])

    def starts(self, writer: Writer, reader: Reader | None) -> Iterator[tuple[int, Tokens, Value]]:
        first = len(self.names) * len(self.positions)
        self.names.append(writer.name if reader is None else f"{writer.name} -> {reader.name}")
        for i, tokens in enumerate(self.positions):
            yield first + i, tokens, self.value


def _positions(prompts: Prompts) -> list[Tokens]:
    """The tokens of all prompts at each position."""
    layout = prompts.layout
    return [sum(1 << first + p for first in layout.offsets) for p in range(layout.lengths[0])]


def _value(experiment: Experiment) -> Value:
    values = {patch.value for cell in experiment.cells for patch in cell.patches}
    blocked = any(isinstance(source, Blocked) for value in values for _, source in value.terms)
    if len(values) != 1 or blocked:
        raise ONE_VALUE.error(
            "masks for every node or edge of the model need one value for all of them; "
            + (f"`{experiment.name}` blocks attention" if blocked else f"`{experiment.name}` has {len(values)}"),
            fix="ask for the masks of an experiment whose patches have one value",
            span=experiment.span,
        )
    return values.pop()
