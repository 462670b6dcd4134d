"""Writes a masked variant DAG as one fx graph over whole sequences: `forward(ids of each world, masks) -> logits,
captures`.

Mask inputs mix at the places where patches start; everything between is the model's own pieces, called by name, so that
`.code` reads like the experiment. Differentiable in the masks and in everything that the pieces are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from patchc.codegen.inside import Insides
from patchc.codegen.sources import ONE_LENGTH
from patchc.codegen.stored import StoredNodes
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import Probe
from patchc.ir.graph import PORTS
from patchc.ir.ops import (
    PATTERN,
    SCORES,
    Const,
    Core,
    Entries,
    HeadZ,
    Masked,
    Mix,
    Neurons,
    Out,
    Projected,
    Replaced,
    Run,
    Scale,
    StoredZ,
    Stream,
    Sum,
    Tokenwise,
    VariantId,
    children,
)
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens
from patchc.lower.masked import MaskedCells
from patchc.model.pieces import TracedPieces

NOT_CAPTURED = (Site.SCORES, Site.PATTERN, Site.POST)
"""What metrics read inside nodes that a graph has no capture of."""


class CompiledGraph(fx.GraphModule):
    """`forward(ids of each world [batch, pos], masks) -> (logits [batch, pos, d_vocab], captures by name)`.
    The batch is free, unless a value is of certain prompts (`sources` says which are).

    `worlds`: the inputs' names in order, the base world first. `mask_shape`: the shape of `masks`, one number a cell of
    the experiment. Captures are `stream`, the final stream, what each node that is run again writes, and as `read NAME`
    what a metric reads inside the model (attention scores, patterns and neurons excepted).
    `parameters()` are the model's own: nothing is copied, so give an optimiser the masks, not these."""

    worlds: tuple[str, ...]
    mask_shape: tuple[int, ...]


