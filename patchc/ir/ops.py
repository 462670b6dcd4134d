"""The operations of the variant DAG: what each value is made of. `ir.dag` holds them, each once.

A variant is a number in a `Dag`; number 0 is "equal to the base run". No tensors here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens

ValueId = int
VariantId = int
EQUAL_TO_BASE: VariantId = 0


@dataclass(frozen=True, slots=True)
class Const:
    """The stored value of some members of a block (bits, counted from the block's first node) at `tokens`. `site` is
    `OUT` unless a value has another effect elsewhere: noise on heads' z, noise or a tensor for all attention output."""

    block: int
    members: int
    value: ValueId
    tokens: Tokens
    site: Site = Site.OUT


@dataclass(frozen=True, slots=True)
class Stream:
    """The stored value of the whole stream below `rank`, at `tokens`; with noise that only the MLP of `block` reads,
    which is that MLP's own."""

    rank: int
    value: ValueId
    tokens: Tokens
    block: int = -1


SCORES, PATTERN = 3, 4
"""Beside q, k and v, what of a head can be set: its attention scores, and the pattern that is their softmax."""


@dataclass(frozen=True, slots=True)
class Replaced:
    """A head's q, k, v, scores or pattern set to a value at some tokens: `heads` are bits within the block; of scores
    and patterns the entries at which these tokens look at `sources` of their prompt. `mask`: the mask that the
    replacement is multiplied by (see `Masked`), -1 where it is outright."""

    port: int
    heads: int
    value: ValueId
    tokens: Tokens
    mask: int = -1
    sources: Tokens = 0


@dataclass(frozen=True, slots=True)
class ReplacedNeurons:
    """The same of an MLP's neurons (bits)."""

    neurons: int
    value: ValueId
    tokens: Tokens
    mask: int = -1


@dataclass(frozen=True, slots=True)
class Core:
    """Attention of one block over q, k and v inputs. Heads are no part of it: demand says which are computed, except
    where something inside them is replaced; scores are set before patterns. Its value is z, not a stream value: only
    `Out` reads it."""

    block: int
    q: VariantId
    k: VariantId
    v: VariantId
    replaced: tuple[Replaced, ...] = ()

    def input(self, port: int) -> VariantId:
        return (self.q, self.k, self.v)[port]

    def replaced_at(self, *ports: int) -> tuple[Replaced, ...]:
        return tuple(r for r in self.replaced if r.port in ports)

    def is_base(self, *ports: int) -> bool:
        """Whether these projections are the base run's."""
        return not any(self.input(port) for port in ports) and not self.replaced_at(*ports)


@dataclass(frozen=True, slots=True)
class Out:
    """What some heads (bits within the block) of a core write into the stream."""

    core: VariantId
    heads: int


@dataclass(frozen=True, slots=True)
class Tokenwise:
    """An MLP run again on a changed stream, or with neurons set: on the base run's stream only the stored difference of
    those is written."""

    block: int
    input: VariantId
    replaced: tuple[ReplacedNeurons, ...] = ()

    @property
    def neurons(self) -> int:
        """All neurons that are set somewhere."""
        out = 0
        for r in self.replaced:
            out |= r.neurons
        return out


@dataclass(frozen=True, slots=True)
class Sum:
    parts: tuple[VariantId, ...]


@dataclass(frozen=True, slots=True)
class PostNorm:
    """What an attention block with a norm of its own adds to the stream, where what its heads and bias write together
    differs from the base run by `input`: `norm(base + input) - norm(base)`, token by token."""

    block: int
    input: VariantId


@dataclass(frozen=True, slots=True)
class Scale:
    """A difference times a number: what is left of `self` in a mixture."""

    factor: float
    input: VariantId


@dataclass(frozen=True, slots=True)
class Mix:
    """Different variants at disjoint sets of tokens; the base run's elsewhere."""

    parts: tuple[tuple[Tokens, VariantId], ...]


@dataclass(frozen=True, slots=True)
class Masked:
    """`input + sum over starts of mask * (value - input)` at the start's tokens: patches whose masks are inputs."""

    input: VariantId
    starts: tuple[tuple[int, Tokens, VariantId], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """The plain model from `rank` up to the logits on a changed stream: a whole suffix as one value, expanded by
    `Dag.expand` only while it is executed."""

    rank: int
    input: VariantId


@dataclass(frozen=True, slots=True)
class Projected:
    """A head's q, k or v before rotary, `[token, d_head]`: for a metric that reads it, no stream value."""

    block: int
    port: int
    head: int
    input: VariantId
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True, slots=True)
class Entries:
    """A head's scores or pattern (`port`), a row a token, `[token, longest prompt]`, likewise. `q` and `k` are
    projections of that head."""

    block: int
    head: int
    port: int
    q: VariantId
    k: VariantId
    replaced: tuple[Replaced, ...] = ()


@dataclass(frozen=True, slots=True)
class Neurons:
    """An MLP's neurons, `[token, d_mlp]`, likewise."""

    block: int
    input: VariantId
    replaced: tuple[ReplacedNeurons, ...] = ()


@dataclass(frozen=True, slots=True)
class HeadZ:
    """A head's z, `[token, d_head]`, likewise."""

    core: VariantId
    head: int


@dataclass(frozen=True, slots=True)
class StoredZ:
    """The stored z of a head at `tokens`, likewise."""

    block: int
    head: int
    value: ValueId
    tokens: Tokens


Inner = Projected | Entries | Neurons | HeadZ | StoredZ
"""Values inside a node: metrics read them, and nothing else does."""
Op = Const | Stream | Core | Out | Tokenwise | PostNorm | Sum | Scale | Mix | Masked | Run | Inner


def children(op: Op) -> Iterator[VariantId]:
    """The variants that an operation reads; one may come twice."""
    match op:
        case Sum(parts):
            yield from parts
        case Core(_, q, k, v, _):
            yield from (q, k, v)
        case Out(core, _) | HeadZ(core, _):
            yield core
        case Tokenwise(_, x) | PostNorm(_, x) | Scale(_, x) | Run(_, x) | Projected(_, _, _, x) | Neurons(_, x):
            yield x
        case Entries(_, _, _, q, k):
            yield from (q, k)
        case Mix(parts):
            for _, x in parts:
                yield x
        case Masked(x, starts):
            yield x
            for _, _, value in starts:
                yield value
        case Const() | Stream() | StoredZ():
            pass
