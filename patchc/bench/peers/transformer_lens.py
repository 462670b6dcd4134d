"""TransformerLens: its own `patching` functions where there is one for the work, else a plain loop over its hooks.

Its functions are given the cells as rows of a table, so that some of a sweep can be run; a cell costs them one hooked
forward pass, whichever it is.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from functools import cached_property
from io import StringIO
from typing import Any

import torch
from torch import Tensor

from patchc.bench.measure import timed
from patchc.bench.peers import Coords, Module, Session, Task
from patchc.bench.works import DIRECT_PATHS, PATHS_TO_QUERY, Work


class TransformerLens:
    """A bridge around a model of its own."""

    name = "transformer-lens"

    def __init__(self, module: Module):
        self._module = module

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("transformer_lens") else "transformer-lens is not installed"

    def does(self, work: Work) -> bool:
        return True

    @cached_property
    def bridge(self) -> Any:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        module: Any = self._module()
        bridge: Any = build_bridge_from_module(module, "GPT2LMHeadModel", hf_config=module.config)
        return bridge.eval()

    def open(self, task: Task) -> Session:
        kind = {DIRECT_PATHS: DirectPaths, PATHS_TO_QUERY: PathsToQuery}.get(task.work.transformer_lens, Function)
        return kind(self.bridge, task)


class _Cached:
    """What all have: the runs of both worlds, or of the clean one, cached."""

    def __init__(self, bridge: Any, task: Task):
        self.bridge, self.task, self.worlds = bridge, task, task.worlds
        _, self.fixed_s = timed(self._fill)

    def _fill(self) -> None:
        self.clean = self._cache(self.worlds.clean)

    def _cache(self, tokens: Tensor) -> Any:
        with torch.no_grad():
            return self.bridge.run_with_cache(tokens)[1]

    def run(self, cells: Sequence[Coords]) -> tuple[list[float], float]:
        with torch.no_grad():
            return timed(lambda: self.values(cells))

    def values(self, cells: Sequence[Coords]) -> list[float]:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def hooked(self, hooks: list[tuple[str, Callable[..., Tensor | None]]]) -> float:
        return float(self.worlds.difference(self.bridge.run_with_hooks(self.worlds.corrupt, fwd_hooks=hooks)))


class Function(_Cached):
    """A function of `transformer_lens.patching`."""

    def values(self, cells: Sequence[Coords]) -> list[float]:
        import pandas as pd
        from transformer_lens import patching

        function: Any = getattr(patching, self.task.work.transformer_lens)
        rows = pd.DataFrame([[cell[i] for i in self.task.work.axes] for cell in cells])
        settings = {**function.keywords, "index_axis_names": None, "index_df": rows}
        with redirect_stderr(StringIO()):  # its progress bar
            found: Tensor = function.func(
                self.bridge, self.worlds.corrupt, self.clean, self.worlds.difference, **settings
            )
        return found.tolist()


class PathsToQuery(_Cached):
    """From a head through MLPs to one head's query, as path patching is done: a pass with every other head frozen,
    which gives the query, and one with that query."""

    def _fill(self) -> None:
        super()._fill()
        self.corrupt = self._cache(self.worlds.corrupt)
        self.layer, self.head = self.task.shape.receiver

    def values(self, cells: Sequence[Coords]) -> list[float]:
        return [self._through(int(layer), int(head)) for layer, head in cells]

    def _through(self, layer: int, head: int) -> float:
        query = self._query(layer, head)
        at = f"blocks.{self.layer}.attn.hook_q"

        def put(found: Tensor, hook: Any) -> Tensor:
            found[:, :, self.head] = query
            return found

        return self.hooked([(at, put)])

    def _query(self, layer: int, head: int) -> Tensor:
        read: list[Tensor] = []
        frozen = [self._frozen(i, head if i == layer else None) for i in range(self.layer)]

        def keep(found: Tensor, hook: Any) -> None:
            read.append(found[:, :, self.head].clone())

        self.hooked([*frozen, (f"blocks.{self.layer}.attn.hook_q", keep)])
        return read[0]

    def _frozen(self, layer: int, sender: int | None) -> tuple[str, Callable[..., Tensor]]:
        name = f"blocks.{layer}.attn.hook_z"  # not the name that the hook is told, which is an alias

        def freeze(found: Tensor, hook: Any) -> Tensor:
            found[:] = self.corrupt[name]
            if sender is not None:
                found[:, :, sender] = self.clean[name][:, :, sender]
            return found

        return name, freeze


class DirectPaths(_Cached):
    """Edges, as `patching.get_act_patch_direct_path` does them: what a writer wrote in the clean run less in the
    corrupt one is added to what one reader alone reads."""

    def _fill(self) -> None:
        super()._fill()
        self.corrupt = self._cache(self.worlds.corrupt)
        self._deltas: dict[str, Tensor] = {}

    def values(self, cells: Sequence[Coords]) -> list[float]:
        was = bool(self.bridge.cfg.use_split_qkv_input)
        self.bridge.set_use_split_qkv_input(True)
        try:
            return [self._edge(str(writer), str(reader)) for writer, reader in cells]
        finally:
            self.bridge.set_use_split_qkv_input(was)

    def _edge(self, writer: str, reader: str) -> float:
        delta = self._delta(writer)
        at, head = _input_of(reader)

        def add(found: Tensor, hook: Any) -> Tensor:
            if head is None:
                return found + delta
            changed = found.clone()
            changed[:, :, head] += delta
            return changed

        return self.hooked([(at, add)])

    def _delta(self, writer: str) -> Tensor:
        """What a writer adds to the stream, clean less corrupt, `[prompt, pos, d_model]`."""
        if writer not in self._deltas:
            self._deltas[writer] = self._written(writer, self.clean) - self._written(writer, self.corrupt)
        return self._deltas[writer]

    def _written(self, writer: str, cache: Any) -> Tensor:
        numbers = [int(n) for n in re.findall(r"\d+", writer)]
        if writer == "input":
            return cache["blocks.0.hook_resid_pre"]
        if writer.startswith("mlp"):
            return cache[f"blocks.{numbers[0]}.hook_mlp_out"]
        layer, head = numbers
        return cache[f"blocks.{layer}.attn.hook_z"][:, :, head] @ self.bridge.blocks[layer].attn.W_O[head]


def _input_of(reader: str) -> tuple[str, int | None]:
    """The hook at what a reader alone reads, and the head's number in it."""
    numbers = [int(n) for n in re.findall(r"\d+", reader)]
    if reader == "logits":
        return "ln_final.hook_in", None
    if reader.startswith("mlp"):
        return f"blocks.{numbers[0]}.ln2.hook_in", None
    return f"blocks.{numbers[0]}.attn.hook_{reader[-1]}_input", numbers[1]
