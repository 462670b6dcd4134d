"""Hooked forward passes on a private copy of a model: one small interface, two ways to hook.

`TransformerLens` hooks a TransformerBridge, `ForwardHooks` plain modules. What to edit is for the caller.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.ir.graph import BlockKind, Kind, ResidualGraph

NO_DRIVER = RULES.add("hooks-model", "the hooks backend has no way to hook this model", exit=3)
DIFFERS = RULES.add("hooks-differ", "the hooked copy of a model does not compute what the model computes", exit=3)


class At(StrEnum):
    """Where a pass can be read or edited."""

    EMBED = "embed"
    POS_EMBED = "pos_embed"
    RESID_PRE = "resid_pre"
    """The stream before a layer; an edit changes everything after it."""
    Q = "q"
    K = "k"
    V = "v"
    Z = "z"
    ATTN_OUT = "attn_out"
    RESID_MID = "resid_mid"
    """The stream between attention and MLP; an edit changes everything after it."""
    MLP_IN = "mlp_in"
    """What the MLP's norm reads; an edit changes the MLP alone."""
    MLP_OUT = "mlp_out"
    FINAL_IN = "final_in"
    """The stream that the final norm reads."""
    LOGITS = "logits"


class Point(NamedTuple):
    """A place in the model, of a layer where it has one.

    Activations there are `[prompt, pos, d_model]`; at q and z `[prompt, pos, head, d_head]`, at k and v
    (before any rotation) `[prompt, pos, kv_head, d_head]`; the logits are `[prompt, pos, d_vocab]`.
    """

    at: At
    layer: int = -1


Edit = Callable[[Tensor], Tensor]


class _Done(Exception):  # noqa: N818 (a signal, no error)
    """Everything asked for has been captured: the rest of the pass need not run."""


def points_of(graph: ResidualGraph) -> list[Point]:
    """Every point of a model, in the order of a pass; without `RESID_MID`, which reads as `MLP_IN`."""
    points = [Point(At.EMBED)]
    points += [Point(At.POS_EMBED)] if graph.node(Kind.POS_EMBED) else []
    for layer in range(graph.n_layers):
        ats = [At.RESID_PRE, At.Q, At.K, At.V, At.Z, At.ATTN_OUT]
        ats += [At.MLP_IN, At.MLP_OUT] if graph.layer_block(BlockKind.MLP, layer) else []
        points += [Point(at, layer) for at in ats]
    return [*points, Point(At.FINAL_IN), Point(At.LOGITS)]


class Driver(ABC):
    """Runs a model with edits at points, and captures points after their edits."""

    n_layers: int

    def run(self, ids: Tensor, edits: Mapping[Point, Edit], capture: Collection[Point]) -> dict[Point, Tensor]:
        """One forward pass on `ids` `[prompt, pos]`; it stops early unless the logits are captured."""
        wanted = set(capture) - {Point(At.LOGITS)}
        kept: dict[Point, Tensor] = {}
        edits = _without_mid(edits)

        def at(point: Point) -> Edit:
            def handle(x: Tensor) -> Tensor:
                if len(x) != len(ids):  # Position embeddings may be one for all prompts.
                    x = x.expand(len(ids), *x.shape[1:])
                if point in edits:
                    x = edits[point](x)
                if point in wanted:
                    kept[point] = x.detach().clone()
                    if len(kept) == len(wanted) and len(wanted) == len(capture):
                        raise _Done
                return x

            return handle

        try:
            with torch.no_grad(), self._hooked({point: at(point) for point in {*edits, *wanted}}):
                logits = self._forward(ids)
        except _Done:
            return kept
        return kept | {Point(At.LOGITS): logits}

    @abstractmethod
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Any:
        """A context in which each point's activation passes through its handler."""

    @abstractmethod
    def _forward(self, ids: Tensor) -> Tensor:
        """The logits."""

    @abstractmethod
    def w_o(self, layer: int) -> Tensor:
        """A layer's output projection, `[head, d_head, d_model]`."""


def _without_mid(edits: Mapping[Point, Edit]) -> dict[Point, Edit]:
    """The same edits, those of `RESID_MID` made on the attention output: no module holds the stream itself
    there."""
    out = {point: edit for point, edit in edits.items() if point.at is not At.RESID_MID}
    for point, edit in edits.items():
        if point.at is At.RESID_MID:
            pre, attn = Point(At.RESID_PRE, point.layer), Point(At.ATTN_OUT, point.layer)
            out[pre], out[attn] = _through_attention(edit, out.get(pre), out.get(attn))
    return out


