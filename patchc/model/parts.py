"""One block of a traced model as functions: cut out of the graph, its weights read as views of the model's own.

`pieces` puts them behind one interface; what a block's nodes are, `attention` and `trace` have found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from patchc.model.attention import AttentionBlock, Port
from patchc.model.emit import Emitter, Region, Statics, region, spans
from patchc.model.inside import emit_scores
from patchc.model.nodes import A, evaluate, is_pointwise, need, path_of
from patchc.model.outputs import Neurons
from patchc.model.trace import Layer, Structure


@dataclass(frozen=True)
class Matrix:
    """A linear map's weight [out, in] and bias [out], views of the model's own tensors."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, first: Sequence[int], size: int) -> tuple[Tensor, Tensor | None]:
        """Rows `first[i] .. first[i] + size - 1` of each i: a view where they stand together."""
        runs = spans(first, size)
        return cut(self.weight, runs, 0), None if self.bias is None else cut(self.bias, runs, 0)

    def columns(self, first: Sequence[int], size: int) -> Tensor:
        """The same of the weight's columns."""
        return cut(self.weight, spans(first, size), 1)


def _memory(x: Tensor) -> int:
    """Equal for tensors that share their memory; unlike an address, told apart where there are no values."""
    return x.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def cut(x: Tensor, runs: Sequence[tuple[int, int]], dim: int) -> Tensor:
    """The parts of an axis that start at `run[0]` and are `run[1]` long, one after the other."""
    parts = [x.narrow(dim, start, length) for start, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True)
class Parts:
    """Cuts functions out of a structure; they share its statics and its weights."""

    structure: Structure
    statics: Statics
    copied: dict[str, int] = field(default_factory=dict[str, int])
    """Bytes that parts hold beside the model's own tensors, by the module whose weights they are made of."""

    @cached_property
    def weights(self) -> SimpleNamespace:
        """Every weight by name, detached: autograd keeps nothing for gradients that nobody asks for."""
        root = self.structure.exported.module
        named = (
            *root.named_parameters(remove_duplicate=False),
            *root.named_buffers(remove_duplicate=False),
        )
        return SimpleNamespace(**{name: tensor.detach() for name, tensor in named})

    def constant(self, node: fx.Node) -> Tensor:
        """A value that depends on weights alone, detached from them."""
        with torch.no_grad():
            value = evaluate(node, {}, self.structure.exported.module)
        return self.held(value.detach(), node)

    def held(self, value: Tensor, node: fx.Node) -> Tensor:
        """`value`, noted in `copied` unless it is a view of the model's own tensors."""
        if _memory(value) not in self._memories:
            place = path_of(node) or str(node.target)
            self.copied[place] = self.copied.get(place, 0) + value.numel() * value.element_size()
        return value

    @cached_property
    def _memories(self) -> frozenset[int]:
        return frozenset(map(_memory, vars(self.weights).values()))

    def matrix(self, linear: fx.Node) -> Matrix:
        """The weight and bias of a linear operation."""
        weight, *bias = cast("tuple[fx.Node, ...]", linear.args[1:])
        return Matrix(self.constant(weight), self.constant(bias[0]) if bias else None)

    def function(self, output: fx.Node, name: str, given: fx.Node, what: str) -> fx.GraphModule:
        """The function from `given` to `output`, position by position; refused if it reads anything else."""
        made = region(self.structure, self.statics, output, [("x", given)], name)
        need(not made.statics, f"{what} that depends on more than the stream at each position", output)
        return made.module

    def embedding(self, node: fx.Node) -> fx.GraphModule:
        """The function from token ids to an embedding."""
        emitter = Emitter(self.structure, self.statics, ["ids"])
        emitter.bind(self.structure.exported.ids, emitter.inputs[0])
        return emitter.finish(emitter.copy_writer(node), "Embedding").module

    def mlp(self, layer: Layer, index: int) -> fx.GraphModule | None:
        """The function from the stream to what the layer's MLP adds to it, None without one."""
        if layer.mlp is None or layer.mlp_entry is None:
            return None
        return self.function(layer.mlp, f"Layer{index}Mlp", layer.mlp_entry, "an MLP")

    def neurons(self, layer: Layer, neurons: Neurons | None, index: int) -> NeuronParts | None:
        """The same in two steps, None where the MLP has no hidden layer."""
        if neurons is None or layer.mlp is None or layer.mlp_entry is None:
            return None
        up = self.function(neurons.post, f"Layer{index}Post", layer.mlp_entry, "an MLP")
        down = self.function(layer.mlp, f"Layer{index}Down", neurons.post, "an MLP")
        output = neurons.output
        write = None if output.post_norm else (self.matrix(output.linear), scale_of(self, output.scales))
        return NeuronParts(up, down, write)

    def run(self, module: fx.GraphModule, *args: Tensor) -> Any:
        """A module's function, with the detached weights for its own."""
        return type(module).forward(cast("fx.GraphModule", self.weights), *args)


