"""The pieces of a model as GraphModules over whole sequences, to be put together into one readable graph.

Only ATen operations, `getitem` and the model's own parameters stand in them. The same pieces on packed rows,
which sweeps run on, are `model.pieces`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from patchc.model.attention import AttentionBlock, Port
from patchc.model.emit import Emitter, Region, Statics, region, spans, statics_region
from patchc.model.inside import emit_scores
from patchc.model.nodes import A, need
from patchc.model.trace import Layer, Structure


@dataclass(frozen=True)
class PieceModules:
    """Modules by name. b prompts of s tokens each; D = d_model, d = d_head; `l` a layer.

    statics(ids [b, s]) -> tuple
    embed(ids) -> [b, s, D];  pos_embed(ids) -> [b or 1, s, D]
    layer{l}_q, _k, _v(x [b, s, D]) -> [b, s, heads or key/value heads, d], before rotary and the like
    layer{l}_attend(q, k, v) -> z [b, s, heads, d]   from those, k and v repeated to one per query head
    layer{l}_write(z) -> [b, s, heads, D]            layer{l}_attn_bias() -> [D], where there is one
    layer{l}_scores(q, k) -> [b, heads, query, key]  minus infinity where the mask hides
    layer{l}_mix(pattern, v) -> z [b, s, heads, d]   a pattern [b, heads, query, key] applied to values
    layer{l}_mlp_post(x) -> [b, s, d_mlp]            layer{l}_mlp_down(post) -> [b, s, D]
    layer{l}_mlp(x) -> [b, s, D]                     unembed(x) -> [b, s, d_vocab]

    `static_args[name]`: which members of the statics' tuple follow a module's own arguments.
    """

    modules: dict[str, fx.GraphModule]
    static_args: dict[str, tuple[int, ...]]


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
    out = {
        port_name: _projection(structure, statics, layer, port, f"{name}{port_name.upper()}")
        for port_name, port in zip("qkv", block.ports, strict=True)
    }
    out["attend"] = _attend(structure, statics, block, f"{name}Attend")
    out["scores"] = _scores(structure, statics, block, f"{name}Scores")
    out["mix"] = _mix(structure, statics, block, f"{name}Mix")
    out["write"] = _write(structure, statics, block, f"{name}Write")
    if len(block.out.args) > 2:
        out["attn_bias"] = _bias(structure, statics, block, f"{name}AttnBias")
    if layer.mlp is not None and layer.mlp_entry is not None:
        out["mlp"] = region(structure, statics, layer.mlp, [("x", layer.mlp_entry)], f"{name}Mlp")
    return out


def _projection(structure: Structure, statics: Statics, layer: Layer, port: Port, name: str) -> Region:
    source, weight, *bias = port.linear.args
    assert isinstance(source, fx.Node)
    assert isinstance(weight, fx.Node)
    emitter = Emitter(structure, statics, ["x"], [(source, [layer.entry])])
    emitter.bind(layer.entry, emitter.inputs[0])
    x, d_head = emitter.copy(source), layer.attention.d_head
    rows = [_cut(emitter, emitter.copy(w), port.first, d_head, 0) for w in (weight, *bias) if isinstance(w, fx.Node)]
    projected = emitter.call(A.linear.default, x, *rows)
    return emitter.finish(emitter.call(A.unflatten.int, projected, -1, [len(port.first), d_head]), name)


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


def _write(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    emitter = Emitter(structure, statics, ["z"])
    weight = block.out.args[1]
    assert isinstance(weight, fx.Node)
    columns = _cut(emitter, emitter.copy(weight), block.columns, block.d_head, 1)
    by_head = emitter.call(A.unflatten.int, emitter.call(A.t.default, columns), 0, [block.n_heads, block.d_head])
    heads = emitter.call(A.einsum.default, "bshd,hdm->bshm", [emitter.inputs[0], by_head])
    return emitter.finish(_scaled(emitter, block, heads), name)


def _bias(structure: Structure, statics: Statics, block: AttentionBlock, name: str) -> Region:
    emitter = Emitter(structure, statics, [])
    bias = block.out.args[2]
    assert isinstance(bias, fx.Node)
    return emitter.finish(_scaled(emitter, block, emitter.copy(bias)), name)


def _scaled(emitter: Emitter, block: AttentionBlock, written: fx.Node) -> fx.Node:
    """What stands between the output projection and the stream, done to a part of it."""
    emitter.bind(block.out, written)
    for node in block.scales:
        written = emitter.copy_writer(node)
        emitter.bind(node, written)
    return written
