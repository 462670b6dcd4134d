"""Reads an experiment whose cells patch edges and nothing else as masks on edges, so that no path need be folded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from patchc.ir.experiment import Blocked, Experiment, Patch, Value
from patchc.ir.graph import PORTS, Nodes, Reader, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Path, Seq, Star, Step
from patchc.ir.tokens import Tokens

Edge = tuple[int, int, int]
"""A writer's node (of the embeddings: the first), a reader's node, and its port (-1 where it has one input)."""
EdgeMasks = dict[Edge, list[tuple[int, Tokens, Value]]]


def edge_masks(experiment: Experiment, numbers: list[int], graph: ResidualGraph) -> EdgeMasks | None:
    """The masks on each edge, `numbers[i]` for cell i; None where some patch is no set of edges."""
    out: EdgeMasks = {}
    for number, cell in zip(numbers, experiment.cells, strict=True):
        for patch in cell.patches:
            edges = list(_edges(patch, graph))
            if not edges:
                return None
            for edge, tokens in edges:
                starts = out.setdefault(edge, [])
                if any(mask == number for mask, _, _ in starts):
                    return None
                starts.append((number, tokens, patch.value))
    return out


def reads_as(reader: Reader) -> tuple[int, int]:
    """A reader as edges name it."""
    return reader.node.id, -1 if reader.port is None else reader.port


def _edges(patch: Patch, graph: ResidualGraph) -> Iterator[tuple[Edge, Tokens]]:
    """The edges that a patch is: of a writer to a reader, whatever happens above that."""
    if patch.complement or any(isinstance(source, Blocked) for _, source in patch.value.terms):
        return
    match patch.path:
        case Seq((Step() as writer, Step() as reader, *rest)) if _goes_on(reader, rest, graph):
            pass
        case _:
            return
    plain = Step(reader.nodes, ports=reader.ports)
    writers = _writers(writer.nodes, graph)
    if reader != plain or replace(writer, tokens=EVERYWHERE) != Step(writer.nodes) or not writers:
        return
    for w in writers:
        for node in graph.members(reader.nodes):
            if graph.nodes[w].rank < node.rank:
                ports = [p for p in range(len(PORTS)) if reader.ports >> p & 1] if node.head is not None else [-1]
                for port in ports:
                    yield (w, node.id, port), writer.tokens


def _goes_on(reader: Step, rest: list[Path], graph: ResidualGraph) -> bool:
    """Whether a path ends at this reader, the logits, or goes on from it by any way to them."""
    if not rest:
        return reader.nodes == graph.logits_set
    return rest == [Star(Step(graph.all)), Step(graph.logits_set)] and not reader.nodes & graph.logits_set


def _writers(nodes: Nodes, graph: ResidualGraph) -> list[int]:
    """Writers by their first node; none where some of the nodes are not whole writers."""
    found = [of[0].id for _, some in graph.writers if nodes & some and (of := graph.members(some))]
    whole = sum(some for _, some in graph.writers if nodes & some == some)
    return found if whole == nodes else []
