"""The residual structure of a canonical graph: what writes into the stream, in which order, reading what.

Found from the tree of additions above the logits, with no knowledge of any architecture. Refuses, with the
place, whatever is not a chain of writers that read the whole sum before them. Turning it into functions is
`pieces`' work.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from patchc.ir.graph import ResidualGraph, residual_graph
from patchc.model.attention import AttentionBlock, AttentionReader
from patchc.model.export import Exported
from patchc.model.nodes import SDPA, SOFTMAX, A, cone, need, op_name, path_of, place, shape_of
from patchc.model.outputs import Neurons, neurons_of
from patchc.model.positions import check_positions, listed

ADD = A.add.Tensor
NORMS = {A.layer_norm.default, A.rms_norm.default}


@dataclass(frozen=True)
class Layer:
    """An attention block and maybe an MLP: `mlp` is what it adds, `mlp_entry` the stream it reads. `listed`: the MLP
    works on a list of tokens, as experts do, and only trying can show that it keeps them apart."""

    attention: AttentionBlock
    entry: fx.Node
    mlp: fx.Node | None = None
    mlp_entry: fx.Node | None = None
    listed: bool = False

    @property
    def parallel(self) -> bool:
        return self.mlp_entry is self.entry


@dataclass(frozen=True)
class Structure:
    """A model as its residual stream sees it. `pos_embed` does not depend on the tokens' values; `final` is
    the stream that the logits read, `dynamic` says which nodes depend on the stream, `tree` which nodes are
    sums of it."""

    exported: Exported
    embed: fx.Node
    pos_embed: fx.Node | None
    layers: tuple[Layer, ...]
    final: fx.Node
    dynamic: dict[fx.Node, bool]
    tree: frozenset[fx.Node]

    @property
    def embeddings(self) -> tuple[fx.Node, ...]:
        return (self.embed,) if self.pos_embed is None else (self.embed, self.pos_embed)

    @cached_property
    def neurons(self) -> tuple[Neurons | None, ...]:
        """Each layer's MLP from its hidden layer on; None without one, or where its output is no linear map of one."""
        return tuple(
            None
            if layer.mlp is None or layer.mlp_entry is None
            else neurons_of(layer.mlp, layer.mlp_entry, self.dynamic, self.tree)
            for layer in self.layers
        )

    @property
    def d_mlp(self) -> int:
        """The width of the MLPs' hidden layer, 0 where there is none."""
        return next((n.width for n in self.neurons if n is not None), 0)

    def graph(self, name: str, n_ctx: int, causal: bool) -> ResidualGraph:
        """The names and numbers of this structure."""
        first = self.layers[0].attention
        return residual_graph(
            name,
            n_layers=len(self.layers),
            n_heads=first.n_heads,
            n_kv_heads=first.n_kv_heads,
            d_model=int(shape_of(self.final)[-1]),
            d_head=first.d_head,
            d_vocab=int(shape_of(self.exported.logits)[-1]),
            d_mlp=self.d_mlp,
            n_ctx=n_ctx,
            has_pos_embed=self.pos_embed is not None,
            has_mlp=tuple(layer.mlp is not None for layer in self.layers),
            has_attn_bias=tuple(len(layer.attention.output.linear.args) > 2 for layer in self.layers),
            parallel=any(layer.parallel for layer in self.layers),
            causal=causal,
            post_norm=first.output.post_norm,
            neurons_add_up=not any(n is not None and n.output.post_norm for n in self.neurons),
        )


def trace(exported: Exported) -> Structure:
    """The residual structure of a graph."""
    return Tracer(exported).structure()


