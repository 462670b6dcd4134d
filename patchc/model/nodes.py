"""Reading nodes of a traced ATen graph: shapes, module paths, kinds of operations, and how to refuse one.

Knows nothing of residual streams or attention; every other file of this stage reads graphs through it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from patchc.diagnostics import RULES, PatchcError

NOT_UNDERSTOOD = RULES.add(
    "model-not-understood",
    "the model is not a pre-norm decoder whose writers add into one residual stream",
    exit=3,
)

A = torch.ops.aten
SDPA = A.scaled_dot_product_attention.default
SOFTMAX = {A.softmax.int, A._softmax.default}
MATMUL = {A.matmul.default, A.bmm.default}
VIEW = {A.view.default, A.reshape.default, A._unsafe_view.default}
SAME_MEMORY_ORDER = {A.contiguous.default, A.clone.default}
CASTS = {A.to.dtype, A.to.dtype_layout, A.to.device, A.to.other, A.type_as.default, A._to_copy.default}
FILLS = {A.zeros_like.default, A.ones_like.default, A.full_like.default}
MOVES = (
    VIEW
    | SAME_MEMORY_ORDER
    | {
        A.transpose.int,
        A.permute.default,
        A.split.Tensor,
        A.split_with_sizes.default,
        A.chunk.default,
        A.slice.Tensor,
        A.select.int,
        A.unsqueeze.default,
        A.squeeze.dim,
        A.unbind.int,
        operator.getitem,
        A.flatten.using_ints,
        A.unflatten.int,
    }
)
"""Operations that only move numbers, each to one place at most."""
REPEATS = (
    VIEW | SAME_MEMORY_ORDER | {A.unsqueeze.default, A.expand.default, A.repeat.default, A.repeat_interleave.self_int}
)
"""Operations by which grouped keys and values become one per query head."""


def need(ok: object, why: str, node: fx.Node | None = None) -> None:
    """Refuse the model unless `ok`, naming the place of `node`."""
    if not ok:
        raise refusal(why, node)


def refusal(why: str, node: fx.Node | None = None) -> PatchcError:
    """The error that refuses a model, naming the place of `node`."""
    return NOT_UNDERSTOOD.error(why if node is None else f"{why}: {place(node)}")


def place(node: fx.Node) -> str:
    """Where an operation stands, for a reader of the model's code."""
    module = path_of(node)
    return f"`{op_name(node)}`" + (f" in module `{module}`" if module else " at the model's top level")


def op_name(node: fx.Node) -> str:
    """`layer_norm` for `aten.layer_norm.default`."""
    name = getattr(node.target, "_schema", None)
    return name.name.split("::")[-1] if name is not None else getattr(node.target, "__name__", str(node.target))


def path_of(node: fx.Node) -> str:
    """Dotted path of the innermost module that made the node; empty at the top."""
    if "path" in node.meta:
        return node.meta["path"]
    stack: list[Any] = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path = re.sub(r"^L\['self'\]\.?|\.slice\([^)]*\)", "", str(stack[-1][0]))
    return path.removeprefix("model").removeprefix(".")


def shape_of(node: object) -> tuple[str, ...]:
    """Symbolic shape as strings; comparing SymInts directly could install guards."""
    if not isinstance(node, fx.Node):
        return ()
    if "shape" in node.meta:
        return node.meta["shape"]
    value = node.meta.get("val")
    return tuple(str(d) for d in value.shape) if isinstance(value, Tensor) else ()


def is_tensor(node: fx.Node) -> bool:
    return "shape" in node.meta or isinstance(node.meta.get("val"), Tensor)


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node that is a tensor."""
    return node.meta["dtype"] if "dtype" in node.meta else node.meta["val"].dtype


def settle(node: fx.Node) -> None:
    """Keep of what export says of a node what this stage reads, as plain data: shape, dtype and path."""
    told: dict[str, Any] = {"path": path_of(node)}
    if is_tensor(node):
        told |= {"shape": shape_of(node), "dtype": dtype_of(node)}
    node.meta = told


def is_mutable(node: fx.Node) -> bool:
    """An in-place operation; `detach_` of a lifted constant is harmless."""
    return node.target is not A.detach_.default and bool(
        getattr(getattr(node.target, "_schema", None), "is_mutable", False)
    )


def is_pointwise(node: fx.Node) -> bool:
    """Whether each entry of the result is computed from that entry of the operands."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in CASTS | FILLS


def argument(node: fx.Node, name: str) -> Any:
    """An argument by its name in the operation's schema, its default where it is not given."""
    schema = getattr(node.target, "_schema", None)
    for i, known in enumerate(schema.arguments if schema is not None else ()):
        if known.name in (name, f"{name}s"):
            return node.args[i] if i < len(node.args) else node.kwargs.get(known.name, known.default_value)
    return None


def reads_input(node: fx.Node) -> bool:
    """Whether a value depends on the input or its size, and not on weights alone."""
    return any(n.op == "placeholder" for n in cone(node))


def cone(node: fx.Node, stop: Collection[fx.Node] = ()) -> set[fx.Node]:
    """`node` and all that it is computed from; members of `stop` (but `node`) are included, not crossed."""
    seen: set[fx.Node] = set()
    todo = [node]
    while todo:
        n = todo.pop()
        if n not in seen:
            seen.add(n)
            if n is node or n not in stop:
                todo += n.all_input_nodes
    return seen


def evaluate(node: fx.Node, env: dict[fx.Node, Any], root: torch.nn.Module) -> Any:
    """The value of a small graph above `node`; `env` holds what is given and keeps what is computed."""
    todo = [node]
    while todo:
        n = todo[-1]
        if n in env:
            todo.pop()
        elif n.op == "get_attr":
            env[n] = getattr(root, str(n.target))
        elif missing := [a for a in n.all_input_nodes if a not in env]:
            todo += missing
        else:
            need(callable(n.target), "a value that is not computed from the input", n)
            args, kwargs = (map_arg(part, env.__getitem__) for part in (n.args, n.kwargs))
            env[n] = n.target(*args, **kwargs)  # type: ignore[operator, misc]
    return env[node]


def single(nodes: Iterable[fx.Node], why: str, at: fx.Node) -> fx.Node:
    """The only member, or a refusal."""
    found = list(nodes)
    need(len(found) == 1, why, at)
    return found[0]
