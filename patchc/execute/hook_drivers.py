"""Two ways to hook a private copy of a model: through TransformerLens, and by torch's own hooks.

Where a pass can be hooked is said in `hook_points`; which way a model takes, in `hook_proof`.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.execute.hook_points import At, Driver, Edit, Point, logits_of, softmaxes_hooked
from patchc.execute.hook_taps import Tap, Taps, decoder, found, out_weight
from patchc.ir.graph import ResidualGraph

NO_DRIVER = RULES.add("hooks-model", "the hooks backend has no way to hook this model", exit=3)


# ---- TransformerLens

_NAMES = {
    At.EMBED: "hook_embed",
    At.POS_EMBED: "hook_pos_embed",
    At.RESID_PRE: "blocks.{}.hook_resid_pre",
    At.Q: "blocks.{}.attn.hook_q",
    At.K: "blocks.{}.attn.hook_k",
    At.V: "blocks.{}.attn.hook_v",
    At.SCORES: "blocks.{}.attn.hook_attn_scores",
    At.PATTERN: "blocks.{}.attn.hook_pattern",
    At.Z: "blocks.{}.attn.hook_z",
    At.HEADS_OUT: "blocks.{}.attn.hook_out",
    At.ATTN_OUT: "blocks.{}.hook_attn_out",
    At.MLP_IN: "blocks.{}.ln2.hook_in",
    At.POST: "blocks.{}.mlp.hook_post",
    At.NEURONS_OUT: "blocks.{}.mlp.hook_out",
    At.MLP_OUT: "blocks.{}.hook_mlp_out",
    At.FINAL_IN: "ln_final.hook_in",
}


class TransformerLens(Driver):
    """A TransformerBridge (TransformerLens 4) around the copy: HF models that it knows, and its own native
    ones."""

    def __init__(self, model: nn.Module):
        """`model` belongs to the driver from now on: the bridge replaces its modules."""
        # Imported here: it takes seconds, and the other driver does not need it.
        from transformer_lens.model_bridge.sources import build_bridge_from_module as build
        from transformer_lens.model_bridge.sources.native import NativeModel

        self._attentions: list[nn.Module] = []
        if isinstance(model, NativeModel):
            # The bridge's own hook of a native model's scores comes after the fact, and is given the pattern.
            self._attentions = [layer.attn for layer in model.layers]
            config = copy.deepcopy(model.cfg)
            self.bridge: Any = build(model, "TransformerLensNative", tl_config=config)
        else:
            self.bridge = build(model, type(model).__name__, hf_config=model.config)
        self.bridge.eval()
        self.n_layers = len(self.bridge.blocks)
        self._weights = [block.attn.W_O.detach() for block in self.bridge.blocks]
        self._d_head = self._weights[0].shape[1]
        blocks = enumerate(self.bridge.blocks)
        self._normed = {p for layer, block in blocks for p in _normed_over_heads(layer, block.attn, self._d_head)}

    @contextmanager
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Generator[None]:
        scores = {p: h for p, h in handlers.items() if p.at is At.SCORES and self._attentions}
        hooks = [
            (self._name(point), lambda x, hook, handler=self._as_heads(point, handler): handler(x))
            for point, handler in handlers.items()
            if point not in scores
        ]
        with self.bridge.hooks(fwd_hooks=hooks), softmaxes_hooked(self._attentions, scores):
            yield

    def _name(self, point: Point) -> str:
        if point.at is At.MLP_IN and not hasattr(self.bridge.blocks[point.layer], "ln2"):
            return f"blocks.{point.layer}.mlp.hook_in"  # It reads the stream itself.
        if point in self._normed:
            return f"blocks.{point.layer}.attn.{point.at}_norm.hook_out"
        return _NAMES[point.at].format(point.layer)

    def _as_heads(self, point: Point, handler: Edit) -> Edit:
        """A handler of heads, where the hook is given all of them in one."""
        if point not in self._normed:
            return handler
        return lambda x: handler(x.unflatten(-1, (-1, self._d_head))).flatten(-2)

    def _forward(self, ids: Tensor) -> Tensor:
        return logits_of(self.bridge(ids))

    def w_o(self, layer: int) -> Tensor:
        return self._weights[layer]

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        return self.bridge.blocks[layer].ln1_post(x[None])[0]

    def w_out(self, layer: int) -> Tensor | None:
        weight = getattr(getattr(self.bridge.blocks[layer], "mlp", None), "W_out", None)
        return None if weight is None else weight.detach()


def _normed_over_heads(layer: int, attention: Any, d_head: int) -> list[Point]:
    """The points of queries and keys that one norm has as a whole, all heads together."""
    norms = {at: getattr(attention, f"{at}_norm", None) for at in (At.Q, At.K)}
    return [Point(at, layer) for at, norm in norms.items() if norm is not None and _width(norm) not in (d_head, None)]


def _width(norm: nn.Module) -> int | None:
    return next((p.numel() for p in norm.parameters()), None)


# ---- plain forward hooks


class ForwardHooks(Driver):
    """Plain torch hooks on the copy: models built like HF's GPT-2 or Llama, and other decoders of transformers."""

    def __init__(self, model: nn.Module, graph: ResidualGraph):
        """`model` belongs to the driver from now on."""
        self.model: Any = model.eval()
        self.n_layers = graph.n_layers
        self._ids: list[int] = []
        if _is_gpt2(model):
            self._taps, self._weights = _gpt2(model, graph)
            self._attentions = [block.attn for block in self.model.transformer.h]
        elif _is_llama(model):
            self._taps, self._weights = _llama(model, graph)
            self._attentions = [block.self_attn for block in self.model.model.layers]
        else:
            other = decoder(model, graph, self._ids)
            self._taps, self._attentions, self._weights = other.taps, other.attentions, other.weights

    @contextmanager
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Generator[None]:
        # In the order of a pass, since several points of one module (a fused q, k and v) are hooked one by
        # one.
        handles = [self._taps[point].hook(handlers[point]) for point in self._taps if point in handlers]
        softmaxes = {point: h for point, h in handlers.items() if point.at in (At.SCORES, At.PATTERN)}
        try:
            with self._eager(bool(softmaxes)), softmaxes_hooked(self._attentions, softmaxes):
                yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _eager(self, needed: bool) -> Generator[None]:
        """A context in which attention is not fused, where that is needed: then it shows scores and patterns."""
        usual = self.model.config._attn_implementation if needed else "eager"
        if usual == "eager":
            yield
            return
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(usual)

    def _forward(self, ids: Tensor) -> Tensor:
        self._ids[:] = ids.shape
        return logits_of(self.model(ids, use_cache=False))

    def w_o(self, layer: int) -> Tensor:
        return self._weights[layer]

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        return self._taps[Point(At.ATTN_OUT, layer)].module(x[None])[0]

    def w_out(self, layer: int) -> Tensor | None:
        tap = self._taps.get(Point(At.POST, layer))
        if tap is None:
            return None
        return out_weight(tap.module) * getattr(self._taps[Point(At.MLP_OUT, layer)], "scale", 1.0)


