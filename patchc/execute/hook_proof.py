"""Chooses a driver for a model, and proves of its copy that it computes what the model computes.

Points inside nodes are proved one by one: one that a model does not show is refused, and missed only by a cell that
needs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.execute.hook_drivers import ForwardHooks, TransformerLens, unknown
from patchc.execute.hook_points import At, Driver, Point, inner_points, logits_of, points_of
from patchc.ir.graph import BlockKind, ResidualGraph

DIFFERS = RULES.add("hooks-differ", "the hooked copy of a model does not compute what the model computes", exit=3)


def driver_for(
    eager: nn.Module, graph: ResidualGraph, choice: str = "auto", dtype: torch.dtype | None = None
) -> Driver:
    """A driver around a copy of `eager`, in `dtype` if one is given: `transformer_lens`, `forward_hooks`, or `auto`
    (the first that can).

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
            copied = _copied(eager, dtype)
            ids, want = _plain_logits(copied, graph)
            driver = makers[name](copied)
            prove(driver, graph, ids, want)
            return driver
        except PatchcError as error:
            refused = refused or error
        except (ValueError, KeyError, AttributeError, NotImplementedError):
            continue  # This one cannot hook it; the next may.
    raise refused or unknown(eager)


def _copied(eager: nn.Module, dtype: torch.dtype | None) -> nn.Module:
    """A copy in eval mode. Parameters are brought to another dtype one by one."""
    copied = copy.deepcopy(eager).eval()
    return copied if dtype is None else copied.to(dtype)


def _plain_logits(copied: nn.Module, graph: ResidualGraph) -> tuple[Tensor, Tensor]:
    """Some token ids `[prompt, pos]`, and the logits of a copy that is not hooked."""
    device = next(copied.parameters()).device
    ids = torch.arange(2 * 3, device=device).reshape(2, 3) % graph.d_vocab
    with torch.no_grad():
        return ids, logits_of(copied(ids))


def prove(driver: Driver, graph: ResidualGraph, ids: Tensor, want: Tensor) -> None:
    """The unedited driver gives the model's own logits `want`, and writers add up to the stream."""
    points = points_of(graph)
    got = driver.run(ids, {}, points)
    if set(got) != set(points):
        raise DIFFERS.error(f"no activation at {sorted(str(p.at) for p in set(points) - set(got))}")
    _must_agree(got[Point(At.LOGITS)], want, "its logits differ from the model's by")
    added = sum(x for point, x in got.items() if point.at in (At.EMBED, At.POS_EMBED, At.ATTN_OUT, At.MLP_OUT))
    assert isinstance(added, Tensor)
    _must_agree(added, got[Point(At.FINAL_IN)], "its writers miss the final stream by")
    _prove_heads(driver, graph, got)
    driver.refused = _unproved(driver, graph, ids)


def _prove_heads(driver: Driver, graph: ResidualGraph, got: Mapping[Point, Tensor]) -> None:
    for layer in range(graph.n_layers):
        out = got[Point(At.ATTN_OUT, layer)]
        if (written := got.get(Point(At.HEADS_OUT, layer))) is not None:
            normed = driver.post_norm(layer, written.flatten(0, 1)).view_as(out)
            _must_agree(normed, out, f"the norm after attention {layer} misses its output by")
            out = written
        heads = torch.einsum("bphd,hdm->bpm", got[Point(At.Z, layer)], driver.w_o(layer))
        _must_agree(_with_bias(heads, out), out, f"the heads of layer {layer} miss its attention output by")


def _with_bias(parts: Tensor, whole: Tensor) -> Tensor:
    """`parts` and what the whole has more at the first token: the same everywhere, where it is a bias."""
    return parts + (whole - parts)[:1, :1]


def _unproved(driver: Driver, graph: ResidualGraph, ids: Tensor) -> dict[Point, str]:
    """The points inside nodes that are not what they should be, and why."""
    try:
        inner = [point for point in inner_points(graph) if not driver.lacks(point)]
        got = driver.run(ids, {}, [*points_of(graph), *inner])
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:
        return dict.fromkeys(inner_points(graph), str(error))
    refused: dict[Point, str] = {}
    for layer in range(graph.n_layers):
        if fault := _pattern_fault(graph, layer, got):
            refused |= {Point(At.SCORES, layer): fault, Point(At.PATTERN, layer): fault}
        if graph.layer_block(BlockKind.MLP, layer) and (fault := _post_fault(driver, layer, got)):
            refused[Point(At.POST, layer)] = fault
    return refused


def _pattern_fault(graph: ResidualGraph, layer: int, got: Mapping[Point, Tensor]) -> str | None:
    scores, pattern = got.get(Point(At.SCORES, layer)), got.get(Point(At.PATTERN, layer))
    if scores is None or pattern is None:
        return "the model computes it inside a fused kernel"
    v = got[Point(At.V, layer)].repeat_interleave(graph.n_heads // graph.n_kv_heads, 2)
    z = torch.einsum("bhqk,bkhd->bqhd", pattern.to(v.dtype), v)
    checks = [
        (pattern.sum(-1), torch.ones_like(pattern[..., 0]), "its rows do not sum to 1"),
        (scores.softmax(-1), pattern, "the softmax of the scores is not the pattern"),
        (z, got[Point(At.Z, layer)], "what the heads give is not the values weighted by the pattern"),
    ]
    single = torch.finfo(torch.float32).eps  # Models compute their softmax in single precision, wider ones too.
    return next((fault for x, want, fault in checks if x.shape != want.shape or not _agree(x, want, single)), None)


def _post_fault(driver: Driver, layer: int, got: Mapping[Point, Tensor]) -> str | None:
    post, weight = got.get(Point(At.POST, layer)), driver.w_out(layer)
    if post is None or weight is None or post.shape[-1:] != weight.shape[:1]:
        return "the model's MLP has no output matrix of its own"
    out = got[Point(At.NEURONS_OUT, layer)]
    agrees = _agree(_with_bias(post @ weight, out), out)
    return None if agrees else "the MLP's output is not that of its output matrix"


def _agree(got: Tensor, want: Tensor, eps: float = 0.0) -> bool:
    eps = max(eps, torch.finfo(want.dtype).eps)
    return _difference(got, want) <= 100 * eps * max(1.0, want.abs().max().item())


def _must_agree(got: Tensor, want: Tensor, what: str) -> None:
    if not _agree(got, want):
        raise DIFFERS.error(f"the hooked copy of the model is not the model: {what} {_difference(got, want):.2e}")


def _difference(got: Tensor, want: Tensor) -> float:
    return (got.double() - want.double()).abs().max().item()
