"""Which operations leave every position to itself, as all but attention must.

Decided from each operation's axes; what is not known to keep positions apart is taken to mix them. The values
say the same once more, in `prove`; of lists of tokens that are sent to experts they alone can say it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from patchc.model.export import Exported
from patchc.model.nodes import CASTS, MOVES, SOFTMAX, VIEW, A, argument, is_pointwise, is_tensor, need, shape_of

LAST_AXES = {A.layer_norm.default, A.rms_norm.default, A.native_layer_norm.default, A._fused_rms_norm.default}
ALONG = SOFTMAX | {
    A.log_softmax.int,
    A.mean.dim,
    A.sum.dim_IntList,
    A.amax.default,
    A.amin.default,
    A.cumsum.default,
    A.var.correction,
    A.linalg_vector_norm.default,
    A.cat.default,
    A.glu.default,
    A.topk.default,
}
"""Operations that join entries along the axes that they name."""


def check_positions(exported: Exported, nodes: set[fx.Node], dynamic: dict[fx.Node, bool]) -> None:
    """Refuse the first of these nodes that is not known to leave every position to itself."""
    axes = _Axes(exported, dynamic)
    for node in exported.nodes:
        if node in nodes and dynamic[node] and node.op == "call_function":
            need(axes.keep(node), "positions are mixed outside attention, or may be", node)


def listed(exported: Exported, nodes: set[fx.Node], dynamic: dict[fx.Node, bool]) -> set[fx.Node]:
    """Those of some nodes that work on tokens as one flat list [batch * pos, ...], without their order or their
    prompts; empty where all that is not known to keep positions apart is none of them."""
    axes, found = _Axes(exported, dynamic), set[fx.Node]()
    for node in exported.nodes:
        if node in nodes and dynamic[node] and node.op == "call_function":
            if axes.flattens(node) or any(a in found for a in node.all_input_nodes):
                found.add(node)
    return found


class _Axes:
    def __init__(self, exported: Exported, dynamic: dict[fx.Node, bool]) -> None:
        self.pos, self.batch, self.dynamic = exported.pos, exported.batch, dynamic

    def keep(self, node: fx.Node) -> bool:
        """Whether a position of the output depends on that position of the inputs alone."""
        sources = [a for a in node.all_input_nodes if self.dynamic[a] and is_tensor(a)]
        if is_tensor(node) and shape_of(node).count(self.pos) != 1:
            return False
        if any(shape_of(a).count(self.pos) != 1 for a in sources):
            return False
        target = node.target
        if is_pointwise(node) or target in CASTS:
            return all(self._from_last(a) == self._from_last(node) for a in sources)
        if target in VIEW:
            return all(self._before(a) == self._before(node) for a in sources)
        if target is A.linear.default or target is A.matmul.default:
            return len(sources) == 1 and node.args[0] is sources[0] and self._from_last(sources[0]) < -1
        if target in LAST_AXES:
            size = len(argument(node, "normalized_shape") or [0])
            return all(self._from_last(a) < -size for a in sources)
        if target in ALONG:
            return all(self._is_free(a, _axes(node)) for a in sources)
        if target is A.stack.default or target is A.repeat_interleave.self_int:
            return target is A.stack.default or all(self._is_free(a, _axes(node)) for a in sources)
        return target in MOVES and all(self._is_free(a, _axes(node)) or _only_reorders(node) for a in sources)

    def flattens(self, node: fx.Node) -> bool:
        """Whether a node makes one list of the tokens of all prompts."""
        source = node.args[0] if node.args else None
        shape = shape_of(node)
        return (
            node.target in VIEW
            and shape_of(source)[:2] == (self.batch, self.pos)
            and sorted(shape[0].split("*")) == sorted((self.batch, self.pos))
            and shape[1:] == shape_of(source)[2:]
        )

    def _from_last(self, node: fx.Node) -> int:
        shape = shape_of(node)
        return shape.index(self.pos) - len(shape)

    def _before(self, node: fx.Node) -> tuple[str, ...]:
        """The axes up to the position: a view that keeps them keeps positions."""
        shape = shape_of(node)
        return shape[: shape.index(self.pos) + 1]

    def _is_free(self, node: fx.Node, axes: list[int]) -> bool:
        """Whether none of these axes is the position or the batch."""
        return all(shape_of(node)[a] not in (self.pos, self.batch) for a in axes)


def _only_reorders(node: fx.Node) -> bool:
    return node.target in {A.transpose.int, A.permute.default, A.unsqueeze.default}


def _axes(node: fx.Node) -> list[int]:
    """The axes that an operation names."""
    found = argument(node, "dim")
    if found is None:
        found = argument(node, "start_dim")
        return list(range(found, 0)) if isinstance(found, int) and found < 0 else [0] if found is not None else []
    return [found] if isinstance(found, int) else list(found)