@dataclass(frozen=True)
class NeuronParts:
    """An MLP's functions: from the stream to its neurons, and from those to what it adds. `write` is the second without
    its bias, a matrix and a factor; None where it is not linear, as with a post-norm."""

    up: fx.GraphModule
    down: fx.GraphModule
    write: tuple[Matrix, Tensor | float | None] | None


class AttentionParts:
    """The functions of one attention block. `norms`, `across` (over all heads of a projection), `prepares` and
    `post_norm` are None where nothing is done."""

    def __init__(self, parts: Parts, layer: Layer, index: int) -> None:
        self.block: AttentionBlock = layer.attention
        ports = self.block.ports
        sources = [cast(fx.Node, port.linear.args[0]) for port in ports]
        self.shares_norm = len(set(sources)) == 1
        self.norms = [
            None if s is layer.entry else parts.function(s, f"Layer{index}Norm", layer.entry, "a norm") for s in sources
        ]
        self.projections = [parts.matrix(port.linear) for port in ports]
        self.across = [self._across(parts, port, index) for port in ports]
        self.prepares = [self._prepare(parts, port, index) for port in ports]
        operands = [(name, port.operand) for name, port in zip("qkv", ports, strict=True)]
        structure, statics = parts.structure, parts.statics
        self.core: Region = region(structure, statics, self.block.core, operands, f"Layer{index}Core", 2)
        self.scores: Region = _scores(structure, statics, self.block, f"Layer{index}Scores")
        output = self.block.output
        self.output = parts.matrix(output.linear)
        self.scale = scale_of(parts, output.scales)
        bias = self.output.bias
        self.bias = bias if bias is None or self.scale is None else parts.held(bias * self.scale, output.linear)
        self.post_norm = (
            parts.function(self.block.leaf, f"Layer{index}PostNorm", output.linear, "a norm after attention")
            if output.post_norm
            else None
        )

    def _across(self, parts: Parts, port: Port, index: int) -> fx.GraphModule | None:
        if not port.normed:
            return None
        return parts.function(port.whole, f"Layer{index}Across", port.linear, "a norm over all heads")

    def _prepare(self, parts: Parts, port: Port, index: int) -> Region | None:
        if port.prepared is port.head:
            return None
        pos_axis = 1 if port.heads_last else 2
        given = [("r", port.head)]
        return region(parts.structure, parts.statics, port.prepared, given, f"Layer{index}Prepare", pos_axis)


def _scores(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    """From operands q and k to scores; it reads the core's statics, in the same order."""
    emitter = Emitter(structure, statics, ["q", "k"], [(block.core, [p.operand for p in block.ports])], 2)
    return emitter.finish(emit_scores(emitter, block, *emitter.inputs), name)


def scale_of(parts: Parts, scales: Sequence[fx.Node]) -> Tensor | float | None:
    """The product of the factors between a node's output projection and the stream."""
    scale: Any = None
    for node in scales:
        dynamic = parts.structure.dynamic
        factor = next(a for a in node.args if not (isinstance(a, fx.Node) and dynamic[a]))
        value: Any = parts.constant(factor) if isinstance(factor, fx.Node) else factor
        value = 1 / value if node.target in (A.div.Tensor, A.div.Scalar) else value
        scale = value if scale is None else scale * value
    return scale


class Unembedding:
    """The final norm, the unembedding's rows that are asked for, and what is done to the logits after it."""

    def __init__(self, parts: Parts) -> None:
        structure = parts.structure
        self.parts, self.matrix = parts, None
        logits, final = structure.exported.logits, structure.final
        self.whole = parts.function(logits, "Unembed", final, "an unembedding")
        if (linear := self._linear(logits)) is not None:
            self.matrix = parts.matrix(linear)
            self.norm = parts.function(cast(fx.Node, linear.args[0]), "FinalNorm", final, "a norm")
            self.after = parts.function(logits, "AfterUnembed", linear, "an unembedding")

    def _linear(self, logits: fx.Node) -> fx.Node | None:
        """The unembedding matrix, if all that follows it acts on each logit by itself."""
        node = logits
        while node.target is not A.linear.default:
            if not is_pointwise(node) or len(node.all_input_nodes) != 1:
                return None
            node = node.all_input_nodes[0]
        return node

    def __call__(self, x: Tensor, columns: Tensor | None) -> Tensor:
        if columns is None:
            return self.parts.run(self.whole, x[None])[0]
        if self.matrix is None:
            return self(x, None).index_select(-1, columns)
        y = self.parts.run(self.norm, x[None])
        bias = None if self.matrix.bias is None else self.matrix.bias.index_select(0, columns)
        return self.parts.run(self.after, F.linear(y, self.matrix.weight.index_select(0, columns), bias))[0]