def _through_attention(edit: Edit, at_pre: Edit | None, at_attn: Edit | None) -> tuple[Edit, Edit]:
    stream: list[Tensor] = []

    def pre(x: Tensor) -> Tensor:
        x = at_pre(x) if at_pre else x
        stream[:] = [x.clone()]
        return x

    def attn(x: Tensor) -> Tensor:
        x = at_attn(x) if at_attn else x
        mid = stream[0] + x
        return x + (edit(mid) - mid)  # Where the edit changes nothing the difference is exactly zero.

    return pre, attn


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output, whatever form it has."""
    return output if isinstance(output, Tensor) else output.logits


# ---- TransformerLens

_NAMES = {
    At.EMBED: "hook_embed",
    At.POS_EMBED: "hook_pos_embed",
    At.RESID_PRE: "blocks.{}.hook_resid_pre",
    At.Q: "blocks.{}.attn.hook_q",
    At.K: "blocks.{}.attn.hook_k",
    At.V: "blocks.{}.attn.hook_v",
    At.Z: "blocks.{}.attn.hook_z",
    At.ATTN_OUT: "blocks.{}.hook_attn_out",
    At.MLP_IN: "blocks.{}.ln2.hook_in",
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

        if isinstance(model, NativeModel):
            config = copy.deepcopy(model.cfg)
            self.bridge: Any = build(model, "TransformerLensNative", tl_config=config)
        else:
            self.bridge = build(model, type(model).__name__, hf_config=model.config)
        self.bridge.eval()
        self.n_layers = len(self.bridge.blocks)
        self._weights = [block.attn.W_O.detach() for block in self.bridge.blocks]

    @contextmanager
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Generator[None]:
        hooks = [
            (_NAMES[point.at].format(point.layer), lambda x, hook, handler=handler: handler(x))
            for point, handler in handlers.items()
        ]
        with self.bridge.hooks(fwd_hooks=hooks):
            yield

    def _forward(self, ids: Tensor) -> Tensor:
        return logits_of(self.bridge(ids))

    def w_o(self, layer: int) -> Tensor:
        return self._weights[layer]


# ---- plain forward hooks


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


def _on_first(output: Any, tap: Tap, handler: Edit) -> Any:
    if isinstance(output, tuple):
        return (tap.apply(output[0], handler), *output[1:])
    return tap.apply(output, handler)


class ForwardHooks(Driver):
    """Plain torch hooks on the copy: models built like HF's GPT-2 or Llama."""

    def __init__(self, model: nn.Module, graph: ResidualGraph):
        """`model` belongs to the driver from now on."""
        self.model = model.eval()
        self.n_layers = graph.n_layers
        if hasattr(model, "transformer") and hasattr(model.transformer, "wpe"):
            self._taps, self._weights = _gpt2(model, graph)
        elif hasattr(model, "model") and hasattr(model.model, "embed_tokens"):
            self._taps, self._weights = _llama(model, graph)
        else:
            raise _unknown(model)

    @contextmanager
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Generator[None]:
        # In the order of a pass, since several points of one module (a fused q, k and v) are hooked one by
        # one.
        handles = [self._taps[point].hook(handlers[point]) for point in self._taps if point in handlers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, ids: Tensor) -> Tensor:
        return logits_of(self.model(ids, use_cache=False))

    def w_o(self, layer: int) -> Tensor:
        return self._weights[layer]


Taps = dict[Point, Tap]


def _gpt2(model: Any, graph: ResidualGraph) -> tuple[Taps, list[Tensor]]:
    body, d = model.transformer, graph.d_head
    width = graph.n_heads * d
    taps: Taps = {Point(At.EMBED): Tap(body.wte), Point(At.POS_EMBED): Tap(body.wpe)}
    for layer, block in enumerate(body.h):
        taps[Point(At.RESID_PRE, layer)] = Tap(block, is_input=True)
        for i, at in enumerate((At.Q, At.K, At.V)):
            taps[Point(at, layer)] = Tap(block.attn.c_attn, start=i * width, stop=(i + 1) * width, d_head=d)
        taps |= _after_heads(layer, block.attn.c_proj, block.ln_2, block.mlp, d)
    taps[Point(At.FINAL_IN)] = Tap(body.ln_f, is_input=True)
    return taps, [block.attn.c_proj.weight.detach().unflatten(0, (-1, d)) for block in body.h]


