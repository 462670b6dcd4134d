"""A model taken apart: the functions from which any patched run is put together, on packed rows of tokens.

`Pieces` is what the other stages rely on, `TracedPieces` what tracing gives. Rows are tokens of any prompts in any
order; weights are views of the model's own. For the same pieces as readable GraphModules see `piece_modules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from patchc.ir.graph import ResidualGraph
from patchc.ir.tokens import Layout
from patchc.model.attention import AttentionBlock
from patchc.model.emit import Emitter, Region, Statics, region, run, spans, statics_region
from patchc.model.nodes import A, evaluate, is_pointwise, need, shape_of
from patchc.model.piece_modules import PieceModules, piece_modules
from patchc.model.trace import Layer, Structure


@dataclass(frozen=True)
class Tables:
    """What the pieces need of a layout besides the stream: rotary rows by token, masks by length. Opaque to callers."""

    layout: Layout
    rows: dict[int, Tensor]
    """By a static's number: the static with its position axis indexed by token."""
    whole: dict[int, tuple[Tensor, ...]]
    """By a prompt's length: every static as the model computes it for that length, batch 1."""


class Pieces(Protocol):
    """The functions of a model. n tokens, h heads, c computations; D = d_model, d = d_head.

    All of them run under autograd with respect to their inputs, and change no input in place.
    """

    @property
    def graph(self) -> ResidualGraph: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def tables(self, layout: Layout) -> Tables:
        """Masks and position tables of a layout, computed once for each length among its prompts."""
        ...

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [prompt, pos] -> [node, prompt, pos, D], one for each embedding node of the graph, in its order."""
        ...

    def norm(self, layer: int, port: int, x: Tensor) -> Tensor:
        """The stream [n, D] as a head's q, k or v projection (`port` 0, 1, 2) reads it: normalised, [n, D]."""
        ...

    def shares_norm(self, layer: int) -> bool:
        """Whether q, k and v read the same normalised input."""
        ...

    def project(self, layer: int, port: int, y: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Normalised input [n, D] -> [n, h, d], before rotary and the like. For k and v, `heads` are key/value heads."""
        ...

    def prepare(self, layer: int, port: int, r: Tensor, tokens: Tensor, tables: Tables) -> Tensor:
        """Projections [n, h, d] -> [n, h, d] as attention reads them: norms within a head, rotary. `tokens` [n] are
        token numbers of the tables' layout; their positions decide the rotation."""
        ...

    def kv_head(self, head: int) -> int:
        """The key/value head that a query head reads."""
        ...

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        length: int,
        tables: Tables,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        """Attention of prepared q [c, s_q, h, d] over prepared k and v [c, s_k, h, d], one per query head, of the first
        s_k positions of a prompt of `length` tokens -> z [c, s_q, h, d]. `positions` [c, s_q]: where each query stands.
        `heads`: which query heads these are (None: all)."""
        ...

    def write(self, layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """z [n, h, d] -> [n, D]: what those heads together add to the stream, without the bias."""
        ...

    def attn_bias(self, layer: int) -> Tensor | None:
        """What attention adds besides its heads, [D], or None."""
        ...

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """The stream [n, D] -> [n, D]: what the MLP adds to it, biases included."""
        ...

    def unembed(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """The final stream [n, D] -> logits [n, d_vocab]; with `columns` (token ids [m]) only theirs, [n, m]."""
        ...


@dataclass(frozen=True)
class Matrix:
    """A linear map's weight [out, in] and bias [out], views of the model's own tensors."""

    weight: Tensor
    bias: Tensor | None

    def rows(self, first: Sequence[int], size: int) -> tuple[Tensor, Tensor | None]:
        """The rows `first[i] .. first[i] + size - 1` of each i: a view where they stand together, a copy where not."""
        runs = spans(first, size)
        return _cut(self.weight, runs, 0), None if self.bias is None else _cut(self.bias, runs, 0)


def _cut(x: Tensor, runs: Sequence[tuple[int, int]], dim: int) -> Tensor:
    parts = [x.narrow(dim, start, length) for start, length in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Attention:
    """The functions of one attention block, cut out of the trace."""

    def __init__(self, owner: TracedPieces, layer: Layer, index: int) -> None:
        structure, statics = owner.structure, owner.statics
        self.block: AttentionBlock = layer.attention
        self.d_head = self.block.d_head
        self.norms: list[fx.GraphModule | None] = []
        self.prepares: list[Region | None] = []
        self.projections: list[Matrix] = []
        inputs = [p.linear.args[0] for p in self.block.ports]
        self.shares_norm = inputs[0] is inputs[1] is inputs[2]
        for name, port in zip("qkv", self.block.ports, strict=True):
            source = inputs[len(self.norms)]
            norm = None
            if source is not layer.entry:
                made = region(structure, statics, source, [("x", layer.entry)], f"Layer{index}Norm_{name}")  # type: ignore[arg-type]
                need(
                    not made.statics,
                    "a normalisation that depends on more than the stream at each position",
                    source,
                )  # type: ignore[arg-type]
                norm = made.module
            self.norms.append(norm)
            self.projections.append(owner.matrix(port.linear))
            prepare = None
            if port.prepared is not port.head:
                axis = 1 if port.heads_last else 2
                prepare = region(
                    structure, statics, port.prepared, [("r", port.head)], f"Layer{index}Prepare_{name}", axis
                )
            self.prepares.append(prepare)
        operands = [(name, port.operand) for name, port in zip("qkv", self.block.ports, strict=True)]
        self.core = region(structure, statics, self.block.core, operands, f"Layer{index}Core", 2)
        out = owner.matrix(self.block.out)
        self.scale = _scale(owner, self.block)
        self.output = out.weight
        self.bias = out.bias if out.bias is None or self.scale is None else out.bias * self.scale


def _scale(owner: TracedPieces, block: AttentionBlock) -> Tensor | float | None:
    """The product of the factors between a block's output projection and the stream."""
    scale: Any = None
    for node in block.scales:
        factor = next(a for a in node.args if not (isinstance(a, fx.Node) and owner.structure.dynamic[a]))
        value = owner.constant(factor) if isinstance(factor, fx.Node) else factor
        value = 1 / value if node.target in (A.div.Tensor, A.div.Scalar) else value  # type: ignore[operator]
        scale = value if scale is None else scale * value
    return scale


class TracedPieces:
    """`Pieces` of a traced model. Gradients reach the inputs, not the weights."""

    def __init__(self, structure: Structure, graph: ResidualGraph) -> None:
        self.structure, self.graph = structure, graph
        self.statics = Statics(structure)
        # Regions read their weights from here: detached, so that autograd keeps nothing for gradients of weights.
        root = structure.exported.module
        self.weights = SimpleNamespace(
            **{
                n: p.detach()
                for n, p in (
                    *root.named_parameters(remove_duplicate=False),
                    *root.named_buffers(remove_duplicate=False),
                )
            }
        )
        embedding = structure.embed.meta["val"]
        self.dtype: torch.dtype = embedding.dtype
        self.device: torch.device = next(root.parameters()).device
        self._embeddings = [self._embedding(n) for n in structure.embeddings]
        self._attention = [_Attention(self, layer, i) for i, layer in enumerate(structure.layers)]
        self._mlps = [self._mlp(layer, i) for i, layer in enumerate(structure.layers)]
        self._unembed = Unembedding(self)
        self._static_module = statics_region(structure, self.statics).module
        self._by_length: dict[int, tuple[Tensor, ...]] = {}

    # ---- as modules
    @cached_property
    def _modules(self) -> PieceModules:
        return piece_modules(self.structure, self.statics)

    @property
    def modules(self) -> dict[str, fx.GraphModule]:
        """The pieces over whole sequences; `PieceModules` lists them."""
        return self._modules.modules

    @property
    def static_args(self) -> dict[str, tuple[int, ...]]:
        """Which members of what `modules["statics"]` returns follow a module's own arguments."""
        return self._modules.static_args

    # ---- taking apart
    def constant(self, node: fx.Node) -> Tensor:
        """A value that depends on weights alone, detached from them."""
        with torch.no_grad():
            value = evaluate(node, {}, self.structure.exported.module)
        return value.detach()

    def matrix(self, linear: fx.Node) -> Matrix:
        weight, *bias = linear.args[1:]
        return Matrix(self.constant(weight), self.constant(bias[0]) if bias and bias[0] is not None else None)  # type: ignore[arg-type]

    def _embedding(self, node: fx.Node) -> fx.GraphModule:
        emitter = Emitter(self.structure, self.statics, ["ids"])
        emitter.bind(self.structure.exported.ids, emitter.inputs[0])
        return emitter.finish(emitter.copy_writer(node), "Embedding").module

    def _mlp(self, layer: Layer, index: int) -> fx.GraphModule | None:
        if layer.mlp is None or layer.mlp_entry is None:
            return None
        made = region(self.structure, self.statics, layer.mlp, [("x", layer.mlp_entry)], f"Layer{index}Mlp")
        need(not made.statics, "an MLP that depends on more than the stream at each position", layer.mlp)
        return made.module

    # ---- tables
    def tables(self, layout: Layout) -> Tables:
        whole = {length: self._whole(length) for length in sorted(set(layout.lengths))}
        rows: dict[int, Tensor] = {}
        for number in self._row_statics():
            axis = self._pos_axis(number)
            rows[number] = torch.cat([whole[n][number] for n in layout.lengths], axis)
        return Tables(layout, rows, whole)

    def _whole(self, length: int) -> tuple[Tensor, ...]:
        """Every static as the model computes it for one prompt of that length."""
        if length not in self._by_length:
            ids = torch.zeros((1, length), dtype=torch.long, device=self.device)
            # Tables outlive the call: made under inference mode they could not be used under autograd later.
            with torch.inference_mode(False), torch.no_grad():
                self._by_length[length] = run(self._static_module, self.weights, ids)
        return self._by_length[length]

    def _row_statics(self) -> list[int]:
        return sorted({n for a in self._attention for p in a.prepares if p is not None for n in p.statics})

    def _pos_axis(self, number: int) -> int:
        """The one position axis of a static that a head's preparation reads, counted from the last."""
        node = self.statics.nodes[number]
        shape = shape_of(node)
        need(shape.count(self.structure.exported.pos) == 1, "a table with several position axes", node)
        return shape.index(self.structure.exported.pos) - len(shape)

    # ---- the interface
    def embed(self, ids: Tensor) -> Tensor:
        parts = [run(m, self.weights, ids) for m in self._embeddings]
        return torch.stack([p.expand(*ids.shape, p.shape[-1]) for p in parts])

    def norm(self, layer: int, port: int, x: Tensor) -> Tensor:
        module = self._attention[layer].norms[port]
        return x if module is None else run(module, self.weights, x[None])[0]

    def shares_norm(self, layer: int) -> bool:
        return self._attention[layer].shares_norm

    def project(self, layer: int, port: int, y: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        attention = self._attention[layer]
        first = attention.block.ports[port].first
        chosen = first if heads is None else [first[h] for h in heads]
        weight, bias = attention.projections[port].rows(chosen, attention.d_head)
        return F.linear(y, weight, bias).unflatten(-1, (len(chosen), attention.d_head))

    def prepare(self, layer: int, port: int, r: Tensor, tokens: Tensor, tables: Tables) -> Tensor:
        attention = self._attention[layer]
        prepare = attention.prepares[port]
        if prepare is None:
            return r
        statics = [tables.rows[n].index_select(self._pos_axis(n), tokens) for n in prepare.statics]
        x = r[None] if attention.block.ports[port].heads_last else r.transpose(0, 1)[None]
        return run(prepare.module, self.weights, x, *statics)[0].transpose(0, 1)

    def kv_head(self, head: int) -> int:
        return self.structure.layers[0].attention.kv_head[head]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        length: int,
        tables: Tables,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        core = self._attention[layer].core
        statics = [self._mask(n, positions, k.shape[1], tables.whole[length][n], heads) for n in core.statics]
        z = run(core.module, self.weights, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *statics)
        return z.transpose(1, 2)

    def _mask(
        self, number: int, positions: Tensor, s_k: int, mask: Tensor, heads: Sequence[int] | None
    ) -> Tensor:
        """A static of an attention core, right-aligned with [c, head, query, key], cut to these queries and keys."""
        shape, pos = shape_of(self.statics.nodes[number]), self.structure.exported.pos
        need(
            pos not in shape[:-2],
            "a mask with a position axis before the last two",
            self.statics.nodes[number],
        )
        if shape[-1:] == (pos,):
            mask = mask[..., :s_k]
        if mask.dim() >= 3 and heads is not None and mask.shape[-3] > 1:
            mask = mask[..., list(heads), :, :]
        if shape[-2:-1] != (pos,):
            return mask
        if (
            positions.stride(0) == 0 or positions.shape[0] == 1
        ):  # the same queries in every computation: one mask
            return mask.index_select(-2, positions[0])
        rows = mask.reshape(-1, *mask.shape[-2:])[:, positions]  # [head or 1, c, query, key]
        return rows.transpose(0, 1)

    def write(self, layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        attention = self._attention[layer]
        columns = attention.block.columns
        chosen = columns if heads is None else [columns[h] for h in heads]
        out = F.linear(z.flatten(-2), _cut(attention.output, spans(chosen, attention.d_head), 1))
        return out if attention.scale is None else out * attention.scale

    def attn_bias(self, layer: int) -> Tensor | None:
        return self._attention[layer].bias

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        module = self._mlps[layer]
        if module is None:
            raise ValueError(f"layer {layer} has no MLP")
        return run(module, self.weights, x[None])[0]

    def unembed(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return self._unembed(x, columns)


class Unembedding:
    """The final norm, the unembedding's rows that are asked for, and what is done to the logits after it."""

    def __init__(self, owner: TracedPieces) -> None:
        structure, statics = owner.structure, owner.statics
        self.weights, self.matrix = owner.weights, None
        logits = structure.exported.logits
        self.whole = region(structure, statics, logits, [("x", structure.final)], "Unembed").module
        linear = self._linear(logits)
        if linear is not None:
            self.matrix = owner.matrix(linear)
            self.norm = region(
                structure, statics, linear.args[0], [("x", structure.final)], "FinalNorm"
            ).module  # type: ignore[arg-type]
            self.after = region(structure, statics, logits, [("x", linear)], "AfterUnembed").module

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
            return run(self.whole, self.weights, x[None])[0]
        if self.matrix is None:
            return self(x, None).index_select(-1, columns)
        y = run(self.norm, self.weights, x[None])
        weight, bias = self.matrix.weight, self.matrix.bias
        bias = None if bias is None else bias.index_select(0, columns)
        return run(self.after, self.weights, F.linear(y, weight.index_select(0, columns), bias))[0]
