"""A compiled graph on disk: `graph.json` (operations from an allow-list, typed arguments) and `tensors.safetensors`.

Nothing is pickled, and nothing that a file says becomes code. Weights are not saved: they are named, and taken from the
model at loading.
"""

from __future__ import annotations

import hashlib
import json
import keyword
import math
import operator
import os
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
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
CANNOT_SAVE = RULES.add("cannot-save-graph", "the system refused to write a graph", exit=3)

GRAPH, TENSORS = "graph.json", "tensors.safetensors"

OPERATORS = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "neg", "getitem")}
ATEN = frozenset(
    """_assert_tensor_metadata _softmax _to_copy _unsafe_view abs add addmm alias all amax any arange as_strided baddbmm
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
        "starts": list(graph.starts),
        "form": graph.form,
    }
    try:
        _write(directory, {**head, "weights": weights, "modules": modules}, tensors)
    except OSError as error:
        raise CANNOT_SAVE.error(f"{directory} cannot be written: {error.strerror or error}") from error
    return directory


def _write(directory: Path, content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        work = Path(folder)
        save_file(tensors, work / TENSORS)
        content["tensors_sha256"] = _hash(work / TENSORS)  # two files are not replaced at once: a mixed pair is noticed
        (work / GRAPH).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        for name in (TENSORS, GRAPH):
            os.replace(work / name, directory / name)


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_saved(directory: Path, model: LoadedModel) -> CompiledGraph:
    """The graph that `save_graph` wrote, over the model's own weights."""
    try:
        saved = json.loads((directory / GRAPH).read_text(encoding="utf-8"))
        tensors, tensors_hash = load_file(directory / TENSORS), _hash(directory / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise BAD_GRAPH.error(f"{directory} holds no graph that can be read: {error}") from None
    if not isinstance(saved, dict) or (saved.get("format"), saved.get("version")) != ("patchc-graph", 1):
        raise BAD_GRAPH.error(f"{directory} is not a graph that this patchc wrote")
    if saved.get("tensors_sha256") != tensors_hash:
        raise BAD_GRAPH.error(f"{GRAPH} and {TENSORS} in {directory} do not belong together")
    if saved.get("weights_fingerprint") != content_fingerprint(model.eager):
        raise OTHER_WEIGHTS.error(f"the graph in {directory} was compiled for other weights than those of {model.name}")
    try:
        return _built(saved, tensors, dict(_tensors_of(model.eager)), model.pieces.device)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, SyntaxError) as error:
        raise BAD_GRAPH.error(f"{directory / GRAPH} is damaged: {error}") from None


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def _built(
    saved: dict[str, Any], tensors: dict[str, Tensor], weights: dict[str, Tensor], device: torch.device
) -> CompiledGraph:
    values = {path: weights[name] for path, name in saved["weights"].items()}
    values |= {path: t.to(device) for path, t in tensors.items()}
    pieces = [path for path in saved["modules"] if path]
    _check_names(part for path in (*values, *pieces) for part in path.split("."))
    top = nn.Module()
    for piece in pieces:
        own = _below(values, piece)
        graph = _Reader(device, (), own).graph(saved["modules"][piece])
        top.add_module(piece, fx.GraphModule(_holding(nn.Module(), own), graph, piece))
    own = {path: value for path, value in values.items() if path.split(".")[0] not in pieces}
    graph = _Reader(device, pieces, own).graph(saved["modules"][""])
    out = CompiledGraph(_holding(top, own), graph, "CompiledGraph")
    out.worlds, out.mask_shape = tuple(saved["worlds"]), tuple(saved["mask_shape"])
    out.starts, out.form = tuple(saved["starts"]), str(saved["form"])
    return out


def _below(values: dict[str, Tensor], piece: str) -> dict[str, Tensor]:
    return {path.removeprefix(f"{piece}."): value for path, value in values.items() if path.startswith(f"{piece}.")}


def _check_names(names: Iterable[Any]) -> None:
    """fx writes names into the source of `forward`, as they are: only names may come from a file."""
    for name in names:
        if not (isinstance(name, str) and name.isidentifier()) or keyword.iskeyword(name) or name.startswith("__"):
            raise ValueError(f"{name!r} is no name")


def _holding(root: nn.Module, values: dict[str, Tensor]) -> nn.Module:
    for path, value in values.items():
        _attach(root, path, value)
    return root


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
    if isinstance(target, torch._ops.OpOverload) and str(target).split(".")[1] in ATEN:  # pyright: ignore[reportPrivateUsage]
        return str(target)
    raise NOT_SAVEABLE.error(f"the graph holds {target}, which a saved graph may not")


@dataclass
class _Reader:
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
            _check_names((n["name"], *kwargs))
            target = self.target(n["op"], n["target"])
            self.made[n["name"]] = graph.create_node(n["op"], target, args, kwargs, name=n["name"])
        graph.lint()
        return graph

    def target(self, op: str, target: Any) -> Any:
        if op == "call_function":
            return _function(target)
        _check_names(str(target).split("."))
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
