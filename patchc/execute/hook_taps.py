"""Where the activations of a decoder's layers stand among its modules, by the names that transformers gives them.

Every name is only looked for; that what is found there is what it should be, `hook_proof` shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchc.execute.hook_points import At, Edit, Point
from patchc.ir.graph import BlockKind, ResidualGraph


@dataclass(frozen=True, slots=True)
class Tap:
    """An activation as a part of what a module takes or gives: columns `start` to `stop` of its first tensor,
    as heads of width `d_head` where that is not 0."""

    module: nn.Module
    is_input: bool = False
    start: int = 0
    stop: int | None = None
    d_head: int = 0

    def apply(self, whole: Tensor, handler: Edit) -> Tensor:
        part = whole[..., self.start : self.stop]
        heads = part.unflatten(-1, (-1, self.d_head)) if self.d_head else part
        new = handler(heads)
        if new is heads:
            return whole
        new = new.flatten(-2) if self.d_head else new
        stop = whole.shape[-1] if self.stop is None else self.stop
        left, right = whole[..., : self.start], whole[..., stop:]
        return torch.cat([left.expand(*new.shape[:-1], -1), new, right.expand(*new.shape[:-1], -1)], -1)

    def hook(self, handler: Edit) -> torch.utils.hooks.RemovableHandle:
        if self.is_input:
            return self.module.register_forward_pre_hook(lambda _, args: (self.apply(args[0], handler), *args[1:]))
        return self.module.register_forward_hook(lambda _, __, out: _on_first(out, self, handler))


@dataclass(frozen=True, slots=True)
class FusedTap(Tap):
    """Some heads of a projection that makes queries, keys and values at once: its columns are `groups` of heads, and of
    each group they are heads `first` to `last`."""

    groups: int = 1
    first: int = 0
    last: int = 0

    def apply(self, whole: Tensor, handler: Edit) -> Tensor:
        grouped = whole.unflatten(-1, (self.groups, -1, self.d_head))
        heads = grouped[..., self.first : self.last, :].flatten(-3, -2)
        new = handler(heads)
        if new is heads:
            return whole
        changed = grouped.expand(*new.shape[:-2], *grouped.shape[-3:]).clone()
        changed[..., self.first : self.last, :] = new.unflatten(-2, (self.groups, -1))
        return changed.flatten(-3)


@dataclass(frozen=True, slots=True)
class WritingTap(Tap):
    """What a module gives, times a number, or of a list of all prompts' tokens: as it is added to the stream."""

    scale: float = 1.0
    ids: list[int] = field(default_factory=list[int])
    """The shape of the ids of the pass."""

    def apply(self, whole: Tensor, handler: Edit) -> Tensor:
        listed = whole.dim() == 2
        part = (whole.unflatten(0, self.ids) if listed else whole) * self.scale
        new = handler(part)
        if new is part:
            return whole
        return (new.flatten(0, 1) if listed else new) / self.scale


@dataclass(frozen=True, slots=True)
class SharedNormTap(Tap):
    """What the norm reads that a module shares with attention: an edit is normalised for this module alone."""

    norm: nn.Module | None = None

    def hook(self, handler: Edit) -> torch.utils.hooks.RemovableHandle:
        norm, seen = self.norm, list[Tensor]()
        assert norm is not None
        keep = norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def replace(_: nn.Module, args: Any) -> Any:
            x = seen[-1]
            new = handler(x)
            return args if new is x else (norm(new), *args[1:])

        return _Both(keep, self.module.register_forward_pre_hook(replace))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class _Both:
    one: torch.utils.hooks.RemovableHandle
    other: torch.utils.hooks.RemovableHandle

    def remove(self) -> None:
        self.one.remove()
        self.other.remove()


def _on_first(output: Any, tap: Tap, handler: Edit) -> Any:
    if isinstance(output, tuple):
        return (tap.apply(output[0], handler), *output[1:])
    return tap.apply(output, handler)


Taps = dict[Point, Tap]


@dataclass(frozen=True, slots=True)
class Decoder:
    """A decoder's taps, its attention modules, and each layer's output projection `[head, d_head, d_model]`."""

    taps: Taps
    attentions: list[nn.Module]
    weights: list[Tensor]


# ---- decoders by their modules' names

BODIES = ("transformer", "gpt_neox", "model.decoder", "model")
EMBEDS = ("word_embeddings_layernorm", "wte", "word_embeddings", "embed_tokens", "embed_in")
POSITIONS = ("wpe", "embed_positions")
LAYERS = ("h", "layers")
ATTENTIONS = ("attn.attention", "attn", "self_attn", "self_attention", "attention")
OUTPUTS = ("c_proj", "o_proj", "out_proj", "dense")
FUSED = ("c_attn", "query_key_value", "qkv_proj")
WRITERS = ("mlp.dense_4h_to_h", "mlp", "fc2")
"""What gives what the MLP adds; a module called `mlp` may give the sum with the stream."""
DOWNS = ("mlp.c_proj", "mlp.down_proj", "mlp.fc2", "mlp.fc_out", "mlp.dense_4h_to_h", "fc2")
MLP_NORMS = ("ln_2", "ln_mlp", "post_attention_layernorm", "final_layer_norm")
SHARED_NORMS = ("input_layernorm", "ln_1")
FINALS = ("ln_f", "norm", "final_layer_norm", "final_layernorm")


