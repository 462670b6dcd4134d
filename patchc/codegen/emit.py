"""Writes a masked variant DAG as one fx graph over whole sequences: `forward(ids of each world, masks) -> logits,
captures`.

Mask inputs mix at the places where patches start; everything between is the model's own pieces, called by name, so that
`.code` reads like the experiment. Differentiable in the masks and in everything that the pieces are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from patchc.codegen.inside import Insides
from patchc.codegen.worlds import Worlds, aten
from patchc.diagnostics import RULES
from patchc.ir.bits import bits
from patchc.ir.dag import (
    PATTERN,
    SCORES,
    Const,
    Core,
    Dag,
    Masked,
    Mix,
    Out,
    Replaced,
    Run,
    Scale,
    Stream,
    Sum,
    Tokenwise,
    VariantId,
    children,
)
from patchc.ir.experiment import FromWorld, Given, Itself, Mean, Value
from patchc.ir.graph import PORTS, BlockKind
from patchc.ir.tokens import Tokens
from patchc.lower.masked import MaskedCells
from patchc.model.pieces import TracedPieces

ONE_LENGTH = RULES.add("graph-needs-one-length", "a compiled graph names positions, and its prompts differ in length")


class CompiledGraph(fx.GraphModule):
    """`forward(ids of each world [batch, pos], masks) -> (logits [batch, pos, d_vocab], captures by name)`.

    `worlds`: the inputs' names in order, the base world first. `mask_shape`: the shape of `masks`, one number a cell of
    the experiment. Captures are `stream`, the final stream, and what each node that is run again writes.
    `parameters()` are the model's own: nothing is copied, so give an optimiser the masks, not these."""

    worlds: tuple[str, ...]
    mask_shape: tuple[int, ...]


