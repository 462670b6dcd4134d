"""Where a pass through a model can be read and edited, and the interface of what makes such passes.

What to edit is for the caller; how a kind of model is hooked is for `hook_drivers`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchc.diagnostics import RULES
from patchc.ir.graph import BlockKind, Kind, ResidualGraph

NO_POINT = RULES.add(
    "hooks-point", "the hooks backend cannot reach an activation that a patch or a metric names in this model", exit=3
)


class At(StrEnum):
    """Where a pass can be read or edited."""

    EMBED = "embed"
    POS_EMBED = "pos_embed"
    RESID_PRE = "resid_pre"
    """The stream before a layer; an edit changes everything after it."""
    Q = "q"
    K = "k"
    V = "v"
    SCORES = "scores"
    """Attention scores as the softmax takes them; what the mask hides is -inf, or as low as can be."""
    PATTERN = "pattern"
    """What the values are weighted by."""
    Z = "z"
    HEADS_OUT = "heads_out"
    """What heads and bias write together, of a block that has a norm after it."""
    ATTN_OUT = "attn_out"
    """What attention adds to the stream."""
    RESID_MID = "resid_mid"
    """The stream between attention and MLP; an edit changes everything after it."""
    MLP_IN = "mlp_in"
    """What the MLP's norm reads; an edit changes the MLP alone."""
    POST = "post"
    """The MLP's activations as its output matrix reads them."""
    NEURONS_OUT = "neurons_out"
    """What that matrix makes of them, with its bias."""
    MLP_OUT = "mlp_out"
    """What the MLP adds to the stream."""
    FINAL_IN = "final_in"
    """The stream that the final norm reads."""
    LOGITS = "logits"


class Point(NamedTuple):
    """A place in the model, of a layer where it has one.

    Activations there are `[prompt, pos, d_model]`; at q and z `[prompt, pos, head, d_head]`, at k and v `[prompt, pos,
    kv_head, d_head]` (before any rotation, but after a norm over all heads), at scores and pattern `[prompt, head,
    query, key]`, at post `[prompt, pos, d_mlp]`; the logits are `[prompt, pos, d_vocab]`.
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
        block = graph.layer_block(BlockKind.ATTENTION, layer)
        ats = [At.RESID_PRE, At.Q, At.K, At.V, At.Z]
        ats += [At.HEADS_OUT, At.ATTN_OUT] if block is not None and block.post_norm else [At.ATTN_OUT]
        ats += [At.MLP_IN, At.MLP_OUT] if graph.layer_block(BlockKind.MLP, layer) else []
        points += [Point(at, layer) for at in ats]
    return [*points, Point(At.FINAL_IN), Point(At.LOGITS)]


def inner_points(graph: ResidualGraph) -> list[Point]:
    """The points inside nodes, which not every model shows."""
    layers = range(graph.n_layers)
    heads = [Point(at, layer) for layer in layers for at in (At.SCORES, At.PATTERN)]
    mlps = [layer for layer in layers if graph.layer_block(BlockKind.MLP, layer)]
    return heads + [Point(at, layer) for layer in mlps for at in (At.POST, At.NEURONS_OUT)]


class Driver(ABC):
    """Runs a model with edits at points, and captures points after their edits."""

    n_layers: int
    refused: Mapping[Point, str] = {}
    """Points that cannot be used, and why."""

    def run(self, ids: Tensor, edits: Mapping[Point, Edit], capture: Collection[Point]) -> dict[Point, Tensor]:
        """One forward pass on `ids` `[prompt, pos]`; it stops early unless the logits are captured."""
        for point in {*edits, *capture} & self.refused.keys():
            raise NO_POINT.error(f"{point.at} of layer {point.layer} cannot be hooked: {self.refused[point]}")
        wanted = set(capture) - {Point(At.LOGITS)}
        kept: dict[Point, Tensor] = {}
        edits = _without_mid(edits)
        for point in filter(self.lacks, (*edits, *wanted)):
            where = str(point.at) if point.layer < 0 else f"{point.at} of layer {point.layer}"
            raise NO_POINT.error(f"{where} cannot be hooked: no module of this model is known to show it")

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

    def lacks(self, point: Point) -> bool:
        """Whether it is known without a pass that a point cannot be hooked."""
        return False

    @abstractmethod
    def _hooked(self, handlers: Mapping[Point, Edit]) -> Any:
        """A context in which each point's activation passes through its handler."""

    @abstractmethod
    def _forward(self, ids: Tensor) -> Tensor:
        """The logits."""

    @abstractmethod
    def w_o(self, layer: int) -> Tensor:
        """A layer's output projection, `[head, d_head, d_model]`."""

    @abstractmethod
    def post_norm(self, layer: int, x: Tensor) -> Tensor:
        """What a layer's attention adds to the stream, `[token, d_model]`, where its heads and bias write `x` together
        and a norm follows."""

    @abstractmethod
    def w_out(self, layer: int) -> Tensor | None:
        """An MLP's output matrix, `[d_mlp, d_model]`, where there is one."""


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


# ---- inside attention


class Softmaxes(TorchFunctionMode):
    """Shows what a softmax inside an attention module takes, the scores, and what it gives, the pattern."""

    def __init__(self, handlers: Mapping[Point, Edit]):
        super().__init__()
        self._handlers = handlers
        self.layer: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.layer is None or func not in _SOFTMAX:
            return func(*args, **(kwargs or {}))
        scores = self._handled(At.SCORES, args[0])
        return self._handled(At.PATTERN, func(scores, *args[1:], **(kwargs or {})))

    def _handled(self, at: At, x: Tensor) -> Tensor:
        handler = self._handlers.get(Point(at, -1 if self.layer is None else self.layer))
        return x if handler is None else handler(x).contiguous()  # as softmax gives it: models take views of it

    def inside(self, layer: int | None) -> Callable[..., None]:
        """A hook that says which layer's attention is at work."""

        def hook(*_: Any) -> None:
            self.layer = layer

        return hook


_SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)


@contextmanager
def softmaxes_hooked(attentions: Sequence[nn.Module], handlers: Mapping[Point, Edit]) -> Generator[None]:
    """A context in which scores and patterns of attention modules that compute both eagerly pass their handlers."""
    if not handlers:
        yield
        return
    mode = Softmaxes(handlers)
    handles: list[torch.utils.hooks.RemovableHandle] = []
    for layer, module in enumerate(attentions):
        handles.append(module.register_forward_pre_hook(mode.inside(layer)))
        handles.append(module.register_forward_hook(mode.inside(None)))
    try:
        with mode:
            yield
    finally:
        for handle in handles:
            handle.remove()
