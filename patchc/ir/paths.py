"""Sets of paths as regular expressions over steps, written from a path's start to the logits.

A path set says which copies of a node carry a patch's value: read back from the logits, a copy is the node plus the
steps after it. The first step of a path is where the value enters; the last step is the logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from patchc.ir.graph import QKV, Nodes
from patchc.ir.tokens import Tokens

EVERYWHERE: Tokens = -1
"""Every token: the set that a step without `@` has."""


class Site(StrEnum):
    """What a start replaces at its nodes."""

    OUT = "out"
    """A node's output: what it adds to the stream."""
    Z = "z"
    """A head's output before W_O. Values that are linear in it (all but noise) have the same effect as `OUT`."""
    Q = "q"
    K = "k"
    V = "v"
    SCORES = "scores"
    """A head's attention scores before the softmax, entry by entry: `Step.tokens` ask, `Step.sources` are looked at.
    What the mask hides stays hidden."""
    PATTERN = "pattern"
    """The same after the softmax; what is left of a row is not renormalised."""
    IN = "in"
    """What an MLP reads: the stream before its norm."""
    POST = "post"
    """An MLP's neurons (`Step.neurons`) after the activation, as its output matrix reads them."""
    ATTN_OUT = "attn_out"
    """A layer's whole attention output, its bias included; the step's nodes are the layer's heads and bias."""
    STREAM = "stream"
    """The stream itself below `Step.rank`; the step's nodes are every writer below that rank."""


@dataclass(frozen=True)
class Edges:
    """A relation of edges: for a reader (node number, port; port -1 where it has one input) the writers it joins.

    `keep=False` is the complement. Interned by content: equal relations compare equal.
    """

    rows: tuple[tuple[tuple[int, int], Nodes], ...]
    keep: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "_rows", dict(self.rows))

    def writers(self, node: int, port: int) -> Nodes:
        """The writers that the relation joins to a reader, as a (possibly infinite, negative) bit set."""
        found: Nodes = self._rows.get((node, port), 0)  # type: ignore[attr-defined]
        return found if self.keep else ~found


@dataclass(frozen=True, slots=True)
class Step:
    """One step: any of `nodes`.

    As the first step of a path: the value replaces `site` of the nodes, at `tokens`; of scores and patterns only the
    entries that look at `sources`, of an MLP's neurons only `neurons` (bits; -1: every).
    As a later step: the path enters the node by one of `ports` (bits; heads only), and the edge into it is taken at
    `tokens`, the positions at which the port reads the stream (q: asking; k and v: looked at).
    `via` restricts the edge that leaves the node towards the reader above it. A node with bit `graph.logits.id` in
    `nodes` is the logits.
    As the last step: the logits, or where a metric reads (`experiment.Probe`): a node, entered as a later step is, or
    with `site` STREAM the stream below `rank`, which is read at `tokens`. A path of one step alone starts and ends
    there: the metric reads the value that was put in.
    """

    nodes: Nodes
    ports: int = QKV
    tokens: Tokens = EVERYWHERE
    via: Edges | None = None
    site: Site = Site.OUT
    rank: int = -1
    sources: Tokens = EVERYWHERE
    neurons: int = -1


@dataclass(frozen=True, slots=True)
class Seq:
    """One after the other."""

    parts: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """Any one of them."""

    parts: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Star:
    """Any number of times, none included."""

    part: Path


Path = Step | Seq | Alt | Star
