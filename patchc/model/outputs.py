"""The matrix by which a node writes into the residual stream, and what that reads, found from what the node adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import fx

from patchc.model.nodes import A, cone, is_tensor, shape_of


def output_projection(leaf: fx.Node, dynamic: Mapping[fx.Node, bool]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """The linear map below a write to the stream, and the static factors between them; the first node that is
    neither, where there is one."""
    node, scales = leaf, list[fx.Node]()
    while node.target is not A.linear.default and _is_scaling(node, dynamic):
        scales.append(node)
        node = next(a for a in node.all_input_nodes if dynamic[a])
    return node, tuple(reversed(scales))


def _is_scaling(node: fx.Node, dynamic: Mapping[fx.Node, bool]) -> bool:
    """Whether a node multiplies its one residual-dependent operand by a factor that all positions share."""
    changing = [a for a in node.all_input_nodes if dynamic[a]]
    others = [a for a in node.all_input_nodes if not dynamic[a]]
    if len(changing) != 1 or not all(_is_scale(a) for a in others):
        return False
    division = node.target in {A.div.Tensor, A.div.Scalar} and node.args[0] is changing[0]
    return division or node.target in {A.mul.Tensor, A.mul.Scalar}


def _is_scale(node: fx.Node) -> bool:
    return is_tensor(node) and all(d.isdigit() for d in shape_of(node))


@dataclass(frozen=True)
class Neurons:
    """An MLP's hidden layer: `post` is what the output matrix `linear` reads, `scales` are static factors between that
    and the stream."""

    post: fx.Node
    linear: fx.Node
    scales: tuple[fx.Node, ...]

    @property
    def width(self) -> int:
        return int(shape_of(self.post)[-1])


def neurons_of(mlp: fx.Node, entry: fx.Node, dynamic: Mapping[fx.Node, bool]) -> Neurons | None:
    """The hidden layer of an MLP, given what it adds and what it reads; None where it is no linear map of one."""
    linear, scales = output_projection(mlp, dynamic)
    if linear.target is not A.linear.default:
        return None
    post = cast(fx.Node, linear.args[0])
    rest = cone(mlp, {post, entry})
    return Neurons(post, linear, scales) if post is not entry and entry not in rest - {post} else None
