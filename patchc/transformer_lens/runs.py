"""A corrupted run, and a clean one where its tokens are known: what a call's sweeps have in common.

Says of each activation of a cache whether it is the clean run's own, so that the run itself can be patched in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from patchc.execute.base import PlainRun, run_world
from patchc.execute.patterns import PlainRows
from patchc.execute.stored import Stored
from patchc.ir.experiment import Prompts, World
from patchc.ir.graph import Block, ResidualGraph
from patchc.ir.tokens import Layout
from patchc.transformer_lens.activations import Activation, Shape, activation, parsed
from patchc.transformer_lens.errors import (
    BAD_SWEEP,
    NO_ACTIVATION,
    OTHER_ACTIVATION,
    SweepError,
    SweepIndexError,
    SweepNameError,
    failure,
)
from patchc.transformer_lens.traced import ANY_MODEL, Traced, traced

CORRUPTED, CLEAN = "corrupted", "clean"
TOKENS = "embed.hook_in"
"""Where a bridge's cache has the ids that were run."""

Cache = Mapping[str, Tensor]
"""What is asked of a cache: `ActivationCache` and plain dicts both have it."""


@dataclass
class Runs:
    """The runs of one call, by world; `cache`: the clean activations that were given, None where clean tokens were.
    `gradients`: whether they were on when it was called."""

    model: Traced
    prompts: Prompts
    cache: Cache | None
    gradients: bool = True
    runs: dict[str, PlainRun] = field(default_factory=dict[str, PlainRun])
    _same: dict[str, bool] = field(default_factory=dict[str, bool])
    _clean: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def layout(self) -> Layout:
        return self.prompts.layout

    @property
    def pieces(self) -> Any:
        return self.model.loaded.pieces

    @property
    def knows_clean(self) -> bool:
        """Whether the clean tokens are known, and as many as the corrupted ones."""
        return len(self.prompts.worlds) > 1

    @cached_property
    def tables(self) -> Any:
        return self.pieces.tables(self.layout)

    def run(self, world: str) -> PlainRun:
        """A world's plain run; made when first asked for."""
        if world not in self.runs:
            with torch.no_grad():
                self.runs[world] = run_world(self.pieces, self.prompts.world(world), self.layout, self.tables)
        return self.runs[world]

    # ---- activations
    def activation(self, hook: str) -> Activation:
        return activation(hook, self.pieces, self.layout, self.gradients and self.mid_is_of_mlp)

    @cached_property
    def mid_is_of_mlp(self) -> bool:
        """A bridge's `hook_resid_mid` is another name of the hook on what its MLP reads, before the norm: setting it
        leaves the stream beside the MLP as it is. Without gradients, what is written in place is in the stream too."""
        blocks = getattr(self.model.bridge, "blocks", None)
        aliases = getattr(blocks[0], "hook_aliases", {}) if blocks is not None and len(blocks) else {}
        return "hook_resid_mid" in aliases

    def own(self, x: Activation, world: str) -> Tensor:
        """An activation in a world's plain run, in TransformerLens' shape."""
        with torch.no_grad():
            return x.read(self.run(world), world, self._rows)

    def _rows(self, block: Block, head: int) -> PlainRows:
        graph = self.pieces.graph
        assert block.layer is not None
        for world in self.prompts.worlds:
            self.run(world.name)
        stored = Stored(self.pieces, self.prompts, CORRUPTED, self.runs, {})
        return PlainRows(stored, self.tables, graph.blocks.index(block), block.layer, head)

    def clean(self, x: Activation) -> Tensor:
        """The clean activation: the cache's, or the clean run's own. Errors: `unknown-activation`."""
        if x.hook not in self._clean:
            if self.cache is None:
                self._clean.clear()  # made anew for each layer: kept, they would be a whole cache
            self._clean[x.hook] = self.own(x, CLEAN) if self.cache is None else entry(self.cache, x.hook).detach()
        return self._clean[x.hook]

    # ---- are a cache's numbers the model's?
    def is_own(self, x: Activation) -> bool:
        """Whether the clean activation is known to be the clean run's own. Of a cache in half precision it never is:
        its rounding is as large as edits are, so the cache's own numbers are patched in."""
        if not self.knows_clean:
            return False
        if x.hook not in self._same:
            self._same[x.hook] = self.cache is None or same(self.clean(x), self.own(x, CLEAN), x)
        return self._same[x.hook]

    def check_place(self, x: Activation) -> None:
        """Raise `other-activation` where a bridge's hook of this name stands elsewhere than the site."""
        bridge = self.model.bridge
        if bridge is None or x.hook in self.model.checked or (self.cache is not None and self.is_own(x)):
            return
        if x.name == "result":  # a bridge shows it only where it is told to, and not every bridge can
            self.check_place(self.activation(x.hook.replace("hook_result", "hook_z")))
            return
        ids = torch.tensor(self.prompts.worlds[0].ids, device=self.pieces.device)
        suffix = x.hook.partition(str(x.layer))[2]
        with torch.no_grad():
            _, cache = bridge.run_with_cache(ids, names_filter=lambda name: name.endswith(suffix))
        if x.hook not in cache.keys():  # noqa: SIM118
            raise failure(SweepNameError, NO_ACTIVATION, f"the bridge has no hook {x.hook!r}")
        for hook in cache.keys():  # noqa: SIM118
            if parsed(hook) is not None:
                self._compare(self.activation(hook), cache[hook])

    def _compare(self, x: Activation, theirs: Tensor) -> None:
        if not alike(theirs, self.own(x, CORRUPTED), x):
            raise failure(SweepError, OTHER_ACTIVATION, *self._why_other(x))
        self.model.checked.add(x.hook)

    def _why_other(self, x: Activation) -> tuple[str, str]:
        """What is wrong with a bridge's hook, and what to do instead."""
        message = f"{x.hook} of this bridge is not the site {x.name} of the model: their numbers differ"
        attention = getattr(self.model.bridge.blocks[x.layer], "attn", None) if self.model.bridge is not None else None
        if x.name in ("q", "k") and getattr(attention, f"{x.name}_norm", None) is not None:
            message = f"{x.hook} of this bridge stands before the norm of {x.name}, and the site {x.name} after it"
            message += f", which a spec sets by `head[l, h].{x.name}`"
            return message, f"write a spec: `patch node head[l, h].{x.name} with clean`"
        return message, "give the model itself, `bridge.original_model`, and the clean tokens"


