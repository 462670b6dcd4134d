"""What a model's pieces cost: FLOPs a row, which the plan multiplies its counts by, and copies of weights. No weight's
value matters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from patchc.ir.graph import BlockKind
from patchc.ir.program import Rates
from patchc.model.pieces import Pieces, TracedPieces


def rates(pieces: TracedPieces) -> Rates:
    """An MLP is counted by running one row of zeros through it; the others follow from the graph's widths."""
    graph = pieces.graph
    mlp = {
        index: _flops_of_mlp(pieces, block.layer)
        for index, block in enumerate(graph.blocks)
        if block.kind is BlockKind.MLP and block.layer is not None
    }
    projection = 2 * graph.d_model * graph.d_head
    copied = sum(pieces.copied.values())
    down = 2 * graph.d_model * graph.d_mlp
    return Rates(mlp, projection, projection, 4 * graph.d_head, 2 * graph.d_model, copied, down, pieces.prepares)


def _flops_of_mlp(pieces: Pieces, layer: int) -> int:
    row = torch.zeros(1, pieces.graph.d_model, device=pieces.device, dtype=pieces.dtype)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_experts()) as counter:
        pieces.mlp(layer, row)
    return counter.get_total_flops()


def _experts() -> dict[Any, Any]:
    """How the product of tokens with their experts' matrices is counted, where transformers has defined it."""
    product = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {} if product is None else {product: _of_product}


def _of_product(tokens: Sequence[int], matrices: Sequence[int], *_: object, **__: object) -> int:
    """Of tokens [n, in] with matrices [expert, in, out]."""
    return 2 * tokens[0] * tokens[1] * matrices[2]
