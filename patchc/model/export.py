"""From a module to a canonical ATen graph `ids [batch, pos] -> logits`, polymorphic in both sizes.

`torch.export` does the work; what it leaves over (no-ops, flat lists of tokens, flags, baked sizes) is brought to
one form here. What the graph means is `model.trace`'s work.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator
from torch.export import Dim

from patchc.diagnostics import PatchcError
from patchc.model.fuse import fuse_gelu
from patchc.model.linears import write_linears
from patchc.model.nodes import (
    CASTS,
    SDPA,
    VIEW,
    A,
    is_mutable,
    is_tensor,
    need,
    settle,
    shape_of,
)
from patchc.model.picks import write_slices
from patchc.model.unfit import refuse_other_inputs, refuse_without_attention, untraceable
from patchc.model.unflatten import unflatten_batch

COPIES = {
    A.expand.default,
    A.alias.default,
    A.detach.default,
    A.detach_.default,
    A.lift_fresh_copy.default,
    A.clone.default,
}
EXAMPLE = (2, 7)
"""Shape of the ids that are traced: unequal sizes above 1, so that neither becomes a constant."""


@dataclass(frozen=True)
class Exported:
    """A canonical graph. `batch` and `pos` are the symbols of the two sizes in the nodes' shapes; weights are
    attributes of `module` under flat names, and are the model's own tensors."""

    module: fx.GraphModule
    ids: fx.Node
    logits: fx.Node
    batch: str
    pos: str

    @cached_property
    def nodes(self) -> list[fx.Node]:
        return list(self.module.graph.nodes)


