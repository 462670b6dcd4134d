"""The scores that an attention core's pattern is the softmax of, written as operations.

`pieces` and `piece_modules` make functions of them, and `prove` compares these with the whole core.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

from patchc.diagnostics import RULES
from patchc.model.attention import AttentionBlock
from patchc.model.emit import Emitter
from patchc.model.nodes import SDPA, A, cone, dtype_of

NOT_TAKEN_APART = RULES.add(
    "no-inside", "a spec patches or reads something inside a node that the model does not compute that way", exit=3
)

HIDDEN = -5e3
"""A mask that adds less than this hides: masks add -1e4 or far less, biases by distance stay above."""


def emit_scores(emitter: Emitter, block: AttentionBlock, query: fx.Node, key: fx.Node) -> fx.Node:
    """Scores [batch, head, query, key] of a core's operands; minus infinity where its mask hides."""
    q, k = (port.operand for port in block.ports[:2])
    if block.weights.target is SDPA:
        return _fused_scores(emitter, block, query, key)
    scores = cast(fx.Node, block.weights.args[0])
    without = [emitter.call(A.zeros_like.default, x) for x in (query, key)]
    made: list[fx.Node] = []
    for operands in (without, (query, key)):
        for node in cone(scores, {q, k}):
            if emitter.structure.dynamic[node]:
                emitter.env.pop(node, None)
        emitter.bind(q, operands[0])
        emitter.bind(k, operands[1])
        made.append(emitter.copy(scores))
    return _hide(emitter, made[1], emitter.call(A.le.Scalar, made[0], HIDDEN))


def _fused_scores(emitter: Emitter, block: AttentionBlock, query: fx.Node, key: fx.Node) -> fx.Node:
    _, _, _, mask = (*block.weights.args, None)[:4]
    scale = cast("float | None", block.weights.kwargs.get("scale")) or block.d_head**-0.5
    scores = emitter.call(A.matmul.default, query, emitter.call(A.transpose.int, key, -1, -2))
    scores = emitter.call(A.mul.Tensor, scores, scale)
    if not isinstance(mask, fx.Node):
        return scores
    shown = emitter.copy(mask)
    if dtype_of(mask) is torch.bool:
        return _hide(emitter, scores, emitter.call(A.logical_not.default, shown))
    scores = emitter.call(A.add.Tensor, scores, shown)
    return _hide(emitter, scores, emitter.call(A.le.Scalar, shown, HIDDEN))


def _hide(emitter: Emitter, scores: fx.Node, hidden: Any) -> fx.Node:
    return emitter.call(A.masked_fill.Scalar, scores, hidden, float("-inf"))