def same(theirs: Tensor, own: Tensor, x: Activation) -> bool:
    """Whether two tensors are surely the same, in a dtype whose rounding is far smaller than any edit."""
    return torch.finfo(x.pieces.dtype).bits >= 32 and alike(theirs, own, x)


def alike(theirs: Tensor, own: Tensor, x: Activation) -> bool:
    """Whether two tensors are the same to rounding: each number to eps^0.8 of itself and of its row's mean size, for
    each layer below it (float32: 3e-6, bfloat16: 0.02).

    Scores that a mask hides count as equal: there a bridge has any very low number.
    """
    if theirs.shape != own.shape or not theirs.is_floating_point():
        return False
    theirs, own = theirs.to(own.device, torch.float64), own.double()
    if x.shape is Shape.ENTRIES:
        hidden = own.isneginf()
        theirs, own = (t.masked_fill(hidden, 0) for t in (theirs, own))
    # A row of scores may have one number alone, and that near 0: the mean is over all rows of the head.
    size = own.abs() + own.abs().mean((-2, -1) if x.shape is Shape.ENTRIES else -1, keepdim=True)
    allowed = torch.finfo(x.pieces.dtype).eps ** 0.8 * (x.layer + 2)
    return bool(((theirs - own).abs() <= allowed * size).all())


def entry(cache: Cache, hook: str) -> Tensor:
    """A cache's tensor. Errors: `unknown-activation`."""
    if hook not in cache.keys():  # noqa: SIM118  an ActivationCache looks for shorthands where it is asked itself
        message = f"the clean cache has no {hook!r}"
        raise failure(SweepNameError, NO_ACTIVATION, message, "keep it when the clean run is cached")
    return cache[hook]


def runs(model: ANY_MODEL, corrupted_tokens: Any, clean_cache: Any) -> Runs:
    """What is known before a sweep. `corrupted_tokens` `[batch, pos]`; `clean_cache`: a cache, or clean tokens."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        message = "autocast is on: what a layer computes then depends on what is around it"
        raise failure(SweepError, BAD_SWEEP, message, "sweep outside of `torch.autocast`, on a model in that dtype")
    if not isinstance(clean_cache, Tensor) and not hasattr(clean_cache, "keys"):
        got = type(clean_cache).__name__
        raise failure(SweepError, BAD_SWEEP, f"clean_cache is a cache or a tensor of clean token ids, not a {got}")
    found = traced(model)
    ids = token_ids(corrupted_tokens, "corrupted_tokens")
    _check_ids(found.loaded.graph, ids)
    worlds = [World(CORRUPTED, ids)]
    cache = None if isinstance(clean_cache, Tensor) else cast(Cache, clean_cache)
    clean = token_ids(clean_cache, "clean tokens") if cache is None else _cached_ids(cast(Cache, clean_cache))
    if clean is not None and len(clean) == len(ids) and len(clean[0]) == len(ids[0]):
        worlds.append(World(CLEAN, clean))
    elif cache is None:
        shapes = " and ".join(f"[{len(x)}, {len(x[0])}]" for x in (clean or ((),), ids))
        raise failure(SweepError, BAD_SWEEP, f"clean and corrupted tokens are of equal shape, not {shapes}")
    gradients = torch.is_grad_enabled() and any(p.requires_grad for p in found.loaded.eager.parameters())
    return Runs(found, Prompts(Layout((len(ids[0]),) * len(ids)), tuple(worlds)), cache, gradients)


def _check_ids(graph: ResidualGraph, ids: Sequence[Sequence[int]]) -> None:
    """Raise `sweep-arguments` for tokens that the model does not have."""
    strange = next((i for row in ids for i in row if not 0 <= i < graph.d_vocab), None)
    if strange is not None:
        message = f"corrupted_tokens has the id {strange}; the model's are 0..{graph.d_vocab - 1}"
        raise failure(SweepIndexError, BAD_SWEEP, message)


def _cached_ids(cache: Cache) -> tuple[tuple[int, ...], ...] | None:
    """The ids that a bridge's clean run was of, where its cache tells."""
    ids = cache[TOKENS] if TOKENS in cache.keys() else None  # noqa: SIM118
    if ids is None or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        return None
    return token_ids(ids, TOKENS)


def token_ids(tokens: Any, name: str) -> tuple[tuple[int, ...], ...]:
    """`[batch, pos]` ids as numbers."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point() or not tokens.numel():
        got = f"shape {list(tokens.shape)}, {tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise failure(SweepError, BAD_SWEEP, f"{name} are a tensor of token ids, [batch, pos], not {got}")
    return tuple(tuple(row) for row in tokens.tolist())
