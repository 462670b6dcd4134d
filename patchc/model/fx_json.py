"""fx graphs as plain data: operations from an allow-list, typed arguments, names that are names.

Nothing that a file says becomes code. What a graph's attributes hold (weights, constants) is its owner's matter: saved
graphs and the cache of traces write with this and read with this.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from patchc.diagnostics import RULES

NOT_SAVEABLE = RULES.add("not-saveable", "a graph holds an operation that is not saved", exit=3)

OPERATORS = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "neg", "getitem")}
ATEN = frozenset(
    """_assert_tensor_metadata _softmax _to_copy _unsafe_view abs add addmm alias all amax any arange as_strided baddbmm
    bitwise_and bitwise_not bitwise_or bmm cat chunk clamp clamp_min clone contiguous cos cumsum detach diff div
    einsum embedding empty empty_like eq erf exp expand expand_as floor floor_divide flatten full full_like gather ge gelu
    gt histc index index_put index_select isinf layer_norm le lift_fresh_copy linear log logical_and logical_not logical_or lt
    masked_fill matmul max maximum mean min minimum mm mul narrow native_layer_norm ne neg new_ones new_zeros
    ones ones_like outer permute pow reciprocal relu repeat repeat_interleave reshape rms_norm rsqrt rsub
    scalar_tensor scaled_dot_product_attention select sigmoid silu sin slice softmax sort split split_with_sizes sqrt
    square squeeze stack sub sum sym_size t tanh to topk transpose tril triu type_as unbind unflatten unsqueeze var
    view where zeros zeros_like __and__ __or__""".split()
)
"""ATen operations that a saved graph may hold: functions of their arguments alone."""
EXPERTS = "transformers.grouped_mm_fallback.default"
"""The product of a list of tokens, sorted by expert, with a matrix for each, which transformers defines."""
TYPED: dict[str, Any] = {
    **{f"dtype:{str(d).removeprefix('torch.')}": d for d in vars(torch).values() if isinstance(d, torch.dtype)},
    "layout:strided": torch.strided,
    "format:contiguous": torch.contiguous_format,
    "format:preserve": torch.preserve_format,
}


def node_json(node: fx.Node) -> dict[str, Any]:
    args = [_json(a) for a in node.args]
    out: dict[str, Any] = {"op": node.op, "name": node.name, "target": _target_json(node), "args": args}
    return out if not node.kwargs else {**out, "kwargs": {k: _json(v) for k, v in node.kwargs.items()}}


def _target_json(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if OPERATORS.get(name) is target:
        return f"operator.{name}"
    if isinstance(target, torch._ops.OpOverload):  # pyright: ignore[reportPrivateUsage]
        kind, op, _ = str(target).split(".")
        if (kind == "aten" and op in ATEN) or str(target) == EXPERTS:
            return str(target)
    raise NOT_SAVEABLE.error(f"the graph holds {target}, which a saved graph may not")


@dataclass
class GraphReader:
    """Reads the nodes of one graph. `modules` and `values` are what it may call and read."""

    device: torch.device
    modules: Collection[str]
    values: Collection[str]
    made: dict[str, fx.Node] = field(default_factory=dict[str, fx.Node])

    def graph(self, nodes: list[dict[str, Any]]) -> fx.Graph:
        graph = fx.Graph()
        for n in nodes:
            args = tuple(self.value(a) for a in n["args"])
            kwargs = {name: self.value(a) for name, a in n.get("kwargs", {}).items()}
            check_names((n["name"], *kwargs))
            target = self.target(n["op"], n["target"])
            self.made[n["name"]] = graph.create_node(n["op"], target, args, kwargs, name=n["name"])
        graph.lint()
        return graph

    def target(self, op: str, target: Any) -> Any:
        if op == "call_function":
            return _function(target)
        check_names(str(target).split("."))
        known = {"call_module": self.modules, "get_attr": self.values, "output": ("output",)}
        if op != "placeholder" and target not in known.get(op, ()):
            raise ValueError(f"{op} of {target!r}")
        return target

    def value(self, saved: Any) -> Any:
        if isinstance(saved, list):
            return [self.value(v) for v in saved]
        if not isinstance(saved, dict):
            return saved
        ((kind, inner),) = saved.items()
        match kind:
            case "node":
                return self.made[inner]
            case "float":
                return float(inner)
            case "slice":
                return slice(*(self.value(v) for v in inner))
            case "tuple":
                return tuple(self.value(v) for v in inner)
            case "dict":
                return {k: self.value(v) for k, v in inner.items()}
            case "typed":
                return self.device if inner == "device" else TYPED[inner]
            case _:
                raise ValueError(f"argument of kind {kind!r}")


def _function(name: str) -> Any:
    kind, op, *overload = name.split(".")
    if name == EXPERTS:
        importlib.import_module("transformers.integrations.moe")  # defines it
        return torch.ops.transformers.grouped_mm_fallback.default
    if kind == "operator" and op in OPERATORS and not overload:
        return OPERATORS[op]
    if kind == "aten" and op in ATEN and len(overload) == 1:
        packet = getattr(torch.ops.aten, op)
        if overload[0] in packet.overloads():
            return getattr(packet, overload[0])
    raise ValueError(f"function {name!r} is not allowed in a saved graph")


# ---- arguments


def _json(value: Any) -> Any:
    match value:
        case fx.Node():
            return {"node": value.name}
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case slice():
            return {"slice": [_json(value.start), _json(value.stop), _json(value.step)]}
        case torch.device():
            return {"typed": "device"}
        case dict():
            return {"dict": {k: _json(v) for k, v in value.items()}}
        case tuple():
            return {"tuple": [_json(v) for v in value]}
        case list():
            return [_json(v) for v in value]
        case _:
            found = next((name for name, typed in TYPED.items() if typed is value), None)
            if found is None:
                raise NOT_SAVEABLE.error(f"the graph holds an argument of type {type(value).__name__}")
            return {"typed": found}


# ---- names


def check_names(names: Iterable[Any]) -> None:
    """fx writes names into the source of `forward`, as they are: only names may come from a file."""
    for name in names:
        if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name) or name.startswith("__"):
            raise ValueError(f"{name!r} is no name")
