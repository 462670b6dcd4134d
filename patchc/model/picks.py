"""Picking by a list of constants, as `x[..., [-2], :]` does, written as the slice that it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from patchc.model.nodes import A, evaluate, reads_input, shape_of


def write_slices(module: fx.GraphModule) -> None:
    """Replace every `index` by constants that stand next to each other, in place. Dead nodes are left to the
    caller."""
    for node in list(module.graph.nodes):
        if node.target is A.index.Tensor and (found := _run(node, module)) is not None:
            with module.graph.inserting_before(node):
                made = module.graph.call_function(A.slice.Tensor, (node.args[0], *found))
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)


def _run(node: fx.Node, module: fx.GraphModule) -> tuple[int, int, int] | None:
    """The axis, and the first and last entry, that an index picks."""
    indices: Any = node.args[1]
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not isinstance(given[0][1], fx.Node) or reads_input(given[0][1]):
        return None
    axis, index = given[0]
    size = shape_of(node.args[0])[axis]
    picked: Tensor = evaluate(index, {}, module)
    if picked.dtype is not torch.long or picked.dim() != 1 or not size.isdigit():
        return None
    places = [p % int(size) for p in picked.tolist()]
    stand_together = bool(places) and places == list(range(places[0], places[0] + len(places)))
    return (axis, places[0], places[-1] + 1) if stand_together else None
