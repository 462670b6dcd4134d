"""A program: the roots of one experiment's cells in one variant DAG, cut into passes. What `execute` runs and `plan`
prints.

A pass is one walk over the model's blocks; every matrix product in it takes the rows of all its cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from patchc.ir.dag import Dag, VariantId
from patchc.ir.experiment import Experiment, Prompts
from patchc.ir.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Pass:
    """Cells (their numbers) that run together, and the estimate by which they were put there."""

    cells: tuple[int, ...]
    rows: tuple[int, ...]
    """Token rows that each block computes."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Rates:
    """A model's FLOPs: of an MLP a token row (by block), of a q, k or v projection and of W_O a head row, of attention
    a (query, key, head) triple, of the unembedding a logit."""

    mlp: dict[int, int]
    projection: int
    write: int
    triple: int
    logit: int


@dataclass(frozen=True, slots=True)
class Program:
    """`roots[cell]` is the cell's final stream; `measured` the tokens that the metrics read; `columns` the token ids
    whose logits they read (None: the whole vocabulary); `worlds` the worlds that must be run, the base world first."""

    experiment: Experiment
    prompts: Prompts
    dag: Dag
    roots: tuple[VariantId, ...]
    measured: Tokens
    columns: tuple[int, ...] | None
    worlds: tuple[str, ...]
    passes: tuple[Pass, ...]
    no_effect: tuple[int, ...] = ()
    """Cells that provably equal the base run where it is measured: nothing runs for them."""

    @property
    def base(self) -> str:
        return self.worlds[0]

    @property
    def n_passes(self) -> int:
        return len(self.passes)
