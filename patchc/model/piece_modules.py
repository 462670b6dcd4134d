"""The pieces of a model as GraphModules over whole sequences, to be put together into one readable graph.

Only ATen operations, `getitem` and the model's own parameters stand in them. The same pieces on packed rows,
which sweeps run on, are `model.pieces`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from patchc.model.attention import AttentionBlock, Port
from patchc.model.emit import Emitter, Region, Statics, region, spans, statics_region
from patchc.model.inside import emit_scores
from patchc.model.nodes import A, need, shape_of
from patchc.model.trace import Layer, Structure


@dataclass(frozen=True)
class PieceModules:
    """Modules by name. b prompts of s tokens each; D = d_model, d = d_head; `l` a layer.

    statics(ids [b, s]) -> tuple
    embed(ids) -> [b, s, D];  pos_embed(ids) -> [b or 1, s, D]
    layer{l}_norm(x [b, s, D]) -> y [b, s, D]        what q, k and v read; one each, `layer{l}_norm_q` and so on, where
                                                     they read different things; none where they read the stream itself
    layer{l}_q, _k, _v(y) -> [b, s, heads or key/value heads, d], before rotary and the like; after a norm over all
                                                     heads, where there is one
    layer{l}_q_by_head, _k_, _v_(y [heads, b, s, D]) -> [b, s, heads, d], of an input for each query head
    layer{l}_attend(q, k, v) -> z [b, s, heads, d]   from those, k and v repeated to one per query head
    layer{l}_attn(z) -> [b, s, D], what heads and bias write together
    layer{l}_post_norm(x [b, s, D]) -> [b, s, D]     from that to what is added to the stream; none where it is the same
    layer{l}_write(z) -> [b, s, heads, D]            layer{l}_attn_bias() -> [D], where there is one
    layer{l}_scores(q, k) -> [b, heads, query, key]  minus infinity where the mask hides
    layer{l}_mix(pattern, v) -> z [b, s, heads, d]   a pattern [b, heads, query, key] applied to values
    layer{l}_mlp_post(x) -> [b, s, d_mlp]            layer{l}_mlp_down(post) -> [b, s, D]
    layer{l}_mlp(x) -> [b, s, D]                     unembed(x) -> [b, s, d_vocab]

    `static_args[name]`: which members of the statics' tuple follow a module's own arguments.
    """

    modules: dict[str, fx.GraphModule]
    static_args: dict[str, tuple[int, ...]]

    def norm(self, layer: int, port: str) -> str | None:
        """The name of the module that gives what a port reads; None where it reads the stream itself."""
        names = (f"layer{layer}_norm", f"layer{layer}_norm_{port}")
        return next((name for name in names if name in self.modules), None)


def piece_modules(structure: Structure, statics: Statics) -> PieceModules:
    """The modules of a structure."""
    known = len(statics.nodes)
    regions = {"embed": _embedding(structure, statics, structure.embed, "Embed")}
    if structure.pos_embed is not None:
        regions["pos_embed"] = _embedding(structure, statics, structure.pos_embed, "PosEmbed")
    for i, layer in enumerate(structure.layers):
        made = _layer(structure, statics, layer, f"Layer{i}")
        if (neurons := structure.neurons[i]) is not None and layer.mlp is not None and layer.mlp_entry is not None:
            made["mlp_post"] = region(structure, statics, neurons.post, [("x", layer.mlp_entry)], f"Layer{i}MlpPost")
            made["mlp_down"] = region(structure, statics, layer.mlp, [("post", neurons.post)], f"Layer{i}MlpDown")
        regions |= {f"layer{i}_{name}": region for name, region in made.items()}
    unembed = region(structure, statics, structure.exported.logits, [("x", structure.final)], "Unembed")
    need(len(statics.nodes) == known, "a table that only some pieces read", structure.exported.logits)
    regions |= {"unembed": unembed, "statics": statics_region(structure, statics)}
    return PieceModules(
        {name: made.module for name, made in regions.items()},
        {name: made.statics for name, made in regions.items()},
    )


def _embedding(structure: Structure, statics: Statics, node: fx.Node, name: str) -> Region:
    emitter = Emitter(structure, statics, ["ids"])
    emitter.bind(structure.exported.ids, emitter.inputs[0])
    return emitter.finish(emitter.copy_writer(node), name)


def _layer(structure: Structure, statics: Statics, layer: Layer, name: str) -> dict[str, Region]:
    block = layer.attention
    out = _norms(structure, statics, layer, name)
    for port_name, port in zip("qkv", block.ports, strict=True):
        out[port_name] = _projection(structure, statics, layer, port, f"{name}{port_name.upper()}")
        out[f"{port_name}_by_head"] = _by_head(structure, statics, block, port, f"{name}{port_name.upper()}ByHead")
    out["attend"] = _attend(structure, statics, block, f"{name}Attend")
    out["scores"] = _scores(structure, statics, block, f"{name}Scores")
    out["mix"] = _mix(structure, statics, block, f"{name}Mix")
    out["write"] = write_module(structure, statics, block, f"{name}Write")
    out["attn"] = _whole_output(structure, statics, block, f"{name}Attn")
    if len(block.output.linear.args) > 2:
        out["attn_bias"] = _bias(structure, statics, block, f"{name}AttnBias")
    if block.output.post_norm:
        out["post_norm"] = region(structure, statics, block.leaf, [("x", block.output.linear)], f"{name}PostNorm")
    if layer.mlp is not None and layer.mlp_entry is not None:
        out["mlp"] = region(structure, statics, layer.mlp, [("x", layer.mlp_entry)], f"{name}Mlp")
    return out


def _norms(structure: Structure, statics: Statics, layer: Layer, name: str) -> dict[str, Region]:
    """What stands between the stream and each port; one for all where they read the same."""
    sources = [port.linear.args[0] for port in layer.attention.ports]
    shared = len(set(sources)) == 1
    names = ("norm",) if shared else ("norm_q", "norm_k", "norm_v")
    return {
        n: region(structure, statics, source, [("x", layer.entry)], f"{name}{n.title().replace('_', '')}")
        for n, source in zip(names, sources, strict=False)
        if isinstance(source, fx.Node) and source is not layer.entry
    }


def _projection(structure: Structure, statics: Statics, layer: Layer, port: Port, name: str) -> Region:
    emitter = Emitter(structure, statics, ["y"])
    d_head = layer.attention.d_head
    if port.normed:
        whole = _across(emitter, port, emitter.inputs[0])
        whole = _cut(emitter, whole, port.first, d_head, 2)
        return emitter.finish(emitter.call(A.unflatten.int, whole, -1, [len(port.first), d_head]), name)
    rows = [_cut(emitter, emitter.copy(w), port.first, d_head, 0) for w in _weights(port)]
    projected = emitter.call(A.linear.default, emitter.inputs[0], *rows)
    return emitter.finish(emitter.call(A.unflatten.int, projected, -1, [len(port.first), d_head]), name)


def _across(emitter: Emitter, port: Port, y: fx.Node) -> fx.Node:
    """A projection of `y` [..., pos, D] with the norm over all its heads, [..., pos, width]."""
    weights = [emitter.copy(w) for w in _weights(port)]
    emitter.bind(port.linear, emitter.call(A.linear.default, y, *weights))
    return emitter.copy(port.whole)


def _weights(port: Port) -> list[fx.Node]:
    """A projection's weight, and its bias if it has one."""
    return [w for w in port.linear.args[1:] if isinstance(w, fx.Node)]


