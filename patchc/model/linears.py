"""Linear projections however they are written, as the one operation `linear(x, weight, bias)`.

    x @ weight.T, x @ weight, either of them + bias; a factor or clamp on what they give, before it is split into heads

A fused bias rounds once less: the last bits differ, and `prove` compares.
"""

from __future__ import annotations

from typing import Any

from torch import Tag, fx

from patchc.model.nodes import VIEW, A, reads_input, shape_of


def write_linears(graph: fx.Graph) -> None:
    """Bring every linear projection of a graph to its one form, in place. Dead nodes are left to the caller."""
    for node in list(graph.nodes):
        if node.target is A.matmul.default:
            _product(graph, node)
        elif node.target is A.add.Tensor and not node.kwargs:
            _bias(graph, node)
        elif node.target in VIEW:
            _after_split(graph, node)


def _product(graph: fx.Graph, node: fx.Node) -> None:
    """x @ matrix, where the matrix is a weight."""
    x, matrix = node.args
    if not isinstance(x, fx.Node) or not isinstance(matrix, fx.Node) or len(shape_of(matrix)) != 2:
        return
    if len(shape_of(x)) < 3 or reads_input(matrix) or not reads_input(x):
        return
    weight = _transposed(graph, node, matrix)
    with graph.inserting_before(node):
        _replace(node, graph.call_function(A.linear.default, (x, weight)))


def _transposed(graph: fx.Graph, node: fx.Node, matrix: fx.Node) -> fx.Node:
    swaps = matrix.target is A.t.default or (matrix.target is A.permute.default and matrix.args[1] == [1, 0])
    if matrix.target is A.transpose.int:
        swaps = {int(a) % 2 for a in matrix.args[1:]} == {0, 1}  # type: ignore[arg-type]
    if swaps and isinstance(matrix.args[0], fx.Node):
        return matrix.args[0]
    with graph.inserting_before(node):
        made = graph.call_function(A.t.default, (matrix,))
    made.meta = {"val": matrix.meta["val"].t()}
    return made


def _bias(graph: fx.Graph, node: fx.Node) -> None:
    """linear(x, weight) + bias."""
    for product, bias in (node.args[:2], node.args[1::-1]):
        if isinstance(product, fx.Node) and isinstance(bias, fx.Node) and _lacks_bias(product):
            if shape_of(bias) == shape_of(product)[-1:] and not reads_input(bias):
                with graph.inserting_before(node):
                    _replace(node, graph.call_function(A.linear.default, (*product.args, bias)))
                return


def _lacks_bias(node: fx.Node) -> bool:
    return node.target is A.linear.default and len(node.args) == 2 and len(node.users) == 1


def _after_split(graph: fx.Graph, node: fx.Node) -> None:
    """view(f(linear)) as f(view(linear)), where f does the same to every entry."""
    done: list[fx.Node] = []
    source: Any = node.args[0]
    while isinstance(source, fx.Node) and _is_uniform(source):
        done.append(source)
        source = source.args[0]
    splits = done and len(shape_of(node)) > len(shape_of(source))
    if not splits or source.target is not A.linear.default:
        return
    with graph.inserting_before(node):
        moved = graph.call_function(node.target, (source, *node.args[1:]), dict(node.kwargs))  # type: ignore[arg-type]
        moved.meta = dict(node.meta)
        for f in reversed(done):
            again = graph.call_function(f.target, (moved, *f.args[1:]), dict(f.kwargs))  # type: ignore[arg-type]
            again.meta = {**f.meta, "val": node.meta["val"]}
            moved = again
    node.replace_all_uses_with(moved)


def _is_uniform(node: fx.Node) -> bool:
    """A function of one tensor's entries, the same for all of them."""
    others = (*node.args[1:], *node.kwargs.values())
    pointwise = Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise and isinstance(node.args[0], fx.Node) and not any(isinstance(a, fx.Node) for a in others)


def _replace(node: fx.Node, by: fx.Node) -> None:
    by.meta = dict(node.meta)
    node.replace_all_uses_with(by)
