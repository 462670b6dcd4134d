"""GPT-2's GELU, which transformers spells out in eight operations, as the one operation that computes it.

    0.5 x (1 + tanh(0.79788 (x + 0.044715 x^3)))   ->   gelu(x, approximate="tanh")

An eighth of the passes over the MLP's hidden layer. Not bitwise neutral: the last bits differ; `prove` compares.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import fx

from patchc.model.nodes import A

CUBE, SCALE = 0.044715, math.sqrt(2 / math.pi)


def fuse_gelu(graph: fx.Graph) -> None:
    """Replace every spelt-out GELU of a graph, in place. Dead nodes are left to the caller."""
    for node in list(graph.nodes):
        x = _gelu_input(node)
        if x is not None:
            with graph.inserting_before(node):
                fused = graph.call_function(A.gelu.default, (x,), {"approximate": "tanh"})
            fused.meta = dict(node.meta)
            node.replace_all_uses_with(fused)


def _gelu_input(node: fx.Node) -> fx.Node | None:
    """x, where a node is the product of x / 2 and 1 + tanh(...)."""
    if node.target is not A.mul.Tensor or node.meta["val"].dtype not in (torch.float32, torch.float64):
        return None  # in lower precision the one operation would round less often than the model does
    half, rest = node.args
    x = _scaled(half, 0.5)
    tanh = _plus(rest, 1.0)
    inner = _scaled(tanh.args[0], SCALE) if tanh is not None and tanh.target is A.tanh.default else None
    if x is None or inner is None or inner.target is not A.add.Tensor or inner.args[0] is not x:
        return None
    cube = _scaled(inner.args[1], CUBE)
    is_cube = cube is not None and cube.target is A.pow.Tensor_Scalar and cube.args[0] is x and cube.args[1] == 3.0
    return x if is_cube else None


def _scaled(node: Any, factor: float) -> fx.Node | None:
    """What is multiplied by `factor`."""
    ok = isinstance(node, fx.Node) and node.target is A.mul.Tensor and _is_number(node.args[1], factor)
    return cast(fx.Node, node.args[0]) if ok else None


def _plus(node: Any, term: float) -> fx.Node | None:
    """What `term` is added to."""
    ok = isinstance(node, fx.Node) and node.target is A.add.Tensor and _is_number(node.args[1], term)
    return cast(fx.Node, node.args[0]) if ok else None


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, number, rel_tol=1e-9)
