"""Cutting regions out of the canonical graph as fx GraphModules of their own, sharing the model's weights.

A region's inputs are nodes of the graph that are given from outside. What it reads besides that does not
depend on the residual stream but on the input's size (masks, rotary tables) becomes a static input; static
inputs are numbered once for the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from patchc.model.nodes import A, cone, is_tensor, need, shape_of
from patchc.model.trace import Structure


@dataclass
class Statics:
    """Every tensor that depends on the input's size but not on the stream and that some region reads."""

    structure: Structure
    nodes: list[fx.Node] = field(default_factory=list[fx.Node])

    def number(self, node: fx.Node) -> int:
        """The static's number, the next free one when it is new."""
        if node not in self.nodes:
            need(not self._reads_tokens(node), "a mask or table that depends on the tokens themselves", node)
            self.nodes.append(node)
        return self.nodes.index(node)

    def _reads_tokens(self, node: fx.Node) -> bool:
        inside = cone(node)
        return any(u in inside and u.target is not A.sym_size.int for u in self.structure.exported.ids.users)


@dataclass(frozen=True)
class Region:
    """A GraphModule and the numbers of the statics that it takes as trailing arguments."""

    module: fx.GraphModule
    statics: tuple[int, ...]


class Emitter:
    """Writes one GraphModule. `inputs` names its arguments; axes 0 and `pos_axis` of the first, or of `sized`, are
    batch and position. Regions are copied in with `copy`, further operations with `call`."""

    def __init__(
        self,
        structure: Structure,
        statics: Statics,
        inputs: Sequence[str],
        needs: Iterable[tuple[fx.Node, Sequence[fx.Node]]] = (),
        pos_axis: int = 1,
    ) -> None:
        self.structure, self.statics = structure, statics
        self.graph, self.root = fx.Graph(), nn.Module()
        self.inputs = [self.graph.placeholder(name) for name in inputs]
        self.sized: fx.Node | None = self.inputs[0] if self.inputs else None
        self.env: dict[fx.Node, fx.Node] = {}
        self.used: list[int] = []
        self._sizes: dict[int, fx.Node] = {}
        self._axes = {0: 0, 1: pos_axis}
        for output, given in needs:
            self._take_statics(output, given)

    # ---- building
    def call(self, op: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(op, args)

    def bind(self, old: fx.Node, new: fx.Node) -> None:
        """`new` stands for `old` in what is copied from here on."""
        self.env[old] = new

    def copy(self, node: fx.Node) -> fx.Node:
        """The node, and what it is computed from, in the new graph."""
        todo = [node]
        while todo:
            n = todo[-1]
            if n in self.env:
                todo.pop()
            elif self._is_size(n):
                self.env[n] = self._size(int(n.args[1]))  # type: ignore[arg-type]
            elif n.op == "get_attr":
                self.env[n] = self.weight(str(n.target))
            elif missing := [a for a in n.all_input_nodes if a not in self.env]:
                todo += missing
            else:
                need(
                    n.op == "call_function" and n not in self.structure.tree,
                    "the stream is read outside a port",
                    n,
                )
                self.env[n] = self.graph.node_copy(n, self.env.__getitem__)
        return self.env[node]

    def copy_writer(self, node: fx.Node) -> fx.Node:
        """As `copy`; but `node` may itself be a state of the stream, or what is added to it."""
        args, kwargs = (map_arg(part, self.copy) for part in (node.args, node.kwargs))
        return self.graph.call_function(node.target, args, kwargs)  # type: ignore[arg-type]

    def weight(self, name: str) -> fx.Node:
        """An attribute of the model, shared with it."""
        if not hasattr(self.root, name):
            value = getattr(self.structure.exported.module, name)
            if isinstance(value, nn.Parameter):
                self.root.register_parameter(name, value)
            else:
                self.root.register_buffer(name, value)
        return self.graph.create_node("get_attr", name)

    def finish(self, output: Any, name: str) -> Region:
        self.graph.output(output)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return Region(fx.GraphModule(self.root, self.graph, name), tuple(self.used))

    # ---- what a region reads besides its inputs
    def _is_size(self, node: fx.Node) -> bool:
        return node.target is A.sym_size.int and node.args[0] is self.structure.exported.ids

    def _size(self, axis: int) -> fx.Node:
        if axis not in self._sizes:
            self._sizes[axis] = self.call(A.sym_size.int, self.sized, self._axes[axis])
        return self._sizes[axis]

    def _take_statics(self, output: fx.Node, given: Sequence[fx.Node]) -> None:
        """Make an argument of every static that the region from `given` to `output` reads."""
        region = cone(output, {*given, *self.structure.tree})
        for n in self.structure.exported.nodes:
            if n in region and self._is_static(n) and any(self.structure.dynamic[u] and u in region for u in n.users):
                number = self.statics.number(n)
                if number not in self.used:
                    self.used.append(number)
                    self.env[n] = self.graph.placeholder(f"static_{number}")

    def _is_static(self, node: fx.Node) -> bool:
        if self.structure.dynamic[node] or not is_tensor(node) or node.op != "call_function":
            return False
        return self.structure.exported.ids in cone(node) and not self._counts_tokens(node)

    def _counts_tokens(self, node: fx.Node) -> bool:
        """A value as long as the list of all tokens follows from the region's own number of them."""
        exported = self.structure.exported
        return any({exported.batch, exported.pos} <= set(size.split("*")) for size in shape_of(node))


def statics_region(structure: Structure, statics: Statics) -> Region:
    """`ids [batch, pos]` -> every static, in the order of their numbers."""
    emitter = Emitter(structure, statics, ["ids"])
    emitter.env[structure.exported.ids] = emitter.inputs[0]
    return emitter.finish(tuple(emitter.copy(n) for n in statics.nodes), "Statics")


def region(
    structure: Structure,
    statics: Statics,
    output: fx.Node,
    given: Sequence[tuple[str, fx.Node]],
    name: str,
    pos_axis: int = 1,
) -> Region:
    """The region from some nodes, given under these argument names, to `output`."""
    nodes = [node for _, node in given]
    emitter = Emitter(structure, statics, [n for n, _ in given], [(output, nodes)], pos_axis)
    for placeholder, node in zip(emitter.inputs, nodes, strict=True):
        emitter.bind(node, placeholder)
    writer = output in structure.tree and output not in nodes
    return emitter.finish(emitter.copy_writer(output) if writer else emitter.copy(output), name)


def spans(first: Sequence[int], size: int) -> list[tuple[int, int]]:
    """(start, length) of the runs that parts of one size make, given where each starts."""
    out: list[tuple[int, int]] = []
    for start in first:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + size)
        else:
            out.append((start, size))
    return out