class Emitter:
    """Emits the variants of one DAG in order; a variant is a difference from the base run `[b, s, d_model]`."""

    def __init__(
        self, cells: MaskedCells, pieces: TracedPieces, worlds: tuple[str, ...], tensors: Mapping[str, Tensor]
    ):
        self.cells = cells
        self.dag: Dag = cells.dag
        self.shape = cells.shape
        self.worlds = Worlds(cells.dag.graph, pieces, worlds)
        self.call = self.worlds.call
        self.stored = StoredNodes(self.worlds, cells.prompts, tensors)
        self.base = worlds[0]
        self.insides = Insides(self.worlds, self.dag.values, self.stored, self._mask_of, self._rows)
        masks = self.worlds.argument("masks")
        self.masks = self.call(aten.reshape.default, masks, [-1])
        self.values: dict[VariantId, fx.Node] = {}
        self.captures: dict[str, fx.Node] = {}
        self._written: dict[VariantId, fx.Node] = {}
        self._streams: dict[tuple[VariantId, int], fx.Node] = {}
        self._mask: dict[int, fx.Node] = {}

    def module(self) -> CompiledGraph:
        """The finished graph."""
        length = len(self.dag)
        root = self.dag.explicit(self.cells.root)
        probes = [(probe, self.dag.explicit(r)) for probe, r in self.cells.probes]
        for i in sorted(self._below([root, *(r for _, r in probes)])):
            self.values[i] = self._variant(i)
        for probe, r in probes:
            self._read(probe, r)
        stream = self._changed_stream(root, self.dag.graph.top)
        logits = self.worlds.module("unembed", stream, name="logits")
        self.worlds.graph.output((logits, {"stream": stream, **self.captures}))
        self.dag.truncate(length)
        module = CompiledGraph(self.worlds.root, self.worlds.graph, "CompiledGraph")
        module.worlds, module.mask_shape = tuple(self.worlds.ids), self.shape
        module.graph.eliminate_dead_code()
        module.delete_all_unused_submodules()
        module.recompile()
        return module

    def _read(self, probe: Probe, root: VariantId) -> None:
        """Captures what a metric reads."""
        name, base = self.stored.probe(probe)
        new = self.values.get(root)
        self._capture(f"read {name}", base if new is None else self.call(operator.add, base, new))

    def _below(self, roots: list[VariantId]) -> set[VariantId]:
        seen: set[VariantId] = {0}
        todo = list(roots)
        while todo:
            i = todo.pop()
            if i not in seen:
                seen.add(i)
                todo.extend(children(self.dag.ops[i]))
        return seen - {0}

    # ---- variants
    def _variant(self, i: VariantId) -> fx.Node:
        op = self.dag.ops[i]
        match op:
            case Const(block, members, value, tokens, site):
                return self._at(tokens, self.stored.node(block, members, self.dag.values[value], site))
            case Stream(rank, value, tokens, block):
                return self._at(tokens, self.stored.stream(rank, self.dag.values[value], block))
            case Sum(parts):
                return self._sum([self.values[p] for p in parts])
            case Mix(parts):
                return self._sum([self._at(tokens, self.values[p]) for tokens, p in parts])
            case Scale(factor, x):
                return self.call(operator.mul, self.values[x], factor)
            case Masked(x, starts):
                return self._masked(x, starts)
            case Core():
                return self._core(op)
            case Out(core, heads):
                return self._out(core, heads)
            case Projected(block, port, head, x, replaced):
                now = self._port(block, port, x, replaced)
                return self._of_head(now, self.worlds.projection(self.base, block, port), head)
            case HeadZ(core, head):
                at = self.dag.ops[core]
                assert isinstance(at, Core)
                return self._of_head(self.values[core], self.worlds.z(self.base, at.block), head)
            case StoredZ(block, head, value, tokens):
                z = self.stored.z(block, 1 << head, self.dag.values[value])
                return self._at(tokens, self.call(aten.select.int, z, 2, head))
            case Tokenwise():
                return self._tokenwise(op)
            case Entries() | Neurons():
                raise AssertionError("what a graph does not capture is not lowered for it")
            case Run():
                raise AssertionError("suffixes are written out before anything is emitted")

    def _masked(self, x: VariantId, starts: tuple[tuple[int, Tokens, VariantId], ...]) -> fx.Node:
        """`x + sum of mask * (value - x)`."""
        own = self.values.get(x)
        out = own
        for mask, tokens, value in starts:
            new = self.values.get(value)
            if new is None and own is None:
                continue
            gap = self._minus(new, own)
            change = self._at(tokens, self.call(operator.mul, gap, self._mask_of(mask)))
            out = change if out is None else self.call(operator.add, out, change)
        assert out is not None
        return out

    def _minus(self, one: fx.Node | None, other: fx.Node | None) -> fx.Node:
        if other is None:
            assert one is not None
            return one
        return self.call(operator.neg, other) if one is None else self.call(operator.sub, one, other)

    def _tokenwise(self, op: Tokenwise) -> fx.Node:
        layer, rank = self.dag.graph.blocks[op.block].layer, self.dag.graph.blocks[op.block].rank
        x, name = self._changed_stream(op.input, rank), f"mlp_{layer}"
        new = self.insides.mlp(op, x, name) if op.replaced else self.worlds.module(f"layer{layer}_mlp", x, name=name)
        self._capture(f"mlp[{layer}]", new)
        return self.call(operator.sub, new, self.worlds.written(self.base, op.block))

    def _core(self, core: Core) -> fx.Node:
        ports = [self._port(core.block, port, core.input(port), core.replaced) for port in range(3)]
        if core.replaced_at(SCORES, PATTERN):
            return self.insides.z(core, ports)
        layer = self.dag.graph.blocks[core.block].layer
        return self.worlds.module(f"layer{layer}_attend", *ports, name=f"z_{layer}")

    def _port(self, block: int, port: int, x: VariantId, sets: tuple[Replaced, ...]) -> fx.Node:
        """q, k or v of every head, `[b, s, head, d_head]`."""
        if x == 0:
            now = self.worlds.projection(self.base, block, port)
        else:
            rank = self.dag.graph.blocks[block].rank
            now = self.worlds.project(block, port, self._changed_stream(x, rank), PORTS[port])
        for replaced in sets:
            if replaced.port == port:
                now = self._replaced(block, replaced, now)
        return now

    def _of_head(self, now: fx.Node, base: fx.Node, head: int) -> fx.Node:
        """What one head has more than in the base run, of `[b, s, head, d_head]`."""
        return self.call(aten.select.int, self.call(operator.sub, now, base), 2, head)

    def _replaced(self, block: int, replaced: Replaced, now: fx.Node) -> fx.Node:
        value = self.dag.values[replaced.value]
        gap = self._minus(self.stored.projection(block, replaced.port, replaced.heads, value, now), now)
        gap = self.call(operator.mul, gap, self._mask_of(replaced.mask)) if replaced.mask >= 0 else gap
        one_hot = torch.zeros(1, 1, self.dag.graph.n_heads, 1)
        one_hot[:, :, list(bits(replaced.heads))] = 1
        one_hot = one_hot.to(self.worlds.pieces.device, self.worlds.pieces.dtype)
        gap = self.call(operator.mul, gap, self.worlds.buffer("heads", one_hot))
        return self.call(operator.add, now, self._at(replaced.tokens, gap, extra_axes=2))

    def _out(self, core: VariantId, heads: int) -> fx.Node:
        op = self.dag.ops[core]
        assert isinstance(op, Core)
        layer = self.dag.graph.blocks[op.block].layer
        if core not in self._written:
            self._written[core] = self.worlds.module(f"layer{layer}_write", self.values[core])
        now = self._written[core]
        written = self.worlds.chosen(now, heads)
        chosen = ", ".join(map(str, bits(heads)))
        self._capture(f"head[{layer}, {chosen}]" if heads.bit_count() == 1 else f"head[{layer}, {{{chosen}}}]", written)
        return self.call(operator.sub, written, self.worlds.chosen(self.worlds.heads(self.base, op.block), heads))

    # ---- small things
    def _changed_stream(self, x: VariantId, rank: int) -> fx.Node:
        base = self.worlds.stream(self.base, rank)
        if x == 0:
            return base
        if (x, rank) not in self._streams:
            self._streams[x, rank] = self.call(operator.add, base, self.values[x], name=f"stream_{rank}")
        return self._streams[x, rank]

    def _sum(self, parts: list[fx.Node]) -> fx.Node:
        out = parts[0]
        for part in parts[1:]:
            out = self.call(operator.add, out, part)
        return out

    def _mask_of(self, number: int) -> fx.Node:
        if number not in self._mask:
            self._mask[number] = self.call(operator.getitem, self.masks, number, name=f"mask_{number}")
        return self._mask[number]

    def _at(self, tokens: Tokens, x: fx.Node, extra_axes: int = 1) -> fx.Node:
        """`x` at these tokens, zero elsewhere."""
        rows = self._rows(tokens)
        if rows is None:
            return x
        place = self.worlds.buffer("at", rows.view(*rows.shape, *[1] * extra_axes))
        return self.call(operator.mul, x, place)

    def _rows(self, tokens: Tokens) -> Tensor | None:
        """One at these tokens and zero elsewhere, `[prompt or 1, pos]`; None for every token."""
        layout = self.dag.layout
        tokens &= layout.all
        if tokens == layout.all:
            return None
        lengths = set(layout.lengths)
        if len(lengths) > 1:
            raise ONE_LENGTH.error("a compiled graph with named positions needs prompts of one length")
        rows = torch.zeros(layout.n_prompts, layout.lengths[0])
        for t in bits(tokens):
            rows[layout.place(t)] = 1
        rows = rows[:1] if bool((rows == rows[:1]).all()) else rows
        return rows.to(self.worlds.pieces.device, self.worlds.pieces.dtype)

    def _capture(self, name: str, node: fx.Node) -> None:
        n = 2
        unique = name
        while unique in self.captures:
            unique, n = f"{name}#{n}", n + 1
        self.captures[unique] = node


def compiled_graph(
    cells: MaskedCells, pieces: TracedPieces, worlds: tuple[str, ...], tensors: Mapping[str, Tensor]
) -> CompiledGraph:
    """The graph of an experiment's cells; `worlds` are its inputs in order, the base world first."""
    return Emitter(cells, pieces, worlds, tensors).module()
