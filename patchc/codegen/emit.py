"""Writes a masked variant DAG as one fx graph over whole sequences: `forward(ids of each world, masks) -> logits,
captures`.

Mask inputs mix at the places where patches start; everything between is the model's own pieces, called by name, so that
`.code` reads like the experiment. Differentiable in the masks and in everything that the pieces are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from patchc.codegen.masks import Masks
from patchc.codegen.stored import StoredNodes
from patchc.codegen.variants import Variants
from patchc.codegen.worlds import Worlds
from patchc.diagnostics import RULES
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import Probe
from patchc.ir.ops import Core, Out, Tokenwise, VariantId, children
from patchc.ir.paths import Site
from patchc.lower.masked import MaskedCells
from patchc.model.pieces import TracedPieces

NOT_CAPTURED = (Site.SCORES, Site.PATTERN, Site.POST)
"""What metrics read inside nodes that a graph has no capture of."""


BAD_MASKS = RULES.add("bad-masks", "masks of a kind, or of a shape, that a graph does not have")


class CompiledGraph(fx.GraphModule):
    """`forward(ids of each world [batch, pos], masks) -> (logits [batch, pos, d_vocab], captures by name)`.
    The batch is free, unless a value is of certain prompts (`sources` says which are).

    `worlds`: the inputs' names in order, the base world first. `mask_shape`: the shape of `masks`, one number a cell of
    the experiment, or one an edge or a node where the graph has masks for all of them: `starts` names those in order.
    Captures are `stream`, the final stream; as `read NAME` what a metric reads inside the model (attention scores,
    patterns and neurons excepted); and where asked for, what each node that is run again writes. `form` says whether
    masks are multiplied one by one (sparse) or by products with all gaps (dense), whichever takes fewer FLOPs.
    `parameters()` are the model's own: nothing is copied, so give an optimiser the masks, not these."""

    worlds: tuple[str, ...]
    mask_shape: tuple[int, ...]
    starts: tuple[str, ...] = ()
    form: str = ""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_forward_pre_hook(_check_masks)

    def extra_repr(self) -> str:
        return f"masks {list(self.mask_shape)}, {self.form}"


def _check_masks(graph: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Masks of another shape would be read in another order: refused, but all in one row. Error: `bad-masks`."""
    assert isinstance(graph, CompiledGraph)
    masks = inputs[len(graph.worlds)] if len(inputs) > len(graph.worlds) else None
    if masks is None:  # given by name, or not at all: what is wrong with it shows
        return
    shapes = (graph.mask_shape, (prod(graph.mask_shape),))
    if not isinstance(masks, Tensor) or tuple(masks.shape) not in shapes or not masks.is_floating_point():
        given = f"{masks.dtype} {list(masks.shape)}" if isinstance(masks, Tensor) else f"a {type(masks).__name__}"
        raise BAD_MASKS.error(f"its masks are floating point, of shape {list(graph.mask_shape)}, not {given}")


def compiled_graph(
    cells: MaskedCells,
    pieces: TracedPieces,
    worlds: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    *,
    captures: bool = False,
    form: str = "cost",
) -> CompiledGraph:
    """The graph of an experiment's cells; `worlds` are its inputs in order, the base world first. `captures`: whether
    it gives what nodes write. `form`: "sparse", "dense", or the cheaper of them ("cost")."""
    return Emitter(cells, pieces, worlds, tensors, form).module(captures)


class Emitter:
    """Writes one graph: what is read of a DAG, and what of that is captured."""

    def __init__(
        self,
        cells: MaskedCells,
        pieces: TracedPieces,
        worlds: tuple[str, ...],
        tensors: Mapping[str, Tensor],
        form: str = "cost",
    ):
        self.cells = cells
        self.dag: Dag = cells.dag
        self.worlds = Worlds(cells.dag.graph, pieces, worlds)
        self.stored = StoredNodes(self.worlds, cells.prompts, tensors)
        self.masks = Masks(self.worlds, self.dag.layout)
        self.form = form
        self.captures: dict[str, fx.Node] = {}

    def module(self, captures: bool) -> CompiledGraph:
        """The finished graph."""
        length = len(self.dag)
        root = self.dag.explicit(self.cells.root)
        probes = [(probe, self.dag.explicit(r)) for probe, r in self.cells.probes]
        read = sorted(self._below([root, *(r for _, r in probes)]))
        self.variants = Variants(self.dag, read, self.worlds, self.stored, self.masks, self.form)
        self._run(read)
        for probe, r in probes:
            self._read(probe, r)
        if captures:
            self._capture_written(read)
        stream = self.variants.stream(root, self.dag.graph.top)
        logits = self.worlds.module("unembed", stream, name="logits")
        self.worlds.graph.output((logits, {"stream": stream, **self.captures}))
        self.dag.truncate(length)
        return self._finished()

    def _finished(self) -> CompiledGraph:
        module = CompiledGraph(self.worlds.root, self.worlds.graph, "CompiledGraph")
        module.worlds, module.mask_shape = tuple(self.worlds.ids), self.cells.shape
        module.starts, module.form = self.cells.starts, str(self.variants.forms)
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return module

    def _run(self, read: list[VariantId]) -> None:
        """Writes nodes from the bottom up, so that no call goes deeper than what one of them reads."""
        for i in read:
            match self.dag.ops[i]:
                case Out(core, _):
                    self.variants.cores.z(core)
                case Tokenwise():
                    self.variants.mlp(i)
                case _:
                    pass

    def _below(self, roots: list[VariantId]) -> set[VariantId]:
        seen: set[VariantId] = {0}
        todo = list(roots)
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                todo.extend(children(self.dag.ops[i]))
        return seen - {0}

    # ---- captures
    def _read(self, probe: Probe, root: VariantId) -> None:
        """Captures what a metric reads."""
        if probe.site in (Site.STREAM, Site.IN):
            rank = probe.rank if probe.site is Site.STREAM else self.dag.graph.members(probe.nodes)[0].rank
            name, found = self.stored.probe(probe)[0], self.variants.stream(root, rank)
        else:
            name, base = self.stored.probe(probe)
            new = self.variants.difference(root)
            found = base if new is None else self.worlds.call(operator.add, base, new)
        self._capture(f"read {name}", found)

    def _capture_written(self, read: list[VariantId]) -> None:
        """Captures what every node that is run again writes."""
        for i in read:
            match self.dag.ops[i]:
                case Tokenwise(block):
                    self._capture(f"mlp[{self.dag.graph.blocks[block].layer}]", self.variants.mlp(i))
                case Out(core, heads):
                    self._capture_heads(core, heads)
                case _:
                    pass

    def _capture_heads(self, core: VariantId, heads: int) -> None:
        op = self.dag.ops[core]
        assert isinstance(op, Core)
        layer, chosen = self.dag.graph.blocks[op.block].layer, ", ".join(map(str, bits(heads)))
        name = f"head[{layer}, {chosen}]" if heads.bit_count() == 1 else f"head[{layer}, {{{chosen}}}]"
        self._capture(name, self.variants.heads(op.block, self.variants.cores.z(core), heads))

    def _capture(self, name: str, node: fx.Node) -> None:
        n = 2
        unique = name
        while unique in self.captures:
            unique, n = f"{name}#{n}", n + 1
        self.captures[unique] = node
