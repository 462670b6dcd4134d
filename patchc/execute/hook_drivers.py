"""Two ways to hook a private copy of a model: through TransformerLens, and by torch's own hooks.

Where a pass can be hooked is said in `hook_points`; which way a model takes, in `hook_proof`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.execute.hook_points import At, Driver, Edit, Point, logits_of, softmaxes_hooked
from patchc.execute.hook_taps import decoder, normed_over_heads, out_weight
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
        self._normed = {p for layer, block in blocks for p in normed_over_heads(layer, block.attn, self._d_head)}

    @contextmanager
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Generator[None]:
        scores = {p: h for p, h in handlers.items() if p.at is At.SCORES and self._attentions}
        hooks = [(self._name(p), self._hook(p, handler)) for p, handler in handlers.items() if p not in scores]
        with self.bridge.hooks(fwd_hooks=hooks), softmaxes_hooked(self._attentions, scores):
            yield

    def _name(self, point: Point) -> str:
        if point.at is At.MLP_IN and not hasattr(self.bridge.blocks[point.layer], "ln2"):
            return f"blocks.{point.layer}.mlp.hook_in"  # It reads the stream itself.
        if point in self._normed:
            return f"blocks.{point.layer}.attn.{point.at}_norm.hook_out"
        return _NAMES[point.at].format(point.layer)

    def _hook(self, point: Point, handler: Edit) -> Callable[[Tensor, Any], Tensor]:
        if point not in self._normed:
            return lambda x, hook: handler(x)
        return lambda x, hook: handler(x.unflatten(-1, (-1, self._d_head))).flatten(-2)

    def _forward(self, ids: Tensor) -> Tensor:
        return logits_of(self.bridge(ids))

    def w_o(self, layer: int) -> Tensor:
        return self._weights[layer]

    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        return self.bridge.blocks[layer].ln1_post(x[None])[0]

    def w_out(self, layer: int) -> Tensor | None:
        weight = getattr(getattr(self.bridge.blocks[layer], "mlp", None), "W_out", None)
        return None if weight is None else weight.detach()


# ---- plain forward hooks


class ForwardHooks(Driver):
    """Plain torch hooks on the copy: decoders whose modules have the names that transformers gives them."""

    def __init__(self, model: nn.Module, graph: ResidualGraph):
        """`model` belongs to the driver from now on."""
        self.model: Any = model.eval()
        self.n_layers = graph.n_layers
        self._ids: list[int] = []
        found = decoder(model, graph, self._ids)
        self._taps, self._attentions, self._weights = found.taps, found.attentions, found.weights

    def lacks(self, point: Point) -> bool:
        return point not in self._taps and point.at not in (At.SCORES, At.PATTERN, At.LOGITS)

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


def unknown(model: nn.Module) -> PatchcError:
    """The error that names a model which no driver can hook."""
    return NO_DRIVER.error(
        f"the hooks backend cannot hook a {type(model).__name__}: it knows models that TransformerLens can "
        f"bridge, and decoders whose modules have the names that transformers gives them"
    )
