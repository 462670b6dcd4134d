"""A model taken apart: the functions from which any patched run is put together, on packed rows of tokens.

`Pieces` is what the other stages rely on, `TracedPieces` what tracing gives. Rows are tokens of any prompts
in any order; weights are views of the model's own. For the same pieces as readable GraphModules see
`piece_modules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from patchc.ir.graph import PORTS, ResidualGraph
from patchc.ir.tokens import Layout
from patchc.model.emit import Statics, spans, statics_region
from patchc.model.inside import NOT_TAKEN_APART
from patchc.model.nodes import dtype_of, need, shape_of
from patchc.model.parts import AttentionParts, NeuronParts, Parts, Unembedding, cut
from patchc.model.piece_modules import PieceModules, piece_modules, write_module
from patchc.model.trace import Structure


@dataclass(frozen=True)
class Tables:
    """What the pieces need of a layout besides the stream: rotary rows, masks. Opaque to callers."""

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
        """Token ids [prompt, pos] -> [node, prompt, pos, D]: the graph's embedding nodes, in its order."""
        ...

    def norm(self, layer: int, port: int, x: Tensor) -> Tensor:
        """The stream [n, D] as a head's q, k or v (`port` 0, 1, 2) reads it: normalised, [n, D]."""
        ...

    def shares_norm(self, layer: int) -> bool:
        """Whether q, k and v read the same normalised input."""
        ...

    def project(self, layer: int, port: int, y: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Normalised [n, D] -> [n, h, d], before rotary and the like; after a norm over all heads, where there is one.
        For k and v, `heads` are key/value heads."""
        ...

    def prepare(self, layer: int, port: int, r: Tensor, tokens: Tensor, tables: Tables) -> Tensor:
        """Projections [n, h, d] -> [n, h, d] as attention reads them: norms within a head, rotary. `tokens`
        [n] are token numbers of the tables' layout; their positions decide the rotation."""
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
        """Attention of prepared q [c, s_q, h, d] over prepared k and v [c, s_k, h, d], one per query head, of
        the first s_k positions of a prompt of `length` tokens -> z [c, s_q, h, d]. `positions` [c, s_q]:
        where each query stands. `heads`: which query heads these are (None: all)."""
        ...

    def scores(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        length: int,
        tables: Tables,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        """The scores [c, h, s_q, s_k] whose softmax is the pattern that `attend` mixes values by; minus infinity where
        the mask hides. Arguments as for `attend`. Error: `no-inside`."""
        ...

    def masks_by_head(self, layer: int) -> bool:
        """Whether a mask of the layer differs from head to head."""
        ...

    def write(self, layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """z [n, h, d] -> [n, D]: what those heads together write, without the bias and before a post-norm."""
        ...

    def attn_bias(self, layer: int) -> Tensor | None:
        """What attention writes besides its heads, [D], before a post-norm; or None."""
        ...

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        """What a layer's heads and bias write together [n, D] -> [n, D]: what is added to the stream. Only of layers
        whose attention block has `post_norm`; elsewhere it is `x`."""
        ...

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """The stream [n, D] -> [n, D]: what the MLP adds to it, biases included."""
        ...

    def mlp_post(self, layer: int, x: Tensor) -> Tensor:
        """The stream [n, D] -> [n, d_mlp]: the MLP's neurons as its output matrix reads them. Error: `no-inside`."""
        ...

    def mlp_down(self, layer: int, post: Tensor) -> Tensor:
        """Neurons [n, d_mlp] -> [n, D]: what the MLP adds to the stream, biases included."""
        ...

    def neurons(self, layer: int, post: Tensor, neurons: Sequence[int]) -> Tensor:
        """Some neurons [n, m] -> [n, D]: what they together add to the stream, without the bias. Only where they add
        up."""
        ...

    def neurons_add_up(self, layer: int) -> bool:
        """Whether an MLP adds the sum of what its neurons write, as it does unless a post-norm follows."""
        ...

    def unembed(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """The final stream [n, D] -> logits [n, d_vocab]; only those of `columns` (token ids [m]), if given."""
        ...


class TracedPieces:
    """`Pieces` of a traced model. Gradients reach the inputs, not the weights."""

    def __init__(self, structure: Structure, graph: ResidualGraph) -> None:
        self.structure, self.graph = structure, graph
        self.statics = Statics(structure)
        self._parts = Parts(structure, self.statics)
        self.dtype: torch.dtype = dtype_of(structure.embed)
        self.device: torch.device = next(structure.exported.module.parameters()).device
        self._embeddings = [self._parts.embedding(n) for n in structure.embeddings]
        self._attention = [AttentionParts(self._parts, x, i) for i, x in enumerate(structure.layers)]
        self._mlps = [self._parts.mlp(x, i) for i, x in enumerate(structure.layers)]
        self._neurons = [self._parts.neurons(x, structure.neurons[i], i) for i, x in enumerate(structure.layers)]
        self._unembed = Unembedding(self._parts)
        self._statics = statics_region(structure, self.statics).module
        self.not_apart: dict[tuple[str, int], str] = {
            ("neurons", i): "its output is not one linear map of its neurons"
            for i, x in enumerate(structure.layers)
            if x.mlp is not None and self._neurons[i] is None
        }
        """Why ("scores" or "neurons", layer) cannot be had, though the whole node can."""
        self._by_length: dict[int, tuple[Tensor, ...]] = {}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every weight that the pieces read, by its name in their modules: views of the model's own, detached."""
        return vars(self._parts.weights)

    @property
    def copied(self) -> dict[str, int]:
        """Bytes of weights that the pieces hold beside the model's own tensors, by the module they belong to. What a
        call gathers and gives back, as the rows of heads that do not stand together, is none of it."""
        return dict(self._parts.copied)

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

    def norm_module(self, layer: int, port: int) -> str | None:
        """The name of the module that gives what a head's q, k or v reads; None where it reads the stream itself."""
        return self._modules.norm(layer, PORTS[port])

    def write_module(self, layer: int, heads: Sequence[int]) -> fx.GraphModule:
        """z [b, s, some heads, d] -> [b, s, those heads, D], what each writes."""
        block = self.structure.layers[layer].attention
        return write_module(self.structure, self.statics, block, f"Layer{layer}Write", heads).module

    # ---- tables
    def tables(self, layout: Layout) -> Tables:
        whole = {length: self._whole(length) for length in sorted(set(layout.lengths))}
        rows = {
            number: torch.cat([whole[n][number] for n in layout.lengths], self._pos_axis(number))
            for number in self._row_statics
        }
        return Tables(layout, rows, whole)

    def _whole(self, length: int) -> tuple[Tensor, ...]:
        """Every static as the model computes it for one prompt of that length."""
        if length not in self._by_length:
            ids = torch.zeros((1, length), dtype=torch.long, device=self.device)
            # Tables outlive the call: made under inference mode they could not be used under autograd later.
            with torch.inference_mode(False), torch.no_grad():
                self._by_length[length] = self._parts.run(self._statics, ids)
        return self._by_length[length]

    @cached_property
    def _row_statics(self) -> list[int]:
        """The statics that are read token by token."""
        return sorted({n for a in self._attention for p in a.prepares if p is not None for n in p.statics})

    def _pos_axis(self, number: int) -> int:
        """The one position axis of a static that a head's preparation reads, counted from the last."""
        node = self.statics.nodes[number]
        shape = shape_of(node)
        need(shape.count(self.structure.exported.pos) == 1, "a table with several position axes", node)
        return shape.index(self.structure.exported.pos) - len(shape)

    # ---- the interface
    def embed(self, ids: Tensor) -> Tensor:
        parts = [self._parts.run(m, ids) for m in self._embeddings]
        return torch.stack([p.expand(*ids.shape, p.shape[-1]) for p in parts])

    def norm(self, layer: int, port: int, x: Tensor) -> Tensor:
        module = self._attention[layer].norms[port]
        return x if module is None else self._parts.run(module, x[None])[0]

    def shares_norm(self, layer: int) -> bool:
        return self._attention[layer].shares_norm

    def project(self, layer: int, port: int, y: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        attention = self._attention[layer]
        d_head, first = self.graph.d_head, attention.block.ports[port].first
        chosen = first if heads is None else [first[h] for h in heads]
        matrix, across = attention.projections[port], attention.across[port]
        if across is None:
            return F.linear(y, *matrix.rows(chosen, d_head)).unflatten(-1, (len(chosen), d_head))
        whole = self._parts.run(across, F.linear(y, matrix.weight, matrix.bias)[None])[0]
        return cut(whole, spans(chosen, d_head), -1).unflatten(-1, (len(chosen), d_head))

    def prepare(self, layer: int, port: int, r: Tensor, tokens: Tensor, tables: Tables) -> Tensor:
        attention = self._attention[layer]
        prepare = attention.prepares[port]
        if prepare is None:
            return r
        tokens = tokens.to(self.device)
        statics = [tables.rows[n].index_select(self._pos_axis(n), tokens) for n in prepare.statics]
        x = r[None] if attention.block.ports[port].heads_last else r.transpose(0, 1)[None]
        return self._parts.run(prepare.module, x, *statics)[0].transpose(0, 1)

    @property
    def prepares(self) -> bool:
        """Whether attention takes q, k or v otherwise than as they are projected."""
        return any(p is not None for a in self._attention for p in a.prepares)

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
        whole = tables.whole[length]
        statics = [self._mask(n, whole[n], positions, k.shape[1], heads) for n in core.statics]
        z = self._parts.run(core.module, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *statics)
        return z.transpose(1, 2)

    def scores(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        positions: Tensor,
        length: int,
        tables: Tables,
        heads: Sequence[int] | None = None,
    ) -> Tensor:
        self.need_apart("scores", layer)
        region, whole = self._attention[layer].scores, tables.whole[length]
        statics = [self._mask(n, whole[n], positions, k.shape[1], heads) for n in region.statics]
        return self._parts.run(region.module, q.transpose(1, 2), k.transpose(1, 2), *statics)

    def need_apart(self, what: str, layer: int) -> None:
        """Raise `no-inside` where the "scores" or "neurons" of a layer cannot be had."""
        if why := self.not_apart.get((what, layer)):
            node = f"head[{layer}, *]" if what == "scores" else f"mlp[{layer}]"
            raise NOT_TAKEN_APART.error(f"the {what} inside `{node}` cannot be had from {self.graph.model}: {why}")

    def _mask(self, number: int, mask: Tensor, positions: Tensor, s_k: int, heads: Sequence[int] | None) -> Tensor:
        """A static of an attention core, right-aligned with [c, head, query, key], for these queries and keys."""
        node, pos = self.statics.nodes[number], self.structure.exported.pos
        shape = shape_of(node)
        need(pos not in shape[:-2], "a mask with a position axis before the last two", node)
        if shape[-1:] == (pos,):
            mask = mask[..., :s_k]
        if mask.dim() >= 3 and heads is not None and mask.shape[-3] > 1:
            mask = mask[..., list(heads), :, :]
        if shape[-2:-1] != (pos,):
            return mask
        if positions.stride(0) == 0 or positions.shape[0] == 1:  # every computation has the same queries
            return mask.index_select(-2, positions[0])
        rows = mask.reshape(-1, *mask.shape[-2:])[:, positions]  # [head or 1, c, query, key]
        return rows.transpose(0, 1)

    def masks_by_head(self, layer: int) -> bool:
        shapes = (shape_of(self.statics.nodes[n]) for n in self._attention[layer].core.statics)
        return any(len(shape) >= 3 and shape[-3] != "1" for shape in shapes)

    def write(self, layer: int, z: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        attention = self._attention[layer]
        columns = attention.block.columns
        chosen = columns if heads is None else [columns[h] for h in heads]
        out = F.linear(z.flatten(-2), attention.output.columns(chosen, self.graph.d_head))
        return out if attention.scale is None else out * attention.scale

    def attn_bias(self, layer: int) -> Tensor | None:
        return self._attention[layer].bias

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        module = self._attention[layer].post_norm
        return x if module is None else self._parts.run(module, x[None])[0]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        module = self._mlps[layer]
        if module is None:
            raise ValueError(f"layer {layer} has no MLP")
        return self._parts.run(module, x[None])[0]

    def mlp_post(self, layer: int, x: Tensor) -> Tensor:
        return self._parts.run(self._hidden(layer).up, x[None])[0]

    def mlp_down(self, layer: int, post: Tensor) -> Tensor:
        return self._parts.run(self._hidden(layer).down, post[None])[0]

    def neurons(self, layer: int, post: Tensor, neurons: Sequence[int]) -> Tensor:
        write = self._hidden(layer).write
        if write is None:
            raise ValueError(f"what MLP {layer} writes is not the sum of what its neurons write")
        matrix, scale = write
        out = F.linear(post, matrix.columns(neurons, 1))
        return out if scale is None else out * scale

    def neurons_add_up(self, layer: int) -> bool:
        return self._hidden(layer).write is not None

    def _hidden(self, layer: int) -> NeuronParts:
        self.need_apart("neurons", layer)
        hidden = self._neurons[layer]
        if hidden is None:
            raise ValueError(f"layer {layer} has no MLP")
        return hidden

    def unembed(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return self._unembed(x, columns)
