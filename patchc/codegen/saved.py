"""A compiled graph on disk: `graph.json` (operations from an allow-list, typed arguments) and `tensors.safetensors`.

Nothing is pickled, and nothing that a file says becomes code. Weights are not saved: they are named, and taken from the
model at loading.
"""

from __future__ import annotations

import hashlib
import json
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
from patchc.model.fx_json import GraphReader, check_names, node_json
from patchc.model.load import LoadedModel
from patchc.model.state import content_fingerprint

BAD_GRAPH = RULES.add("bad-graph", "a saved graph is missing, damaged or of another format", exit=3)
OTHER_WEIGHTS = RULES.add("other-weights", "a saved graph belongs to other weights than the model's", exit=3)
CANNOT_SAVE = RULES.add("cannot-save-graph", "the system refused to write a graph", exit=3)

GRAPH, TENSORS = "graph.json", "tensors.safetensors"


def save_graph(graph: CompiledGraph, directory: Path, model: LoadedModel) -> Path:
    """Write a graph into `directory`, whole or not at all."""
    names = {id(t): name for name, t in _tensors_of(model.eager)}
    modules, weights, tensors = {}, {}, {}
    for path, module in graph.named_modules():
        if isinstance(module, fx.GraphModule):
            modules[path] = [node_json(n) for n in module.graph.nodes]
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
    check_names(part for path in (*values, *pieces) for part in path.split("."))
    top = nn.Module()
    for piece in pieces:
        own = _below(values, piece)
        graph = GraphReader(device, (), own).graph(saved["modules"][piece])
        top.add_module(piece, fx.GraphModule(_holding(nn.Module(), own), graph, piece))
    own = {path: value for path, value in values.items() if path.split(".")[0] not in pieces}
    graph = GraphReader(device, pieces, own).graph(saved["modules"][""])
    out = CompiledGraph(_holding(top, own), graph, "CompiledGraph")
    out.worlds, out.mask_shape = tuple(saved["worlds"]), tuple(saved["mask_shape"])
    out.starts, out.form = tuple(saved["starts"]), str(saved["form"])
    return out


def _below(values: dict[str, Tensor], piece: str) -> dict[str, Tensor]:
    return {path.removeprefix(f"{piece}."): value for path, value in values.items() if path.startswith(f"{piece}.")}


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