class Tracer:
    """Flattens the residual additions and reads what each of their leaves is."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.order = {n: i for i, n in enumerate(exported.nodes)}
        self.leaves_of: dict[fx.Node, list[fx.Node]] = {}
        top = self._top()
        self.d_model = shape_of(top)[-1]
        self.leaves = sorted(self._flatten(top), key=self.order.__getitem__)
        self.tree = set(self.leaves_of)
        self._each_leaf_once()
        self.dynamic: dict[fx.Node, bool] = {}
        for n in exported.nodes:
            self.dynamic[n] = n in self.tree or any(self.dynamic[a] for a in n.all_input_nodes)
        self.reader = AttentionReader(exported, self.dynamic, self.tree)

    # ---- the tree of additions
    def _is_stream(self, node: object) -> bool:
        shape = shape_of(node)
        return len(shape) == 3 and shape[0] in (self.exported.batch, "1") and shape[1] == self.exported.pos

    def _is_sum(self, node: fx.Node) -> bool:
        return (
            node.target is ADD
            and all(self._is_stream(a) for a in node.args)
            and len({shape_of(a)[-1] for a in node.args}) == 1
        )

    def _top(self) -> fx.Node:
        """The last addition to the stream below the logits."""
        above = cone(self.exported.logits)
        found = next((n for n in reversed(self.exported.nodes) if n in above and self._is_sum(n)), None)
        need(found is not None, "nothing is added to a residual stream")
        assert found is not None
        return found

    def _flatten(self, node: fx.Node) -> list[fx.Node]:
        """The leaves that a node of the tree sums, lowest first."""
        todo = [node]
        while todo:
            n = todo[-1]
            if n in self.leaves_of:
                todo.pop()
            elif not (self._is_sum(n) and shape_of(n)[-1] == shape_of(node)[-1]):
                self.leaves_of[n] = [n]
            elif missing := [a for a in n.all_input_nodes if a not in self.leaves_of]:
                todo += missing
            else:
                need(n.kwargs.get("alpha", 1) == 1, "a scaled addition to the stream", n)
                self.leaves_of[n] = [leaf for a in n.args for leaf in self.leaves_of[a]]  # type: ignore[index]
        return self.leaves_of[node]

    def _each_leaf_once(self) -> None:
        for a, b in zip(self.leaves, self.leaves[1:], strict=False):
            need(a is not b, "a writer is added to the stream twice", a)

    def _entry(self, node: fx.Node) -> fx.Node:
        """The one sum of the stream that a node is computed from."""
        read = [m for m in cone(node, self.tree) if m in self.tree and m is not node]
        need(len(read) == 1, f"a part reads {len(read)} different states of the stream", node)
        return read[0]

    # ---- the leaves
    def structure(self) -> Structure:
        written: list[fx.Node] = []
        embed = pos_embed = None
        layers: list[Layer] = []
        for leaf in self.leaves:
            inside = cone(leaf, self.tree)
            if not any(n in self.tree and n is not leaf for n in inside):
                need(not layers, "an embedding is added above the first layer", leaf)
                if self._reads_tokens(leaf):
                    need(embed is None, "a second token embedding", leaf)
                    embed = leaf
                else:
                    need(pos_embed is None, "a second position embedding", leaf)
                    pos_embed = leaf
            elif self.reader.cores(inside):
                layers.append(self._attention(leaf, written))
            else:
                need(layers, "an MLP below the first attention", leaf)
                layers[-1] = self._mlp(layers[-1], leaf, written)
            written.append(leaf)
        need(embed is not None, "no token embedding writes into the stream")
        need(layers, "no attention writes into the stream")
        assert embed is not None
        self._same_shape(layers)
        self._layers_match_modules(layers)
        final = self._entry(self.exported.logits)
        self._reads_all(final, written, self.exported.logits)
        self._positions_apart(layers, {n for n in (embed, pos_embed) if n is not None})
        return Structure(self.exported, embed, pos_embed, tuple(layers), final, self.dynamic, frozenset(self.tree))

    def _reads_tokens(self, leaf: fx.Node) -> bool:
        """Whether an embedding depends on the tokens' values. Refuses one that holds anything but a look-up."""
        inside = cone(leaf)
        if layer := self._layer_inside(leaf):
            # Otherwise a scaled, subtracted or normalised stream would vanish, layers and all, into an
            # "embedding".
            changing = self._changes_all()
            post = ", as where the stream itself is normalised" if changing.target in NORMS else ""
            need(
                False,
                f"the stream is not a plain sum of writers: {place(changing)} changes all of it{post}, "
                "from the layers below",
                layer,
            )
        need(
            any(n.target is A.embedding.default for n in inside),
            "a write that reads neither the stream nor an embedding",
            leaf,
        )
        return any(u in inside and u.target is not A.sym_size.int for u in self.exported.ids.users)

    def _layer_inside(self, leaf: fx.Node) -> fx.Node | None:
        """The first operation of a layer that a leaf is computed from without reading the stream."""
        inside = sorted(cone(leaf, self.tree), key=self.order.__getitem__)
        if any(n in self.tree and n is not leaf for n in inside):
            return None
        layers = {SDPA, A.linear.default, A.matmul.default} | SOFTMAX
        return next((n for n in inside if n.target in layers), None)

    def _changes_all(self) -> fx.Node:
        """The leaf that holds layers instead of an embedding; a linear one among them only reads what another made."""
        found = [leaf for leaf in self.leaves if self._layer_inside(leaf) is not None]
        return next((leaf for leaf in found if leaf.target is not A.linear.default), found[0])

    def _reads_all(self, entry: fx.Node, written: Sequence[fx.Node], reader: fx.Node) -> None:
        have, want = set(self.leaves_of[entry]), set(written)
        if have != want:
            missing = min(want ^ have, key=self.order.__getitem__)
            where = path_of(reader) or op_name(reader)
            need(False, f"what `{where}` reads is not the sum of every writer before it; it differs by", missing)

    def _attention(self, leaf: fx.Node, written: Sequence[fx.Node]) -> Layer:
        block = self.reader.read(leaf)
        entries = [self._entry(port.linear) for port in block.ports]
        for entry, port in zip(entries, block.ports, strict=True):
            self._reads_all(entry, written, port.linear)
        return Layer(block, entries[0])

    def _mlp(self, layer: Layer, leaf: fx.Node, written: Sequence[fx.Node]) -> Layer:
        need(layer.mlp is None, "a second MLP in one layer", leaf)
        entry = self._entry(leaf)
        if entry is not layer.entry:
            self._reads_all(entry, written, leaf)
        layer = replace(layer, mlp=leaf, mlp_entry=entry)
        return replace(layer, listed=bool(self._listed(layer)))

    def _listed(self, layer: Layer) -> set[fx.Node]:
        """What a layer's MLP does with a list of tokens."""
        if layer.mlp is None or layer.mlp_entry is None:
            return set()
        region = cone(layer.mlp, {layer.mlp_entry}) - {layer.mlp_entry}
        return listed(self.exported, region, self.dynamic)

    # ---- all layers together
    def _positions_apart(self, layers: Sequence[Layer], inside: set[fx.Node]) -> None:
        """Only the attention cores may mix positions; `inside` starts as the look-ups."""
        for layer in layers:
            prepared = {port.prepared for port in layer.attention.ports}
            inside |= cone(layer.attention.core, prepared) - prepared
            inside |= self._listed(layer) if layer.listed else set()
        check_positions(self.exported, set(self.exported.nodes) - inside, self.dynamic)

    def _same_shape(self, layers: Sequence[Layer]) -> None:
        first = layers[0]
        for layer in layers:
            a, b = layer.attention, first.attention
            same = (a.n_heads, a.n_kv_heads, a.d_head) == (b.n_heads, b.n_kv_heads, b.d_head)
            need(same, "a layer with other heads than the first", a.leaf)
            normed = a.output.post_norm == b.output.post_norm
            need(normed, "a norm after attention that not every layer has", a.leaf)
            need(
                layer.mlp is None or layer.parallel == any(x.parallel for x in layers),
                "some layers run their MLP beside attention, some after it",
                a.leaf,
            )

    def _layers_match_modules(self, layers: Sequence[Layer]) -> None:
        """Where modules are numbered, the numbers grow with the layers and an MLP has its attention's."""
        seen = [_number(layer.attention.leaf) for layer in layers]
        for layer, number in zip(layers, seen, strict=True):
            if number is not None and layer.mlp is not None:
                need(
                    _number(layer.mlp) in (None, number),
                    "an MLP in another block than the attention before it",
                    layer.mlp,
                )
        numbers = [n for n in seen if n is not None]
        need(
            numbers == sorted(set(numbers)),
            "the layers do not run in their modules' order",
            layers[0].attention.leaf,
        )


def _number(leaf: fx.Node) -> int | None:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", path_of(leaf))
    return int(found[1]) if found else None