class Logits(nn.Module):
    """A model as a function of token ids alone: no cache, and nothing but the logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # A key/value cache would add lifted empty tensors and concatenations with them.
        self.kwargs = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}

    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(ids, **self.kwargs)
        found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        need(found is not None, f"a {type(self.model).__name__} gives no logits: it is a model without its head")
        return found  # type: ignore[return-value]


def export(model: nn.Module, *, blank: bool = False) -> Exported:
    """The canonical graph of a model in eval mode. Refuses what `torch.export` cannot follow. A `blank` model has no
    weights and cannot run; the graph is the same."""
    refuse_other_inputs(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    ids = torch.zeros(EXAMPLE, dtype=torch.long, device=device)
    sizes = {"ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    # no_grad: otherwise HF's rotary embedding becomes a higher-order op with a graph of its own.
    with torch.no_grad(), _quiet():
        try:
            # Run first as it is: a module that finishes building itself in its first forward pass would build
            # the tracer's stand-ins into itself (a TransformerLens bridge wires its hook points then).
            if not blank:
                Logits(model)(ids)
            program = torch.export.export(Logits(model), (ids,), strict=False, dynamic_shapes=sizes)
            if any(is_mutable(n) for n in program.graph.nodes):
                program = program.run_decompositions({})
        except PatchcError:
            raise
        except Exception as error:
            raise untraceable(model, error) from error
    need(not program.graph_signature.buffers_to_mutate, "a forward pass changes the model's buffers")
    module = _with_own_weights(program, model)
    return _canonical(module)


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Export remarks on what this stage checks itself, and where it fails it prints its whole graph."""
    loud = ("torch._export", "torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor")
    loggers = [logging.getLogger(name) for name in loud]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    nowhere = io.StringIO()
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _with_own_weights(program: torch.export.ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """The program's graph with its weight inputs replaced by attributes, the model's own tensors.

    Not `program.module()`: for a submodule called `in` that writes `self...in.weight`, which is no Python.
    """
    own: dict[str, Tensor] = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    signature = program.graph_signature
    source: dict[str, str] = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    root, graph = nn.Module(), program.graph
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in source:
            path = source[node.name]
            value: Any = own.get(path.removeprefix("model."))
            if value is None:
                value = program.constants[path]
            name = _attribute(path.removeprefix("model."), root)
            if isinstance(value, nn.Parameter):
                root.register_parameter(name, value)
            else:
                root.register_buffer(name, value)
            with graph.inserting_before(node):
                attribute = graph.create_node("get_attr", name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            graph.erase_node(node)
    for node in graph.find_nodes(op="get_attr"):
        need(hasattr(root, str(node.target)), "torch.export leaves a part of the model closed", node)
    return fx.GraphModule(root, graph)


def _attribute(path: str, root: nn.Module) -> str:
    """`transformer.h.0.attn.c_attn.weight` as a flat name that `root` does not have yet."""
    name = base = re.sub(r"\W", "_", path)
    while hasattr(root, name):
        name = f"{name}_{base.count('_')}"
    return name


def _canonical(module: fx.GraphModule) -> Exported:
    graph = module.graph
    ids = next(n for n in graph.nodes if n.op == "placeholder")
    need(len(shape_of(ids)) == 2, "the input is not a matrix of token ids")
    refuse_without_attention(graph)
    batch, pos = shape_of(ids)
    need(not batch.isdigit(), f"the model works for {batch} prompts at once only")
    need(
        not pos.isdigit(),
        f"the model as traced works for {pos} tokens only, as where a layer takes them one by one (state space)",
    )
    write_slices(module)
    Canonicaliser(graph, ids, batch, pos).run()
    fuse_gelu(graph)
    graph.eliminate_dead_code()
    graph.lint()
    logits = next(n for n in reversed(graph.nodes) if n.op == "output").args[0][0]
    need(
        shape_of(logits)[:2] == (batch, pos) and len(shape_of(logits)) == 3,
        "the logits are not [batch, pos, vocab]",
        logits,
    )
    for node in graph.nodes:
        settle(node)
    return Exported(module, ids, logits, batch, pos)


@dataclass
class Canonicaliser:
    """Brings each node of a graph to its one form, in place, in the graph's order."""

    graph: fx.Graph
    ids: fx.Node
    batch: str
    pos: str

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "call_module":  # export's own shape guards
                need(str(node.target).startswith("_guards"), "a call of a module", node)
                self.graph.erase_node(node)
            elif node.op == "call_function":
                self._tidy(node)
        unflatten_batch(self.graph, self.ids)
        write_linears(self.graph)
        self.graph.eliminate_dead_code()
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                self._rewrite(node)

    def _tidy(self, node: fx.Node) -> None:
        need(not isinstance(node.target, HigherOrderOperator), "a higher-order operation", node)
        need(not is_mutable(node), "an in-place operation", node)
        if node.target is A._assert_tensor_metadata.default:
            self.graph.erase_node(node)
        else:
            self._drop_no_op(node)

    def _drop_no_op(self, node: fx.Node) -> bool:
        if is_no_op := self._is_no_op(node):
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.graph.erase_node(node)
        return is_no_op

    def _rewrite(self, node: fx.Node) -> None:
        if self._drop_no_op(node):
            return
        if node.target in VIEW or node.target is A.expand.default:
            self._free_sizes(node)
        elif node.target is SDPA:
            self._attention(node)

    def _is_no_op(self, node: fx.Node) -> bool:
        """Whether the result is the first operand, if shape and type are; a slice of the whole, eval-mode dropout."""
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not is_tensor(node) or not is_tensor(source):
            return False
        if shape_of(source) != shape_of(node) or source.meta["val"].dtype != node.meta["val"].dtype:
            return False
        target, args = node.target, node.args
        if target is A.dropout.default:
            return not args[2]
        if target is A.slice.Tensor:
            return len(args) < 5 or bool(args[4] == 1)
        return target in CASTS | VIEW | COPIES

    def _free_sizes(self, node: fx.Node) -> None:
        """Every view as `reshape` (new operands have other strides), with -1 for the batch size and the
        length read from the input."""
        if node.target in VIEW:
            node.target = A.reshape.default
        shape = shape_of(node)
        if self.batch not in shape or (node.target is A.expand.default and shape_of(node.args[0])[:1] != (self.batch,)):
            return
        known = all(d in (self.batch, self.pos) or d.isdigit() for d in shape)
        need(shape.count(self.batch) == 1 and known, "a view that mixes the batch axis with others", node)
        with self.graph.inserting_before(node):
            length = self.graph.call_function(A.sym_size.int, (self.ids, 1)) if self.pos in shape else None
        sizes = [-1 if d == self.batch else length if d == self.pos else int(d) for d in shape]
        node.args = (node.args[0], sizes)

    def _attention(self, node: fx.Node) -> None:
        """No dropout; grouped heads repeated by an operation of their own; causality as a mask to be cut."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        need(not given.get("dropout_p"), "attention with dropout", node)
        query, key, value = (given[n] for n in names[:3])
        mask = given.get("attn_mask")
        with self.graph.inserting_before(node):
            if given.get("enable_gqa") and shape_of(query)[1] != shape_of(key)[1]:
                key, value = (self._repeated(x, shape_of(query)[1]) for x in (key, value))
            if given.get("is_causal"):
                mask = self._causal_mask(node)
        node.args = (query, key, value, mask)
        node.kwargs = {"scale": given["scale"]} if given.get("scale") is not None else {}

    def _repeated(self, x: fx.Node, heads: str) -> fx.Node:
        times = int(heads) // int(shape_of(x)[1])
        out = self.graph.call_function(A.repeat_interleave.self_int, (x, times, 1))
        out.meta = {**x.meta, "val": x.meta["val"].repeat_interleave(times, 1)}
        return out

    def _causal_mask(self, node: fx.Node) -> fx.Node:
        device = node.meta["val"].device
        length = self.graph.call_function(A.sym_size.int, (self.ids, 1))
        ones = self.graph.call_function(A.ones.default, ([length, length],), {"dtype": torch.bool, "device": device})
        mask = self.graph.call_function(A.tril.default, (ones,))
        size = self.ids.meta["val"].shape[1]
        for made in (ones, mask):
            made.meta = {"val": self.ids.meta["val"].new_ones((size, size), dtype=torch.bool)}
        return mask
