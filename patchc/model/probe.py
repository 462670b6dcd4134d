"""The logits of one short prompt, kept to notice an edit where a module's code and settings cannot be told.

A module that `identity` has a text of needs none of this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from patchc.model.state import untouched

LENGTH = 8


def probe(module: nn.Module, d_vocab: int, n_ctx: int) -> Tensor:
    """The module's own logits in eval mode, `[pos, d_vocab]`, of at most `LENGTH` tokens. `n_ctx`: 0 where unknown."""
    device = next(module.parameters()).device
    ids = torch.arange(min(LENGTH, n_ctx or LENGTH), device=device)[None] % d_vocab
    with torch.inference_mode(False), torch.no_grad(), untouched(module):
        out = module(ids)
    return (out if isinstance(out, Tensor) else out.logits)[0].detach().clone()


def probes_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two such logits are the same to rounding: the same sums may be done in another order, as when a bridge's
    flags were set. Allowed is eps^0.8 of a number and of its row's mean size, eight times (float32: 2e-5)."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if torch.equal(one, other):
        return True
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    a, b = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (one, other))
    allowed = 8 * torch.finfo(one.dtype).eps ** 0.8
    return bool(((a - b).abs() <= allowed * (a.abs() + a.abs().mean(-1, keepdim=True))).all())
