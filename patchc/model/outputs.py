"""The matrix by which a node writes into the residual stream, what that reads, and what is done to what it gives; found
from what the node adds. Whether all of that leaves positions to themselves, `positions` checks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import cast

from torch import fx

from patchc.model.nodes import A, cone, is_tensor, shape_of


@dataclass(frozen=True)
class Output:
    """What stands between a node's output matrix and the stream: static factors, `scales`; or, with `post_norm`, any
    function of what the matrix gives at a position."""

    linear: fx.Node
    scales: tuple[fx.Node, ...] = ()
    post_norm: bool = False


def output_of(leaf: fx.Node, dynamic: Mapping[fx.Node, bool], tree: Collection[fx.Node]) -> Output | fx.Node:
    """The output matrix below a write to the stream; where there is none, the first operation in its way."""
    node, scales = leaf, list[fx.Node]()
    while node.target is not A.linear.default and _is_scaling(node, dynamic):
        scales.append(node)
        node = next(a for a in node.all_input_nodes if dynamic[a])
    if node.target is A.linear.default:
        return Output(node, tuple(reversed(scales)))
    linear = _only_source(leaf, dynamic, tree)
    return node if linear is None else Output(linear, post_norm=True)


def _only_source(leaf: fx.Node, dynamic: Mapping[fx.Node, bool], tree: Collection[fx.Node]) -> fx.Node | None:
    """The one linear map through which alone a write depends on the stream, None without one."""
    linears, todo, seen = set[fx.Node](), [leaf], {leaf}
    while todo:
        for a in todo.pop().all_input_nodes:
            if not dynamic[a] or a in seen:
                continue
            if a in tree:
                return None
            seen.add(a)
            if a.target is A.linear.default:
                linears.add(a)
            else:
                todo.append(a)
    return linears.pop() if len(linears) == 1 else None


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
    """An MLP's hidden layer: `post` is what the output matrix reads."""

    post: fx.Node
    output: Output

    @property
    def width(self) -> int:
        return int(shape_of(self.post)[-1])


def neurons_of(
    mlp: fx.Node, entry: fx.Node, dynamic: Mapping[fx.Node, bool], tree: Collection[fx.Node]
) -> Neurons | None:
    """The hidden layer of an MLP, given what it adds and what it reads; None where no one matrix reads it."""
    output = output_of(mlp, dynamic, tree)
    if isinstance(output, fx.Node):
        return None
    post = cast(fx.Node, output.linear.args[0])
    rest = cone(mlp, {post, entry})
    return Neurons(post, output) if post is not entry and entry not in rest - {post} else None