def decoder(model: Any, graph: ResidualGraph, ids: list[int]) -> Decoder:
    """The taps of a decoder of transformers. `ids` will hold the shape of the ids of each pass. Raises AttributeError
    where a module has none of the names that are known."""
    config = model.config
    scale = float(getattr(config, "residual_multiplier", 1.0))
    body = _first(model, BODIES)
    taps: Taps = {Point(At.EMBED): WritingTap(_first(body, EMBEDS), scale=getattr(config, "embedding_multiplier", 1.0))}
    if (positions := found(body, POSITIONS)) is not None:
        taps[Point(At.POS_EMBED)] = Tap(positions)
    attentions: list[nn.Module] = []
    weights: list[Tensor] = []
    for layer, block in enumerate(_first(body, LAYERS)):
        attention = _first(block, ATTENTIONS)
        out = _first(attention, OUTPUTS)
        taps[Point(At.RESID_PRE, layer)] = Tap(block, is_input=True)
        taps |= _projections(layer, attention, graph, config)
        taps[Point(At.Z, layer)] = Tap(out, is_input=True, d_head=graph.d_head)
        taps[Point(At.HEADS_OUT, layer)] = WritingTap(out, scale=scale)
        normed = block.post_attention_layernorm if _norms_after(block) else out
        taps[Point(At.ATTN_OUT, layer)] = WritingTap(normed, scale=scale)
        if graph.layer_block(BlockKind.MLP, layer):
            taps |= _mlp(layer, block, scale, ids)
        attentions.append(attention)
        weights.append(out_weight(out).unflatten(0, (-1, graph.d_head)) * scale)
    taps[Point(At.FINAL_IN)] = Tap(_first(body, FINALS), is_input=True)
    return Decoder(taps, attentions, weights)


def out_weight(module: Any) -> Tensor:
    """A projection's matrix, `[in, out]`; Conv1D keeps it so, a linear map the other way round."""
    weight: Tensor = module.weight.detach()
    inner = getattr(module, "original_component", module)  # a bridge's part holds the model's own
    return weight.T if isinstance(inner, nn.Linear) else weight


def _projections(layer: int, attention: Any, graph: ResidualGraph, config: Any) -> Taps:
    d, points = graph.d_head, [Point(at, layer) for at in (At.Q, At.K, At.V)]
    fused = found(attention, FUSED)
    if fused is None:
        plain: Taps = {p: Tap(getattr(attention, f"{p.at}_proj"), d_head=d) for p in points}
        for p in normed_over_heads(layer, attention, d):
            plain[p] = Tap(getattr(attention, f"{p.at}_norm"), d_head=d)
        return plain
    groups, heads = _grouping(graph, config)
    starts = [sum(heads[:i]) for i in range(4)]
    return {
        p: FusedTap(fused, d_head=d, groups=groups, first=a, last=b)
        for p, a, b in zip(points, starts, starts[1:], strict=False)
    }


def _grouping(graph: ResidualGraph, config: Any) -> tuple[int, Sequence[int]]:
    """How a fused projection orders its heads: the number of groups, and how many heads of q, k and v stand in each."""
    q, kv = graph.n_heads, graph.n_kv_heads
    match config.model_type:
        case "gpt_neox" | "bloom":
            return q, (1, 1, 1)
        case "falcon" if config.new_decoder_architecture:
            return kv, (q // kv, 1, 1)
        case "falcon" if not config.multi_query:
            return q, (1, 1, 1)
        case _:
            return 1, (q, kv, kv)


def normed_over_heads(layer: int, attention: Any, d_head: int) -> list[Point]:
    """The points of queries and keys that one norm has as a whole, all heads together."""
    norms = {at: getattr(attention, f"{at}_norm", None) for at in (At.Q, At.K)}
    return [Point(at, layer) for at, norm in norms.items() if norm is not None and _width(norm) not in (d_head, None)]


def _width(norm: nn.Module) -> int | None:
    return next((p.numel() for p in norm.parameters()), None)


def _norms_after(block: Any) -> bool:
    """Whether norms stand between what a layer's parts write and the stream; the parts' own are named after those."""
    return hasattr(block, "post_feedforward_layernorm")


def _mlp(layer: int, block: Any, scale: float, ids: list[int]) -> Taps:
    taps: Taps = {Point(At.MLP_IN, layer): _mlp_in(block, ids)}
    if (down := found(block, DOWNS)) is not None:
        taps[Point(At.POST, layer)] = WritingTap(down, is_input=True, ids=ids)
        taps[Point(At.NEURONS_OUT, layer)] = WritingTap(down, scale=scale, ids=ids)
    written = block.post_feedforward_layernorm if _norms_after(block) else _first(block, WRITERS)
    taps[Point(At.MLP_OUT, layer)] = WritingTap(written, scale=scale, ids=ids)
    return taps


def _mlp_in(block: Any, ids: list[int]) -> Tap:
    if _norms_after(block):
        return Tap(getattr(block, "pre_feedforward_layernorm", block.mlp), is_input=True)
    if (norm := found(block, MLP_NORMS)) is not None:
        return WritingTap(norm, is_input=True, ids=ids)
    return SharedNormTap(block.mlp, norm=_first(block, SHARED_NORMS))


def _first(module: Any, names: Sequence[str]) -> Any:
    part = found(module, names)
    if part is None:
        raise AttributeError(f"a {type(module).__name__} has none of {', '.join(names)}")
    return part


def found(module: Any, names: Sequence[str]) -> Any:
    """The first part of a module that has one of these dotted names."""
    for name in names:
        at = module
        for part in name.split("."):
            at = getattr(at, part, None)
        if at is not None:
            return at
    return None