def _by_head(structure: Structure, statics: Statics, block: AttentionBlock, port: Port, name: str) -> Region:
    """k = key/value head, g = query head among those that share it, d = d_head, m = d_model."""
    if port.normed:
        return _normed_by_head(structure, statics, block, port, name)
    emitter = Emitter(structure, statics, ["y"])
    n = len(port.first)
    y = emitter.call(A.unflatten.int, emitter.inputs[0], 0, [n, block.n_heads // n])
    weight, *bias = (_parts(emitter, emitter.copy(w), port.first, block.d_head, w) for w in _weights(port))
    out = emitter.call(A.einsum.default, "kgbsm,kdm->bskgd", [y, weight])
    if bias:
        out = emitter.call(A.add.Tensor, out, emitter.call(A.unsqueeze.default, bias[0], 1))
    return emitter.finish(emitter.call(A.flatten.using_ints, out, 2, 3), name)


def _normed_by_head(structure: Structure, statics: Statics, block: AttentionBlock, port: Port, name: str) -> Region:
    """The same where every head's projection reads all of them: from each head's input all are computed, and its own
    kept."""
    emitter = Emitter(structure, statics, ["y"])
    n = len(port.first)
    emitter.sized = emitter.call(A.flatten.using_ints, emitter.inputs[0], 0, 1)
    every = _cut(emitter, _across(emitter, port, emitter.sized), port.first, block.d_head, 2)
    every = emitter.call(A.unflatten.int, every, -1, [n, block.d_head])
    every = emitter.call(A.unflatten.int, every, 0, [n, block.n_heads // n, -1])  # kgbskd
    own = emitter.call(A.permute.default, emitter.call(A.diagonal.default, every, 0, 0, 4), [1, 2, 4, 0, 3])
    return emitter.finish(emitter.call(A.flatten.using_ints, own, 2, 3), name)


def _parts(emitter: Emitter, x: fx.Node, first: Sequence[int], size: int, old: fx.Node) -> fx.Node:
    """The parts of `size` rows that start at `first`, `[part, row, ...]`: a view where they stand at equal
    distances."""
    n_rows = int(shape_of(old)[0])
    step = first[1] - first[0] if len(first) > 1 else size
    offset = first[0] % step if step > 0 else 0
    regular = step > 0 and all(b - a == step for a, b in pairwise(first))
    if regular and n_rows % step == 0 and offset + size <= step:
        x = emitter.call(A.unflatten.int, x, 0, [n_rows // step, step])
        x = emitter.call(A.narrow.default, x, 0, first[0] // step, len(first))
        return emitter.call(A.narrow.default, x, 1, offset, size)
    return emitter.call(A.unflatten.int, _cut(emitter, x, first, size, 0), 0, [len(first), size])


def _cut(emitter: Emitter, x: fx.Node, first: Sequence[int], size: int, dim: int) -> fx.Node:
    """The parts of `size` that start at `first`, along `dim`; `x` itself where that is all of it."""
    parts = [emitter.call(A.narrow.default, x, dim, *span) for span in spans(first, size)]
    return parts[0] if len(parts) == 1 else emitter.call(A.cat.default, parts, dim)


def _attend(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    needs = [(port.prepared, [port.head]) for port in block.ports]
    operands = [port.operand for port in block.ports]
    emitter = Emitter(structure, statics, ["q", "k", "v"], [*needs, (block.core, operands)])
    for given, port in zip(emitter.inputs, block.ports, strict=True):
        emitter.bind(port.operand, _prepared(emitter, port, given))
    return emitter.finish(emitter.call(A.transpose.int, emitter.copy(block.core), 1, 2), name)


def _scores(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    ports = block.ports[:2]
    needs = [(port.prepared, [port.head]) for port in ports]
    emitter = Emitter(structure, statics, ["q", "k"], [*needs, (block.core, [p.operand for p in block.ports])])
    operands = [_prepared(emitter, port, given) for port, given in zip(ports, emitter.inputs, strict=True)]
    return emitter.finish(emit_scores(emitter, block, operands[0], operands[1]), name)


def _mix(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    values = block.ports[2]
    emitter = Emitter(structure, statics, ["pattern", "v"], [(values.prepared, [values.head])])
    z = emitter.call(A.matmul.default, emitter.inputs[0], _prepared(emitter, values, emitter.inputs[1]))
    return emitter.finish(emitter.call(A.transpose.int, z, 1, 2), name)


def _prepared(emitter: Emitter, port: Port, given: fx.Node) -> fx.Node:
    """A projection `given` as [batch, pos, head, d], as the attention core reads it."""
    emitter.bind(port.head, given if port.heads_last else emitter.call(A.transpose.int, given, 1, 2))
    return emitter.copy(port.prepared)


def write_module(
    structure: Structure, statics: Statics, block: AttentionBlock, name: str, heads: Sequence[int] | None = None
) -> Region:
    """z [b, s, heads, d] -> [b, s, heads, D]: what each of some heads writes (None: of all)."""
    emitter = Emitter(structure, statics, ["z"])
    columns = block.columns if heads is None else [block.columns[h] for h in heads]
    by_head = emitter.call(A.unflatten.int, _columns(emitter, block, columns), 0, [len(columns), block.d_head])
    written = emitter.call(A.einsum.default, "bshd,hdm->bshm", [emitter.inputs[0], by_head])
    return emitter.finish(_scaled(emitter, block, written), name)


def _columns(emitter: Emitter, block: AttentionBlock, columns: Sequence[int]) -> fx.Node:
    """The rows of the transposed output weight that read the heads at these columns."""
    weight = block.output.linear.args[1]
    assert isinstance(weight, fx.Node)
    return emitter.call(A.t.default, _cut(emitter, emitter.copy(weight), columns, block.d_head, 1))


def _whole_output(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    emitter = Emitter(structure, statics, ["z"])
    z = emitter.call(A.flatten.using_ints, emitter.inputs[0], 2, 3)
    weight = emitter.call(A.t.default, _columns(emitter, block, block.columns))
    bias = [emitter.copy(b) for b in block.output.linear.args[2:] if isinstance(b, fx.Node)]
    return emitter.finish(_scaled(emitter, block, emitter.call(A.linear.default, z, weight, *bias)), name)


def _bias(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    emitter = Emitter(structure, statics, [])
    bias = block.output.linear.args[2]
    assert isinstance(bias, fx.Node)
    return emitter.finish(_scaled(emitter, block, emitter.copy(bias)), name)


def _scaled(emitter: Emitter, block: AttentionBlock, written: fx.Node) -> fx.Node:
    """The static factors between the output projection and the stream, on a part of it."""
    emitter.bind(block.output.linear, written)
    for node in block.output.scales:
        written = emitter.copy_writer(node)
        emitter.bind(node, written)
    return written
