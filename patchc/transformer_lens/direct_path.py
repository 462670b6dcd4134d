"""Direct paths: what one head writes, patched in what one later head reads as its q, k or v, and nowhere else.

Path patching of single edges (Wang et al. 2022, arXiv:2211.00593), with TransformerLens' arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from patchc.ir.experiment import FromWorld, Given, Patch, Value
from patchc.ir.graph import Kind, Node, ResidualGraph
from patchc.ir.paths import Step
from patchc.progress import bars
from patchc.transformer_lens.activations import Activation
from patchc.transformer_lens.cells import NodePaths, Rows
from patchc.transformer_lens.errors import BAD_SWEEP, SweepError, SweepIndexError, failure
from patchc.transformer_lens.numbers import MetricFn, Metrics, measured
from patchc.transformer_lens.runs import CLEAN, CORRUPTED, Cache, Runs, entry, runs, same
from patchc.transformer_lens.traced import ANY_MODEL

COMPONENTS = ("q", "k", "v")
CELLS = 8192
"""Edges of one program."""

Edge = tuple[int, int, int, int]
"""Layer and head of the source, then of the head that reads it."""


def get_act_patch_direct_path(
    model: ANY_MODEL,
    corrupted_tokens: Tensor,
    clean_cache: Cache | Tensor,
    corrupted_cache: Cache | Tensor | None,
    patching_metric: MetricFn,
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """The metric with what one head writes patched, at every position, in one later head's input alone.

    What head B reads as its `component` ("q", "k" or "v") has the source's clean write in place of its corrupted one;
    every other reader of the source sees the corrupted one. With fewer KV heads than heads, `k` and `v` are that
    head's own view of its KV head.

    `clean_cache`, `corrupted_cache`: caches that have `blocks.{src_layer}.attn.hook_z`, or token ids `[batch, pos]`
    (None: the corrupted run's own). `patching_metric`: of the logits `[batch, pos, d_vocab]`, one number.
    Returns [layer, head], 0 where the layer is not above the source's.
    """
    found = runs(model, corrupted_tokens, clean_cache)
    graph = found.pieces.graph
    if not (-graph.n_layers <= src_layer < graph.n_layers and -graph.n_heads <= src_head < graph.n_heads):
        message = f"no head ({src_layer}, {src_head}): the model has {graph.n_layers} layers of {graph.n_heads} heads"
        raise failure(SweepIndexError, BAD_SWEEP, message)
    layer, head = src_layer % graph.n_layers, src_head % graph.n_heads
    edges = Edges(found, corrupted_cache, component, f"({layer}, {head}) -> .{component}", verbose)
    return edges.measured(patching_metric, [(layer, head)])[layer, head]


def get_act_patch_direct_path_all_sources(
    model: ANY_MODEL,
    corrupted_tokens: Tensor,
    clean_cache: Cache | Tensor,
    corrupted_cache: Cache | Tensor | None,
    patching_metric: MetricFn,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """`get_act_patch_direct_path` of every head: [source layer, source head, layer, head], in one sweep."""
    found = runs(model, corrupted_tokens, clean_cache)
    graph = found.pieces.graph
    edges = Edges(found, corrupted_cache, component, f"every head -> .{component}", verbose)
    return edges.measured(patching_metric, list(product(range(graph.n_layers), range(graph.n_heads))))


@dataclass
class Edges:
    """The edges into one component of every head."""

    found: Runs
    corrupted_cache: Any
    component: str
    name: str
    verbose: bool
    _values: dict[tuple[int, int], Value] = field(default_factory=dict[tuple[int, int], Value])
    _own: dict[int, bool] = field(default_factory=dict[int, bool])

    def __post_init__(self) -> None:
        if self.component not in COMPONENTS:
            message = f"component must be one of {COMPONENTS}, not {self.component!r}"
            raise failure(SweepError, BAD_SWEEP, message)
        self.paths = NodePaths(self.graph)
        self.tell = bars() if self.verbose else _silent

    @property
    def graph(self) -> ResidualGraph:
        return self.found.pieces.graph

    def measured(self, metric: MetricFn, sources: Sequence[tuple[int, int]]) -> Tensor:
        """`[layer, head, layer, head]` of these sources, 0 elsewhere."""
        n_layers, n_heads = self.graph.n_layers, self.graph.n_heads
        device = self.found.pieces.device
        out = torch.zeros(n_layers, n_heads, n_layers, n_heads, device=device)
        edges = list(self._edges(sources))
        metrics = Metrics({"metric": metric}, self.found.layout.n_prompts, per_example=False, any_shape=True)
        for first in range(0, len(edges), CELLS):
            some = edges[first : first + CELLS]
            rows = self._rows(some)
            numbers = measured(
                self.found,
                rows.patches,
                rows.tensors,
                metrics,
                lambda n, first=first: self.tell(self.name, first + n, len(edges)),
            )
            out[tuple(torch.tensor(some, device=device).T)] = numbers.values[0].to(out.dtype)
        return out

    def _edges(self, sources: Sequence[tuple[int, int]]) -> Iterator[Edge]:
        for (layer, head), to, reader in product(sources, range(self.graph.n_layers), range(self.graph.n_heads)):
            if to > layer and self._node(layer, head) and self._node(to, reader):
                yield layer, head, to, reader

    def _node(self, layer: int, head: int) -> Node | None:
        return self.graph.node(Kind.HEAD, layer, head)

    def _rows(self, edges: Sequence[Edge]) -> Rows:
        rows = Rows()
        for layer, head, to, reader in edges:
            source, target = self._node(layer, head), self._node(to, reader)
            assert source is not None
            assert target is not None
            enters = Step(1 << target.id, ports=1 << COMPONENTS.index(self.component))
            path = self.paths.edge(Step(1 << source.id), enters)
            rows.patches.append((Patch(path, self._value(layer, head, rows)),))
        return rows

    # ---- what the source writes
    def _value(self, layer: int, head: int, rows: Rows) -> Value:
        """The clean run's own, or what it has there itself and the difference of the two caches."""
        x = self.found.activation(f"blocks.{layer}.attn.hook_z")
        if layer not in self._own:
            self.found.check_place(x)
            self._own[layer] = self._are_own(x)
        if self._own[layer]:
            return Value(((1.0, FromWorld(CLEAN)),))
        key = f"head[{layer}, {head}], clean less corrupted"
        if key not in rows.tensors:
            x.refuse_post_norm()
            rows.keep(key, self._difference(x, head))
        return Value(((1.0, FromWorld(CORRUPTED)), (1.0, Given(key))))

    def _are_own(self, x: Activation) -> bool:
        """Whether both caches have what the runs themselves have."""
        corrupted = self._corrupted(x)
        return self.found.is_own(x) and (corrupted is None or same(corrupted, self.found.own(x, CORRUPTED), x))

    def _corrupted(self, x: Activation) -> Tensor | None:
        cache = self.corrupted_cache
        return None if cache is None or isinstance(cache, Tensor) else entry(cache, x.hook).detach()

    def _difference(self, x: Activation, head: int) -> Tensor:
        """What the head writes more in the clean run than in the corrupted one, `[token, d_model]`."""
        pieces, corrupted = self.found.pieces, self._corrupted(x)
        clean, corrupted = self.found.clean(x), self.found.own(x, CORRUPTED) if corrupted is None else corrupted
        shape = (x.n_batch, x.n_pos, clean.shape[-1])
        try:
            gap = (clean[:, :, head] - corrupted[:, :, head].to(clean.device)).expand(shape)
        except (RuntimeError, IndexError):
            shapes = f"{list(clean.shape)} and {list(corrupted.shape)}"
            message = f"the caches have {x.hook} of shapes {shapes}, and the tokens are {[x.n_batch, x.n_pos]}"
            raise failure(SweepError, BAD_SWEEP, message) from None
        with torch.no_grad():
            gap = gap.flatten(0, 1)[:, None].to(pieces.device, pieces.dtype)
            return pieces.write(x.layer, gap, [head])


def _silent(name: str, done: int, total: int) -> None:
    """No progress is shown."""