class Emitter:
    """Emits the variants of one DAG in order; a variant is a difference from the base run `[b, s, d_model]`."""

    def __init__(
        self, cells: MaskedCells, pieces: TracedPieces, worlds: tuple[str, ...], tensors: Mapping[str, Tensor]
    ):
        self.dag: Dag = cells.dag
        self.shape = cells.shape
        self.worlds = Worlds(cells.dag.graph, pieces, worlds)
        self.call = self.worlds.call
        self.tensors, self.base = tensors, worlds[0]
        self.insides = Insides(self.worlds, self.dag.values, self._combination, self._mask_of, self._rows)
        masks = self.worlds.argument("masks")
        self.masks = self.call(aten.reshape.default, masks, [-1])
        self.values: dict[VariantId, fx.Node] = {}
        self.captures: dict[str, fx.Node] = {}
        self._written: dict[VariantId, fx.Node] = {}
        self._streams: dict[tuple[VariantId, int], fx.Node] = {}
        self._mask: dict[int, fx.Node] = {}

    def module(self, root: VariantId) -> CompiledGraph:
        """The finished graph. `root` is the final stream's variant."""
        length = len(self.dag)
        root = self.dag.explicit(root)
        for i in sorted(self._below(root)):
            self.values[i] = self._variant(i)
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

    def _below(self, root: VariantId) -> set[VariantId]:
        seen: set[VariantId] = {0}
        todo = [root]
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
            case Const(block, members, value, tokens):
                return self._at(tokens, self._const(block, members, self.dag.values[value]))
            case Stream(rank, value, tokens):
                sources = {w: self.worlds.stream(w, rank) for w in self.worlds.ids}
                return self._at(tokens, self._difference(self.dag.values[value], sources, None))
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
            case Tokenwise():
                return self._tokenwise(op)
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
        ports: list[fx.Node] = []
        for port in range(3):
            x = core.input(port)
            if x == 0:
                now = self.worlds.projection(self.base, core.block, port)
            else:
                rank = self.dag.graph.blocks[core.block].rank
                now = self.worlds.project(core.block, port, self._changed_stream(x, rank), PORTS[port])
            for replaced in core.replaced:
                if replaced.port == port:
                    now = self._replaced(core.block, replaced, now)
            ports.append(now)
        if core.replaced_at(SCORES, PATTERN):
            return self.insides.z(core, ports)
        layer = self.dag.graph.blocks[core.block].layer
        return self.worlds.module(f"layer{layer}_attend", *ports, name=f"z_{layer}")

    def _replaced(self, block: int, replaced: Replaced, now: fx.Node) -> fx.Node:
        sources = {w: self.worlds.projection(w, block, replaced.port) for w in self.worlds.ids}
        value = self._combination(self.dag.values[replaced.value], sources, now)
        gap = self._minus(value, now)
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
        written = self._chosen(now, heads)
        chosen = ", ".join(map(str, bits(heads)))
        self._capture(f"head[{layer}, {chosen}]" if heads.bit_count() == 1 else f"head[{layer}, {{{chosen}}}]", written)
        return self.call(operator.sub, written, self._chosen(self.worlds.heads(self.base, op.block), heads))

    def _chosen(self, heads: fx.Node, members: int) -> fx.Node:
        """The sum of some heads of `[b, s, head, d_model]`."""
        chosen = list(bits(members))
        if len(chosen) == 1:
            return self.call(aten.select.int, heads, 2, chosen[0])
        if len(chosen) < self.dag.graph.n_heads:
            index = torch.tensor(chosen, device=self.worlds.pieces.device)
            heads = self.call(aten.index_select.default, heads, 2, self.worlds.buffer("heads", index))
        return self.call(aten.sum.dim_IntList, heads, [2])

    # ---- stored values
    def _const(self, block: int, members: int, value: Value) -> fx.Node:
        graph = self.dag.graph
        n_heads = graph.n_heads if graph.blocks[block].kind is BlockKind.ATTENTION else 0
        parts: list[fx.Node] = []
        if n_heads:
            heads = members & ((1 << n_heads) - 1)
            if heads:
                sources = {w: self._chosen(self.worlds.heads(w, block), heads) for w in self.worlds.ids}
                parts.append(self._difference(value, sources, None))
            bias = self.worlds.bias(block) if members >> n_heads else None
            if bias is not None:  # the same in every world; a given tensor already stands for the whole
                share = sum(factor for factor, source in value.terms if not isinstance(source, Given)) - 1.0
                parts.append(self.call(operator.mul, bias, share))
        elif graph.blocks[block].kind is BlockKind.MLP:
            sources = {w: self.worlds.written(w, block) for w in self.worlds.ids}
            parts.append(self._difference(value, sources, None))
        else:
            for i in bits(members):
                sources = {w: self.worlds.embed(w, graph.blocks[block].first + i) for w in self.worlds.ids}
                parts.append(self._difference(value, sources, None))
        return self._sum(parts)

    def _difference(self, value: Value, sources: dict[str, fx.Node], own: fx.Node | None) -> fx.Node:
        return self._minus(self._combination(value, sources, own), sources[self.base])

    def _combination(
        self, value: Value, sources: Mapping[str, fx.Node], own: fx.Node | None, axes: Sequence[int] = (0, 1)
    ) -> fx.Node | None:
        """A value; None where it is zero. `axes`: those of prompts and positions."""
        out: fx.Node | None = None
        for factor, source in value.terms:
            match source:
                case FromWorld(world):
                    term = sources[world]
                case Mean(world, over_positions):
                    over = list(axes) if over_positions else [axes[0]]
                    term = self.call(aten.mean.dim, sources[world], over, True)
                case Given(key):
                    term = self.worlds.buffer("given", self.tensors[key])
                case Itself():
                    assert own is not None
                    term = own
            term = term if factor == 1.0 else self.call(operator.mul, term, factor)
            out = term if out is None else self.call(operator.add, out, term)
        return out

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
    return Emitter(cells, pieces, worlds, tensors).module(cells.root)