def _is_gpt2(model: Any) -> bool:
    layers = getattr(getattr(model, "transformer", None), "h", None) or [None]
    return all(found(layers[0], (part,)) is not None for part in ("attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_proj"))


def _gpt2(model: Any, graph: ResidualGraph) -> tuple[Taps, list[Tensor]]:
    body, d = model.transformer, graph.d_head
    width = graph.n_heads * d
    taps: Taps = {Point(At.EMBED): Tap(body.wte), Point(At.POS_EMBED): Tap(body.wpe)}
    for layer, block in enumerate(body.h):
        taps[Point(At.RESID_PRE, layer)] = Tap(block, is_input=True)
        for i, at in enumerate((At.Q, At.K, At.V)):
            taps[Point(at, layer)] = Tap(block.attn.c_attn, start=i * width, stop=(i + 1) * width, d_head=d)
        taps |= _after_heads(layer, block.attn.c_proj, block.ln_2, block.mlp, block.mlp.c_proj, d)
    taps[Point(At.FINAL_IN)] = Tap(body.ln_f, is_input=True)
    return taps, [block.attn.c_proj.weight.detach().unflatten(0, (-1, d)) for block in body.h]


def _is_llama(model: Any) -> bool:
    layers = getattr(getattr(model, "model", None), "layers", None) or [None]
    parts = ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.down_proj")
    one_by_one = not hasattr(model.config, "residual_multiplier")
    return one_by_one and all(found(layers[0], (part,)) is not None for part in parts)


def _llama(model: Any, graph: ResidualGraph) -> tuple[Taps, list[Tensor]]:
    body, d = model.model, graph.d_head
    taps: Taps = {Point(At.EMBED): Tap(body.embed_tokens)}
    for layer, block in enumerate(body.layers):
        attn = block.self_attn
        taps[Point(At.RESID_PRE, layer)] = Tap(block, is_input=True)
        for at, module in ((At.Q, attn.q_proj), (At.K, attn.k_proj), (At.V, attn.v_proj)):
            taps[Point(at, layer)] = Tap(module, d_head=d)
        for point in _normed_over_heads(layer, attn, d):
            taps[point] = Tap(getattr(attn, f"{point.at}_norm"), d_head=d)
        before, after = block.post_attention_layernorm, None
        if hasattr(block, "post_feedforward_layernorm"):  # Then the one called so stands behind attention.
            before = getattr(block, "pre_feedforward_layernorm", block.mlp)
            after = block.post_attention_layernorm, block.post_feedforward_layernorm
        taps |= _after_heads(layer, attn.o_proj, before, block.mlp, block.mlp.down_proj, d, after)
    taps[Point(At.FINAL_IN)] = Tap(body.norm, is_input=True)
    return taps, [block.self_attn.o_proj.weight.detach().T.unflatten(0, (-1, d)) for block in body.layers]


def _after_heads(
    layer: int,
    projection: nn.Module,
    before: nn.Module,
    mlp: nn.Module,
    down: nn.Module,
    d_head: int,
    after: tuple[nn.Module, nn.Module] | None = None,
) -> Taps:
    """`before` reads the stream for the MLP; `after`: norms of what attention and the MLP write, where there are some."""
    attn_out, mlp_out = after or (projection, mlp)
    return {
        Point(At.Z, layer): Tap(projection, is_input=True, d_head=d_head),
        Point(At.HEADS_OUT, layer): Tap(projection),
        Point(At.ATTN_OUT, layer): Tap(attn_out),
        Point(At.MLP_IN, layer): Tap(before, is_input=True),
        Point(At.POST, layer): Tap(down, is_input=True),
        Point(At.NEURONS_OUT, layer): Tap(down),
        Point(At.MLP_OUT, layer): Tap(mlp_out),
    }


def unknown(model: nn.Module) -> PatchcError:
    """The error that names a model which no driver can hook."""
    return NO_DRIVER.error(
        f"the hooks backend cannot hook a {type(model).__name__}: it knows models that TransformerLens can "
        f"bridge, and models built like HF's GPT-2 or Llama"
    )
