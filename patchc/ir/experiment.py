"""What `resolve` gives: experiments with every name looked up, every selector expanded, every number known.

No tensors and no syntax. Spans serve diagnostics and take no part in equality.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from patchc.diagnostics import Span
from patchc.ir.graph import Nodes
from patchc.ir.paths import Path, Site
from patchc.ir.tokens import Layout, Tokens

# ---- data


@dataclass(frozen=True, slots=True)
class World:
    """One text column, tokenised: one run of the model. `ids[prompt][position]`.

    A world with a `layout` of its own is of other data than the study's prompts: only means are taken from it.
    """

    name: str
    ids: tuple[tuple[int, ...], ...]
    layout: Layout | None = None


@dataclass(frozen=True)
class Prompts:
    """The data of a spec. All worlds of one prompt have the same length; `texts` are the first world's tokens.

    Where a metric reads an answer of several tokens, the layout's rows are longer than the prompts: the answer's tokens
    but the last follow each prompt. For several such answers every prompt stands there `copies` times: row = copy *
    `n` + prompt. `own[row]` is the length of the prompt alone (empty: the layout's lengths).
    """

    layout: Layout
    worlds: tuple[World, ...]
    texts: tuple[tuple[str, ...], ...] = ()
    copies: int = 1
    own: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """How many prompts there are: what a mean is taken over."""
        return self.layout.n_prompts // self.copies

    @cached_property
    def own_lengths(self) -> tuple[int, ...]:
        """The length of each row's prompt, without an answer that follows it."""
        return self.own or self.layout.lengths

    @cached_property
    def alone(self) -> Tokens:
        """Every token of every prompt, once: no copies, no answers that follow."""
        out = 0
        for row in range(self.n):
            out |= ((1 << self.own_lengths[row]) - 1) << self.layout.offsets[row]
        return out

    @cached_property
    def _worlds(self) -> dict[str, World]:
        return {w.name: w for w in self.worlds}

    def world(self, name: str) -> World:
        return self._worlds[name]


# ---- values


@dataclass(frozen=True, slots=True)
class FromWorld:
    """What the node computes in another world's run."""

    world: str


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of the node's value in a world's run, over its prompts at the same position; `over_positions`: over
    every position too. With `groups` (a number for each row of the layout) only over the rows of the same group.

    Tokens of an answer that follows a prompt (`Prompts.own`) count only among themselves, at the same distance from
    the prompt's end, and not at all with `over_positions`."""

    world: str
    over_positions: bool = False
    groups: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """Another token's value: at token t that of `source` at token `tokens[t]`. A resampled prompt, or `clean @ noun`.

    Of scores and patterns the row is another token's; its entries keep their positions."""

    source: FromWorld | Mean
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Noise:
    """Gaussian noise (mean 0), drawn anew for each site and each prompt from `seed` (`execute.noise` says how): of
    standard deviation `std`, or with `relative` of `std` times that of the site's own numbers in the base world's
    run (over the prompts' tokens and the site's width; of scores and patterns not allowed)."""

    std: float
    seed: int
    relative: bool = False


@dataclass(frozen=True, slots=True)
class Blocked:
    """No attention: a score of minus infinity, so that the rest of the row is renormalised. Scores only, alone."""


@dataclass(frozen=True, slots=True)
class Itself:
    """`self`: what the patched run itself would have computed there."""


@dataclass(frozen=True, slots=True)
class Given:
    """A tensor from a file or from Python, by the key under which `Study.tensors` names it: `[d]`, the same at every
    token, or a row a token of the layout, `[token, d]`, `d` being the site's width. Of scores and patterns it has rows,
    of the longest prompt's length."""

    key: str


Source = FromWorld | Mean | Moved | Itself | Given | Noise | Blocked


@dataclass(frozen=True, slots=True)
class Value:
    """A linear combination of sources; no terms is `zero`."""

    terms: tuple[tuple[float, Source], ...]
    _hash: int = field(init=False, repr=False, compare=False)
    """Worked out once: every start of every cell is looked up by its value."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash(self.terms))

    def __hash__(self) -> int:
        return self._hash

    @property
    def uses_self(self) -> bool:
        return any(isinstance(source, Itself) for _, source in self.terms)

    @property
    def world(self) -> str | None:
        """The world, where the value is that world's own and nothing else."""
        match self.terms:
            case ((1.0, FromWorld(world)),):
                return world
            case _:
                return None


# ---- patches


@dataclass(frozen=True, slots=True)
class Patch:
    """Every path in `path` carries `value`; `complement`: every path that is not in it.

    With `complement` the value enters where, read back from the logits, the path can no longer be in the set.
    """

    path: Path
    value: Value
    complement: bool = False
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Cell:
    """One experiment of a sweep: its place along the dims, and its patches, which add up."""

    index: tuple[int, ...]
    patches: tuple[Patch, ...]


@dataclass(frozen=True, slots=True)
class Dim:
    """A dimension of a result. `labels` name the coordinates for people, where they are not their own names."""

    name: str
    coords: tuple[str | int | float, ...]
    labels: tuple[str, ...] | None = None


# ---- metrics: a number a prompt


class Measure(StrEnum):
    """A number read from the logits at one token, for a set of answer tokens (CONTRACT: prob sums over the set, logprob
    is the log of that sum, logit the mean; rank counts from 0; correct is 1 where the best token is in the set)."""

    LOGIT = "logit"
    PROB = "prob"
    LOGPROB = "logprob"
    RANK = "rank"
    CORRECT = "correct"
    LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Read:
    """`measure` of `answers[prompt]` (token ids) at token `tokens[prompt]` (a number of the layout)."""

    measure: Measure
    answers: tuple[tuple[int, ...], ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Kl:
    """KL(world || patched), whole vocabulary, nats, at token `tokens[prompt]`."""

    world: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """The log-probability of answers of several tokens: `answers[prompt]` are the ids one after another, and
    `tokens[prompt]` the tokens whose logits predict them. Summed; nats."""

    answers: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """A place in the model that a metric reads: `site` of one node (a bit of `nodes`), a layer's attention output
    (`nodes` are its heads and bias), or the stream below `rank`."""

    nodes: Nodes
    site: Site = Site.OUT
    rank: int = -1


@dataclass(frozen=True, slots=True)
class NodeRead:
    """A number read at a probe, at token `tokens[prompt]`: an entry of a pattern or of scores (looking at token
    `sources[prompt]`), one neuron, or the dot product with the tensor `key` of `Study.tensors`, `[d]`."""

    probe: Probe
    tokens: tuple[int, ...]
    sources: tuple[int, ...] = ()
    neuron: int = -1
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Called:
    """A Python function of the logits `[prompt, pos, d_vocab]` that gives a number, or one a prompt. Where it is known
    to read some of them only: at `tokens` (numbers of the layout; none: at all), of token ids `columns`."""

    name: str
    tokens: tuple[int, ...] = ()
    columns: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    number: float


@dataclass(frozen=True, slots=True)
class Sum:
    """A linear combination."""

    terms: tuple[tuple[float, Expression], ...]


@dataclass(frozen=True, slots=True)
class Product:
    factors: tuple[Expression, ...]


@dataclass(frozen=True, slots=True)
class Quotient:
    over: Expression
    under: Expression


Leaf = Read | Continuation | Kl | NodeRead | Called
"""What an expression reads from a run."""
Expression = Leaf | Constant | Sum | Product | Quotient


@dataclass(frozen=True, slots=True)
class Interval:
    """A bootstrap interval over prompts (percentiles of `resamples` draws with replacement) that holds `level` of
    them, e.g. 0.95. A ratio of means is computed anew in each draw, its ends included."""

    level: float
    seed: int = 0
    resamples: int = 2000


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured number. With `zero` and `one` it is normalised: 0 at the run of world `zero`, 1 at that of `one`, as
    the ratio of means, or the mean of ratios where `per_prompt`. `unit`: logits, nats, ..., None where it has none."""

    name: str
    expression: Expression
    zero: str | None = None
    one: str | None = None
    per_prompt: bool = False
    span: Span | None = field(default=None, compare=False)
    interval: Interval | None = None
    unit: str | None = None


# ---- experiments


@dataclass(frozen=True, slots=True)
class Expect:
    """`metric` of the cells at `indices` (every cell named) compares so with `bound`; `==` allows `tolerance` where it
    is given. With `op` "includes" instead: every cell named is among the `top` cells whose numbers are farthest from
    the unpatched run's."""

    metric: str
    indices: tuple[tuple[int, ...], ...]
    op: str
    bound: float
    span: Span | None = field(default=None, compare=False)
    tolerance: float | None = None
    top: int = 0


@dataclass(frozen=True, slots=True)
class Save:
    """Write the results here (.json, .csv, .parquet); the path is relative to the spec."""

    path: str
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Show:
    """Draw the results as `kind` (heatmap, bar, line) into a picture beside the spec, or into `path`; a `table` is
    written to the terminal, or into `path`."""

    kind: str
    path: str | None = None
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class PromptDim:
    """A dim over prompts, which needs no cells of its own: it shows each prompt's number instead of their mean. It
    stands before dim number `axis` of the experiment's own; `prompts` are those shown, and its coordinates."""

    axis: int
    name: str
    prompts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Experiment:
    """One experiment: its cells run on world `run`, each with its own patches; a sweep's pairs that are no edge have no
    cell. `dims` and cells' indices are without `by_prompt`; the indices of expectations are with it."""

    name: str
    title: str | None
    run: str
    dims: tuple[Dim, ...]
    cells: tuple[Cell, ...]
    metrics: tuple[Metric, ...]
    expects: tuple[Expect, ...] = ()
    saves: tuple[Save, ...] = ()
    shows: tuple[Show, ...] = ()
    span: Span | None = field(default=None, compare=False)
    by_prompt: PromptDim | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(d.coords) for d in self.dims)


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """The `model` statement: a built-in name, a directory or a hub id, and its options."""

    name: str
    options: tuple[tuple[str, str | int | bool], ...] = ()
    span: Span | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class TensorFrom:
    """A tensor that `Given` and `NodeRead` call `key`: `name` in a safetensors file, or without a file the one that was
    given in Python."""

    key: str
    name: str
    file: str | None = None


@dataclass(frozen=True, slots=True)
class Study:
    """A whole spec, resolved."""

    model: ModelChoice
    prompts: Prompts
    experiments: tuple[Experiment, ...]
    tensors: tuple[TensorFrom, ...] = ()
    seeds: tuple[tuple[str, int], ...] = ()
    """(what is random, its seed) of everything random that the spec names, each once: `resample`, `noise`,
    `interval`."""