def _llama(model: Any, graph: ResidualGraph) -> tuple[Taps, list[Tensor]]:
    body, d = model.model, graph.d_head
    taps: Taps = {Point(At.EMBED): Tap(body.embed_tokens)}
    for layer, block in enumerate(body.layers):
        attn = block.self_attn
        taps[Point(At.RESID_PRE, layer)] = Tap(block, is_input=True)
        for at, module in ((At.Q, attn.q_proj), (At.K, attn.k_proj), (At.V, attn.v_proj)):
            taps[Point(at, layer)] = Tap(module, d_head=d)
        taps |= _after_heads(layer, attn.o_proj, block.post_attention_layernorm, block.mlp, d)
    taps[Point(At.FINAL_IN)] = Tap(body.norm, is_input=True)
    return taps, [block.self_attn.o_proj.weight.detach().T.unflatten(0, (-1, d)) for block in body.layers]


def _after_heads(layer: int, projection: nn.Module, norm: nn.Module, mlp: nn.Module, d_head: int) -> Taps:
    return {
        Point(At.Z, layer): Tap(projection, is_input=True, d_head=d_head),
        Point(At.ATTN_OUT, layer): Tap(projection),
        Point(At.MLP_IN, layer): Tap(norm, is_input=True),
        Point(At.MLP_OUT, layer): Tap(mlp),
    }


# ---- choosing


def driver_for(eager: nn.Module, graph: ResidualGraph, choice: str = "auto") -> Driver:
    """A driver around a copy of `eager`: `transformer_lens`, `forward_hooks`, or `auto` (the first that can).

    Errors: `hooks-model` where none can; `hooks-differ` where the copy, once hooked, computes other logits.
    """
    makers: dict[str, Callable[[nn.Module], Driver]] = {
        "transformer_lens": TransformerLens,
        "forward_hooks": lambda model: ForwardHooks(model, graph),
    }
    if choice not in ("auto", *makers):
        raise ValueError(f"no driver {choice!r}; there are auto, {', '.join(makers)}")
    refused: PatchcError | None = None
    for name in makers if choice == "auto" else [choice]:
        try:
            driver = makers[name](copy.deepcopy(eager))
            prove(driver, eager, graph)
            return driver
        except PatchcError as error:
            refused = refused or error
        except (ValueError, KeyError, AttributeError, NotImplementedError):
            continue  # This one cannot hook it; the next may.
    raise refused or _unknown(eager)


def prove(driver: Driver, eager: nn.Module, graph: ResidualGraph) -> None:
    """The unedited driver gives the model's own logits, and writers add up to the stream."""
    device = next(eager.parameters()).device
    ids = torch.arange(2 * 3, device=device).reshape(2, 3) % graph.d_vocab
    with torch.no_grad():
        want = logits_of(copy.deepcopy(eager).eval()(ids))
    points = points_of(graph)
    got = driver.run(ids, {}, points)
    if set(got) != set(points):
        raise DIFFERS.error(f"no activation at {sorted(str(p.at) for p in set(points) - set(got))}")
    _must_agree(got[Point(At.LOGITS)], want, "its logits differ from the model's by")
    added = sum(x for point, x in got.items() if point.at in (At.EMBED, At.POS_EMBED, At.ATTN_OUT, At.MLP_OUT))
    assert isinstance(added, Tensor)
    _must_agree(added, got[Point(At.FINAL_IN)], "its writers miss the final stream by")
    for layer in range(graph.n_layers):
        z = got[Point(At.Z, layer)]
        bias = got[Point(At.ATTN_OUT, layer)] - torch.einsum("bphd,hdm->bpm", z, driver.w_o(layer))
        _must_agree(bias, bias[:1, :1].expand_as(bias), f"the heads of layer {layer} miss its attention output by")


def _must_agree(got: Tensor, want: Tensor, what: str) -> None:
    difference = (got.double() - want.double()).abs().max().item()
    allowed = 100 * torch.finfo(want.dtype).eps * max(1.0, want.abs().max().item())
    if not difference <= allowed:
        raise DIFFERS.error(f"the hooked copy of the model is not the model: {what} {difference:.2e}")


def _unknown(model: nn.Module) -> PatchcError:
    return NO_DRIVER.error(
        f"the hooks backend cannot hook a {type(model).__name__}: it knows models that TransformerLens can "
        f"bridge, and models built like HF's GPT-2 or Llama"
    )
