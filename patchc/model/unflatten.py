"""Work that a model does with the batch and another axis in one, [batch * n, ...], done on [batch, n, ...] instead.

Some modules flatten tokens into one list and unflatten it again (Conv1D around a matrix product, OPT around its MLP,
every router of experts), some do it to heads (Bloom's attention). Operation by operation, as far as each leaves that
axis to itself; where one does not, the list stays a list from there on.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx
from torch.fx.node import map_arg

from patchc.model.nodes import CASTS, SOFTMAX, VIEW, A, argument, is_pointwise, is_tensor, shape_of

NORMS = {A.layer_norm.default, A.rms_norm.default, A._fused_rms_norm.default}
ALONG = SOFTMAX | {
    A.log_softmax.int,
    A.mean.dim,
    A.sum.dim_IntList,
    A.amax.default,
    A.amin.default,
    A.topk.default,
    A.split.Tensor,
    A.split_with_sizes.default,
    A.chunk.default,
    A.slice.Tensor,
    A.cat.default,
    A.unsqueeze.default,
    A.transpose.int,
}
"""Operations along the axes that they name, which leave the others where they are."""
NAMES = ("dim", "dim0", "dim1")


def unflatten_batch(graph: fx.Graph, batch: Any) -> None:
    """Give every operation on [batch * n, ...] its twin on [batch, n, ...], where it has one; in place. `batch` is the
    symbol of that size."""
    unflattener = _Unflattener(graph, batch)
    for node in list(graph.nodes):
        if node.op == "call_function":
            unflattener.visit(node)
    graph.eliminate_dead_code()


class _Unflattener:
    def __init__(self, graph: fx.Graph, batch: Any) -> None:
        self.graph, self.batch = graph, batch
        self.pairs: dict[str, tuple[Any, Any]] = {}
        """The two sizes that a product of sizes, as it is printed, is made of."""
        self.twins: dict[fx.Node, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        source = node.args[0] if node.args else None
        if node.target in VIEW and isinstance(source, fx.Node) and is_tensor(source):
            self._view(node, source)
        elif node.target is A.repeat.default and isinstance(source, fx.Node) and self._tiles(node, source):
            value = source.meta["val"].unsqueeze(0)
            self.twins[node] = self._made(node, A.unsqueeze.default, (source, 0), {}, value)
        elif any(a in self.twins for a in node.all_input_nodes):
            self._operation(node)

    def is_flat(self, node: fx.Node) -> bool:
        return shape_of(node)[:1] != () and shape_of(node)[0] in self.pairs

    # ---- views
    def _view(self, node: fx.Node, source: fx.Node) -> None:
        if source in self.twins and self._is_pair_of(node, source):
            by = self.twins[source]
            same = shape_of(by) == shape_of(node)
            node.replace_all_uses_with(by if same else self._reshaped(node, by, node.meta["val"]))
        elif source in self.twins and shape_of(node)[0] == shape_of(source)[0]:
            self.twins[node] = self._reshaped(node, self.twins[source], self._unflat(node.meta["val"]))
        elif self._flattens(node, source):
            self.twins[node] = self._reshaped(node, source, self._unflat(node.meta["val"]))

    def _is_pair_of(self, node: fx.Node, flat: fx.Node) -> bool:
        return shape_of(node)[:2] == tuple(map(str, self.pairs[shape_of(flat)[0]]))

    def _flattens(self, node: fx.Node, source: fx.Node) -> bool:
        sizes = source.meta["val"].shape[:2]
        if len(sizes) < 2 or str(sizes[0]) != str(self.batch) or not shape_of(node):
            return False
        return self._is_product(node, sizes[1])

    def _tiles(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether a tensor is repeated for each prompt, and in no other way."""
        times, sizes = argument(node, "repeat"), source.meta["val"].shape
        once = len(times) == len(sizes) > 1 and all(t == 1 for t in times[1:])
        return once and self._is_product(node, sizes[0])

    def _is_product(self, node: fx.Node, size: Any) -> bool:
        """Whether the first axis is as long as the batch times a size, which is then noted."""
        product = str(self.batch * size)
        if shape_of(node)[0] != product or product == str(self.batch):
            return False
        self.pairs[product] = (self.batch, size)
        return True

    def _reshaped(self, node: fx.Node, source: fx.Node, value: Tensor) -> fx.Node:
        if shape_of(source) == tuple(map(str, value.shape)):
            return source
        return self._made(node, A.reshape.default, (source, list(value.shape)), {}, value)

    # ---- operations
    def _operation(self, node: fx.Node) -> None:
        flat = [a for a in node.all_input_nodes if a in self.twins or self.is_flat(a)]
        if not all(a in self.twins for a in flat) or len({shape_of(a)[:1] for a in flat}) > 1:
            return
        if self._product(node):
            return
        if self._keeps(node, flat, [a for a in node.all_input_nodes if a not in flat]):
            args, kwargs = (map_arg(part, lambda a: self.twins.get(a, a)) for part in (node.args, node.kwargs))
            self._take(node, node.target, self._from_last(node, args), kwargs)

    def _product(self, node: fx.Node) -> bool:
        """The matrix products that are of one list with one matrix, or of two lists of matrices."""
        target, args = node.target, node.args
        if target in (A.mm.default, A.addmm.default) and not node.kwargs:
            *bias, x, weight = args
            if x not in self.twins or not isinstance(weight, fx.Node) or weight in self.twins:
                return False
            transposed = self._made(node, A.t.default, (weight,), {}, weight.meta["val"].t())
            self._take(node, A.linear.default, (self.twins[x], transposed, *bias), {})
            return True
        if target is A.bmm.default and args[0] in self.twins and args[1] in self.twins:
            self._take(node, A.matmul.default, tuple(self.twins[a] for a in args), {})  # type: ignore[index]
            return True
        if target is A.baddbmm.default and all(a in self.twins for a in args[:3]):
            self._sum_and_product(node)
            return True
        return False

    def _sum_and_product(self, node: fx.Node) -> None:
        """beta x + alpha a @ b."""
        x, a, b = (self.twins[n] for n in node.args[:3])  # type: ignore[index]
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        value = self._unflat(node.meta["val"])
        product = self._made(node, A.matmul.default, (a, b), {}, value)
        if alpha != 1:
            product = self._made(node, A.mul.Tensor, (product, alpha), {}, value)
        if beta != 1:
            x = self._made(node, A.mul.Tensor, (x, beta), {}, x.meta["val"])
        self.twins[node] = self._made(node, A.add.Tensor, (x, product), {}, value)

    def _keeps(self, node: fx.Node, flat: list[fx.Node], rest: list[fx.Node]) -> bool:
        """Whether an operation treats each entry of the list by itself, and is written the same way on two axes."""
        target = node.target
        if target is operator.getitem:
            return True
        if is_pointwise(node) or target in CASTS or target is A.dropout.default:
            return all(self._broadcasts(a, node) for a in rest)
        if target is A.linear.default:
            return node.args[0] in flat and len(flat) == 1
        if target in NORMS:
            return len(flat) == 1 and len(shape_of(flat[0])) > len(argument(node, "normalized_shape") or [])
        return target in ALONG and not rest and 0 not in self._axes(node)

    def _broadcasts(self, operand: fx.Node, node: fx.Node) -> bool:
        shape, rank = shape_of(operand), len(shape_of(node))
        return is_tensor(operand) and (len(shape) < rank or (len(shape) == rank and shape[0] == "1"))

    # ---- the axes that an operation names
    def _rank(self, node: fx.Node) -> int:
        """The number of axes that they count."""
        if node.target is A.unsqueeze.default:
            return len(shape_of(node))
        return max(len(shape_of(a)) for a in node.all_input_nodes)

    def _axes(self, node: fx.Node) -> list[int]:
        named = [d for d in (argument(node, name) for name in NAMES) if d is not None]
        flat = [d for dims in named for d in (dims if isinstance(dims, list | tuple) else [dims])]
        return [d % self._rank(node) for d in flat] or [0]

    def _from_last(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The same axes, counted from the last."""
        if node.target not in ALONG:
            return args
        rank = self._rank(node)

        def counted(at: int, value: Any) -> Any:
            if node.target._schema.arguments[at].name not in NAMES:  # type: ignore[union-attr]
                return value
            return [d % rank - rank for d in value] if isinstance(value, list | tuple) else value % rank - rank

        return tuple(counted(at, value) for at, value in enumerate(args))

    # ---- twins
    def _take(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.twins[node] = self._made(node, target, args, kwargs, self._unflat(node.meta["val"]))

    def _unflat(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.new_empty((*self.pairs[str(value.shape[0])], *value.shape[1:]))
        return type(value)(self._unflat(v) for v in value)

    def _made(self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> fx.Node:
        with self.graph.inserting_before(node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {**node.meta, "val": value}
        return made
