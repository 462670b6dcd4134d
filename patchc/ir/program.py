"""A program: the roots of one experiment's cells in one variant DAG, cut into passes. What `execute` runs and `plan`
prints.

A pass of a program is one walk over the model's blocks; every matrix product in it takes the rows of all its cells. A
pass of the optimiser (`optimise.passes`) is another thing: it makes a program of a program.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from patchc.ir.dag import Dag
from patchc.ir.experiment import Experiment, Probe, Prompts
from patchc.ir.ops import VariantId
from patchc.ir.tokens import Layout, Tokens


@dataclass(frozen=True, slots=True)
class Pass:
    """Cells (their numbers) that run together in one walk over the blocks, and the estimate by which they were put
    there. Not a pass of the optimiser, which is an `OptimiserPass`."""

    cells: tuple[int, ...]
    rows: tuple[int, ...]
    """Token rows that each block computes."""
    bytes: int


@dataclass(frozen=True, slots=True)
class End:
    """Where metrics read a run: the logits (`probe` None) or a node, at these tokens."""

    probe: Probe | None
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a pass computes its variants; every choice gives the same numbers. `backward`: only tokens that something
    measured reads; `heads`: only heads that some variant reads; `deltas`: attention on the base run's q, k and v is not
    computed again where only scores or patterns are set; `rows`: token rows of one matrix product (0: nothing is
    packed)."""

    backward: bool = True
    heads: bool = True
    deltas: bool = True
    rows: int = 960


GATHERED = 4096
"""Token rows of queries, keys and values, of all heads, that an attention call of suffixes takes: bounds its memory."""

FULL = Schedule()
"""Every choice made."""
NAIVE = Schedule(backward=False, heads=False, deltas=False, rows=0)
"""None of them."""


@dataclass(frozen=True, slots=True)
class Rates:
    """A model's costs. In FLOPs: of an MLP a token row (by block), of a q, k or v projection and of W_O a head row, of
    attention a (query, key, head) triple, of the unembedding a logit."""

    mlp: dict[int, int]
    projection: int
    write: int
    triple: int
    logit: int
    copied: int = 0
    """Bytes of weights that are held a second time, beside the model's own tensors."""
    down: int = 0
    """FLOPs of an MLP's output matrix, a token row."""
    prepared: bool = True
    """Whether something is done to q, k or v before attention takes them (rotary, a norm)."""


@dataclass(frozen=True, slots=True)
class Program:
    """`roots[cell]` are what is read of the cell, one for each of `ends` (the logits' is its final stream); `columns`
    the token ids whose logits are read (None: the whole vocabulary); `worlds` the worlds that must be run, the base
    world first."""

    experiment: Experiment
    prompts: Prompts
    dag: Dag
    roots: tuple[tuple[VariantId, ...], ...]
    ends: tuple[End, ...]
    columns: tuple[int, ...] | None
    worlds: tuple[str, ...]
    passes: tuple[Pass, ...]
    budget: int
    """Bytes that a pass may hold beyond the model."""
    element: int
    """Bytes of one number."""
    no_effect: tuple[int, ...] = ()
    """Cells that provably equal the base run where it is measured: nothing runs for them."""
    schedule: Schedule = FULL
    without: frozenset[str] = frozenset()
    """Passes of the optimiser that were left out, by name."""

    @property
    def base(self) -> str:
        return self.worlds[0]

    def reads(self, cells: Iterable[int]) -> list[tuple[VariantId, Tokens]]:
        """The roots of some cells, each with the tokens at which it is read."""
        return [(root, end.tokens) for c in cells for root, end in zip(self.roots[c], self.ends, strict=True)]

    def layout_of(self, world: str) -> Layout:
        """Where a world's tokens stand: among the study's prompts, or its own."""
        return self.prompts.world(world).layout or self.prompts.layout

    @property
    def aligned(self) -> tuple[str, ...]:
        """The worlds of the study's own prompts: all but those of other data."""
        return tuple(w for w in self.worlds if self.prompts.world(w).layout is None)

    @property
    def measured(self) -> Tokens:
        """The tokens at which logits are read."""
        return next((end.tokens for end in self.ends if end.probe is None), 0)

    @property
    def live(self) -> list[int]:
        """The cells that run, in the order in which they do."""
        return [c for work in self.passes for c in work.cells]

    @property
    def n_passes(self) -> int:
        return len(self.passes)
