"""Traces kept on disk: a model that was traced and proved before, on this machine by this code, is not again.

Kept are the canonical graph, as plain data, and what the proof found out; weights are named, not kept. The key holds
the module's classes and settings and every weight's content, so that nothing that was proved has changed since.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from patchc.diagnostics import PatchcError
from patchc.model.cache import keep_entry, makers, read_entry
from patchc.model.configs import config_context
from patchc.model.export import Exported
from patchc.model.fx_json import NOT_SAVEABLE, TYPED, GraphReader, check_names, node_json
from patchc.model.identity import identity
from patchc.model.nodes import dtype_of, is_tensor, path_of, shape_of
from patchc.model.pieces import TracedPieces
from patchc.model.trace import trace

FORMAT = 1
KIND = "traces"
DTYPES = {dtype: name for name, dtype in TYPED.items() if isinstance(dtype, torch.dtype)}


def trace_key(model: nn.Module, content: str) -> dict[str, Any] | None:
    """All that a proved trace follows from, `content` being the weights' fingerprint; None for a module whose code may
    compute anything."""
    told = identity(model)
    if told is None:
        return None
    return {
        "format": FORMAT,
        "module": told,
        "weights": content,
        "device": str(next(model.parameters()).device),
        "default_dtype": str(torch.get_default_dtype()),
        **makers(),
    }


# ---- writing


def keep_trace(key: dict[str, Any], pieces: TracedPieces, model: nn.Module) -> None:
    """Keep proved pieces of a model under a key; nothing is kept of a graph that plain data cannot hold."""
    exported = pieces.structure.exported
    try:
        graph = [_node(n, pieces.device) for n in exported.nodes]
    except PatchcError:
        return
    weights, constants = _attributes(exported.module, model)
    content = {
        "graph": graph,
        "batch": exported.batch,
        "pos": exported.pos,
        "weights": weights,
        "causal": pieces.graph.causal,
        "not_apart": [[what, layer, why] for (what, layer), why in pieces.not_apart.items()],
    }
    keep_entry(KIND, key, content, safetensors.torch.save(constants) if constants else b"")


def _node(node: fx.Node, device: torch.device) -> dict[str, Any]:
    map_aggregate((node.args, node.kwargs), lambda a: _only_on(device, a))
    told = [list(shape_of(node)), DTYPES[dtype_of(node)]] if is_tensor(node) else None
    return {**node_json(node), "path": path_of(node), "tensor": told}


def _only_on(device: torch.device, argument: Any) -> None:
    """A graph as plain data has one device."""
    if isinstance(argument, torch.device) and argument.type != device.type:
        raise NOT_SAVEABLE.error(f"the graph makes tensors on {argument} beside a model on {device}")


def _attributes(module: fx.GraphModule, model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor]]:
    """A graph's attributes: those that are the model's own, by the model's name for them, and the others."""
    names = {id(tensor): name for name, tensor in model_tensors(model).items()}
    weights: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    for attribute, value in model_tensors(module).items():
        if id(value) in names:
            weights[attribute] = names[id(value)]
        else:
            constants[attribute] = value.detach().contiguous().clone()
    return weights, constants


def computed(exported: Exported, model: nn.Module) -> tuple[str, dict[str, str], dict[str, Tensor]]:
    """What a graph computes, whether it was traced or read: its code, and what that reads, the model's weights by
    their names in the model, and constants."""
    # A module's own code may be from before its graph was made canonical, and it may hold what nothing reads.
    read = {node.target for node in exported.module.graph.find_nodes(op="get_attr")}
    weights, constants = _attributes(exported.module, model)
    for attribute in {*weights, *constants} - read:
        weights.pop(attribute, None)
        constants.pop(attribute, None)
    return exported.module.graph.python_code("self").src, weights, constants


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


# ---- reading


def read_trace(key: dict[str, Any], model: nn.Module, name: str) -> TracedPieces | None:
    """The pieces that were kept under a key, over the model's own weights; None where there are none or the entry is
    damaged."""
    found = read_entry(KIND, key)
    if found is None:
        return None
    try:
        return _pieces(*found, model, name)
    except (PatchcError, KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, SafetensorError):
        return None


def _pieces(content: dict[str, Any], tensors: bytes, model: nn.Module, name: str) -> TracedPieces:
    structure = trace(_exported(content, safetensors.torch.load(tensors) if tensors else {}, model))
    graph = structure.graph(name, config_context(model), causal=bool(content["causal"]))
    pieces = TracedPieces(structure, graph)
    pieces.not_apart = {(str(what), int(layer)): str(why) for what, layer, why in content["not_apart"]}
    return pieces


def _exported(content: dict[str, Any], constants: Mapping[str, Tensor], model: nn.Module) -> Exported:
    device = next(model.parameters()).device
    own = model_tensors(model)
    values = {name: own[weight] for name, weight in content["weights"].items()}
    values |= {name: constant.to(device) for name, constant in constants.items()}
    check_names(values)
    root = nn.Module()
    for name, value in values.items():
        if isinstance(value, nn.Parameter):
            root.register_parameter(name, value)
        else:
            root.register_buffer(name, value)
    module = fx.GraphModule(root, GraphReader(device, (), values).graph(content["graph"]))
    nodes = list(module.graph.nodes)
    for node, saved in zip(nodes, content["graph"], strict=True):
        node.meta = _meta(saved)
    (ids,) = module.graph.find_nodes(op="placeholder")
    return Exported(module, ids, nodes[-1].args[0][0], content["batch"], content["pos"])


def _meta(saved: dict[str, Any]) -> dict[str, Any]:
    if saved["tensor"] is None:
        return {"path": saved["path"]}
    shape, dtype = saved["tensor"]
    return {"path": saved["path"], "shape": tuple(map(str, shape)), "dtype": TYPED[dtype]}
