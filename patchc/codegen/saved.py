"""A compiled graph on disk: `graph.json` (operations from an allow-list, typed arguments) and `tensors.safetensors`.

Nothing is pickled and nothing is evaluated. Weights are not saved: they are named, and taken from the model at loading.
"""

from __future__ import annotations

import json
import math
import operator
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import patchc
from patchc.codegen.emit import CompiledGraph
from patchc.diagnostics import RULES
from patchc.model.load import LoadedModel
from patchc.model.state import content_fingerprint

BAD_GRAPH = RULES.add("bad-graph", "a saved graph is missing, damaged or of another format", exit=3)
OTHER_WEIGHTS = RULES.add("other-weights", "a saved graph belongs to other weights than the model's", exit=3)
NOT_SAVEABLE = RULES.add("not-saveable", "a graph holds an operation that is not saved", exit=3)

OPERATORS = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "neg", "getitem")}
ATEN = frozenset(
    """_assert_tensor_metadata _softmax _to_copy _unsafe_view abs add addmm alias all any arange as_strided baddbmm
    bitwise_and bitwise_not bitwise_or bmm cat chunk clamp clamp_min clone contiguous cos cumsum detach diff div
    einsum embedding empty eq erf exp expand expand_as floor floor_divide flatten full full_like gather ge gelu
    gt index index_select isinf layer_norm le lift_fresh_copy linear log logical_and logical_not logical_or lt
    masked_fill matmul max maximum mean min minimum mm mul narrow native_layer_norm ne neg new_ones new_zeros
    ones ones_like outer permute pow reciprocal relu repeat repeat_interleave reshape rms_norm rsqrt rsub
    scalar_tensor scaled_dot_product_attention select sigmoid silu sin slice softmax split split_with_sizes sqrt
    square squeeze stack sub sum sym_size t tanh to transpose tril triu type_as unbind unflatten unsqueeze var
    view where zeros zeros_like __and__ __or__""".split()
)
"""ATen operations that a saved graph may hold: functions of their arguments alone."""
TYPED: dict[str, Any] = {
    **{f"dtype:{str(d).removeprefix('torch.')}": d for d in vars(torch).values() if isinstance(d, torch.dtype)},
    "layout:strided": torch.strided,
    "format:contiguous": torch.contiguous_format,
    "format:preserve": torch.preserve_format,
}


def save_graph(graph: CompiledGraph, directory: Path, model: LoadedModel) -> Path:
    """Write a graph into `directory`, whole or not at all."""
    names = {id(t): name for name, t in _tensors_of(model.eager)}
    modules, weights, tensors = {}, {}, {}
    for path, module in graph.named_modules():
        if isinstance(module, fx.GraphModule):
            modules[path] = [_node_json(n) for n in module.graph.nodes]
            for n in module.graph.find_nodes(op="get_attr"):
                full = f"{path}.{n.target}".lstrip(".")
                value = operator.attrgetter(str(n.target))(module)
                if id(value) in names:
                    weights[full] = names[id(value)]
                else:
                    tensors[full] = value.detach().contiguous().clone()
    head = {
        "format": "patchc-graph",
        "version": 1,
        "patchc": patchc.__version__,
        "torch": torch.__version__,
        "weights_fingerprint": content_fingerprint(model.eager),
        "worlds": list(graph.worlds),
        "mask_shape": list(graph.mask_shape),
    }
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as work:
        save_file(tensors, Path(work) / "tensors.safetensors")
        text = json.dumps({**head, "weights": weights, "modules": modules}, allow_nan=False)
        (Path(work) / "graph.json").write_text(text, encoding="utf-8")
        for name in ("tensors.safetensors", "graph.json"):
            os.replace(Path(work) / name, directory / name)
    return directory


def load_saved(directory: Path, model: LoadedModel) -> CompiledGraph:
    """The graph that `save_graph` wrote, over the model's own weights."""
    try:
        saved = json.loads((directory / "graph.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "tensors.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise BAD_GRAPH.error(f"{directory} holds no graph that can be read: {error}") from None
    if saved.get("format") != "patchc-graph" or saved.get("version") != 1:
        raise BAD_GRAPH.error(f"{directory} is not a graph that this patchc wrote")
    if saved["weights_fingerprint"] != content_fingerprint(model.eager):
        raise OTHER_WEIGHTS.error(f"the graph in {directory} was compiled for other weights than those of {model.name}")
    try:
        return _built(saved, tensors, dict(_tensors_of(model.eager)), model.pieces.device)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise BAD_GRAPH.error(f"{directory / 'graph.json'} is damaged: {error}") from None


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _built(
    saved: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Tensor], device: torch.device
) -> CompiledGraph:
    roots = {path: nn.Module() for path in saved["modules"]}
    values = {path: weights[name] for path, name in saved["weights"].items()}
    values |= {path: t.to(device) for path, t in tensors.items()}
    for full, value in values.items():
        path = max((p for p in roots if full.startswith(f"{p}." if p else "")), key=len)
        _attach(roots[path], full[len(path) :].lstrip("."), value)
    top = roots.pop("")
    for path, root in roots.items():
        top.add_module(path, fx.GraphModule(root, _graph_of(saved["modules"][path]), path))
    out = CompiledGraph(top, _graph_of(saved["modules"][""]), "CompiledGraph")
    out.worlds, out.mask_shape = tuple(saved["worlds"]), tuple(saved["mask_shape"])
    return out


def _attach(root: nn.Module, path: str, value: Tensor) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    if isinstance(value, nn.Parameter):
        root.register_parameter(last, value)
    else:
        root.register_buffer(last, value)


# ---- graphs


def _node_json(node: fx.Node) -> dict[str, Any]:
    out = {"op": node.op, "name": node.name, "target": _target_json(node), "args": _json(node.args)}
    return out if not node.kwargs else {**out, "kwargs": _json(dict(node.kwargs))}


def _target_json(node: fx.Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    target: Any = node.target
    name = getattr(target, "__name__", "")
    if OPERATORS.get(name) is target:
        return f"operator.{name}"
    if isinstance(target, torch._ops.OpOverload) and str(target).split(".")[1] in ATEN:  # pyright: ignore[reportPrivateUsage]
        return str(target)
    raise NOT_SAVEABLE.error(f"the graph holds {target}, which a saved graph may not")


def _graph_of(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for n in nodes:
        args, kwargs = _value(n["args"], made), _value(n.get("kwargs", {"dict": {}}), made)
        if n["op"] not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise ValueError(f"operation {n['op']!r}")
        target = _function(n["target"]) if n["op"] == "call_function" else n["target"]
        made[n["name"]] = graph.create_node(n["op"], target, tuple(args), kwargs, name=n["name"])
    graph.lint()
    return graph


def _function(name: str) -> Any:
    kind, op, *overload = name.split(".")
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
        case tuple() | list():
            return [_json(v) for v in value]
        case _:
            found = next((name for name, typed in TYPED.items() if typed is value), None)
            if found is None:
                raise NOT_SAVEABLE.error(f"the graph holds an argument of type {type(value).__name__}")
            return {"typed": found}


def _value(saved: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(saved, list):
        return [_value(v, made) for v in saved]
    if not isinstance(saved, dict):
        return saved
    ((kind, inner),) = saved.items()
    match kind:
        case "node":
            return made[inner]
        case "float":
            return float(inner)
        case "slice":
            return slice(*(_value(v, made) for v in inner))
        case "dict":
            return {k: _value(v, made) for k, v in inner.items()}
        case "typed":
            return torch.device("cpu") if inner == "device" else TYPED[inner]
        case _:
            raise ValueError(f"argument of kind {kind!r}")
