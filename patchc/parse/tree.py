"""The syntax tree: a frozen dataclass for each construct, as written; nothing is looked up or expanded.

Statements and clauses are here, what they are made of is in `parse.expressions`. Places (`span`) take no
part in equality. What names mean is `resolve`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from patchc.parse.expressions import Anchor as Anchor
from patchc.parse.expressions import Argument as Argument
from patchc.parse.expressions import Arithmetic as Arithmetic
from patchc.parse.expressions import At as At
from patchc.parse.expressions import Braces as Braces
from patchc.parse.expressions import Call as Call
from patchc.parse.expressions import Construct as Construct
from patchc.parse.expressions import Difference as Difference
from patchc.parse.expressions import Element as Element
from patchc.parse.expressions import Every as Every
from patchc.parse.expressions import Factor as Factor
from patchc.parse.expressions import Function as Function
from patchc.parse.expressions import Group as Group
from patchc.parse.expressions import Index as Index
from patchc.parse.expressions import Item as Item
from patchc.parse.expressions import Name as Name
from patchc.parse.expressions import Named as Named
from patchc.parse.expressions import Negated as Negated
from patchc.parse.expressions import Normalised as Normalised
from patchc.parse.expressions import Number as Number
from patchc.parse.expressions import Offset as Offset
from patchc.parse.expressions import Parameter as Parameter
from patchc.parse.expressions import Parens as Parens
from patchc.parse.expressions import Place as Place
from patchc.parse.expressions import Placed as Placed
from patchc.parse.expressions import Primary as Primary
from patchc.parse.expressions import Product as Product
from patchc.parse.expressions import Range as Range
from patchc.parse.expressions import Ref as Ref
from patchc.parse.expressions import Scalar as Scalar
from patchc.parse.expressions import Sequence as Sequence
from patchc.parse.expressions import Set as Set
from patchc.parse.expressions import Site as Site
from patchc.parse.expressions import Star as Star
from patchc.parse.expressions import Step as Step
from patchc.parse.expressions import Sum as Sum
from patchc.parse.expressions import Term as Term
from patchc.parse.expressions import Text as Text
from patchc.parse.expressions import Union as Union
from patchc.parse.expressions import Value as Value

# ---- statements


@dataclass(frozen=True, slots=True)
class Option(Construct):
    """`dtype=float32` after a model's name."""

    name: Name
    value: Name | Text | Parameter | Number


@dataclass(frozen=True, slots=True)
class Model(Construct):
    """`model "gpt2" dtype=float32`."""

    name: Text | Parameter
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True)
class Sae(Construct):
    """`sae latent "dir" at resid_pre[*]`."""

    name: Name
    file: Text | Parameter
    site: Ref


@dataclass(frozen=True, slots=True)
class Column(Construct):
    """`answer " Mary"`, `answer {" went", " left"}` in a `data` block."""

    name: Name
    value: Text | Parameter | Braces


@dataclass(frozen=True, slots=True)
class Position(Construct):
    """`at end -1`, `at s2 wrong last`, `at phrase 2..5` in a `data` block."""

    name: Name
    where: Item | Range | Anchor


@dataclass(frozen=True, slots=True)
class Data(Construct):
    """`data "prompts.jsonl"[..99] { ... }`, or `data { ... }` with one prompt's columns."""

    file: Text | Parameter | None
    slice: Index | None
    fields: tuple[Column | Position, ...]


@dataclass(frozen=True, slots=True)
class Metric(Construct):
    """`metric diff = logit(answer) - logit(wrong)`."""

    name: Name
    value: Value


@dataclass(frozen=True, slots=True)
class Let(Construct):
    """`let movers = head[3, 1] | head[3, 2]`, `let via(s, r) = s -> mlp* -> r -> any* -> logits`."""

    name: Name
    parameters: tuple[Name, ...]
    value: Set


# ---- clauses of an experiment

Comparison = Literal["<", "<=", ">", ">=", "=="]
Bound = Number | Parameter | Negated


@dataclass(frozen=True, slots=True)
class Binding(Construct):
    """`h in head`, `s in {0, 1}`, `p in 4..8`: a loop variable and what it ranges over."""

    name: Name
    domain: Set | Braces | Range


@dataclass(frozen=True, slots=True)
class For(Construct):
    """`for h in head, p in positions`."""

    bindings: tuple[Binding, ...]


@dataclass(frozen=True, slots=True)
class Run(Construct):
    """`run corrupt`."""

    world: Name


@dataclass(frozen=True, slots=True)
class Target(Construct):
    """`node N`, `edge A -> B`, `path P`, `all`, `all except X`; `what` is None for `all` alone."""

    kind: Literal["node", "edge", "path", "all"]
    what: Set | None


@dataclass(frozen=True, slots=True)
class Patch(Construct):
    """`patch node h with clean`."""

    target: Target
    value: Value


@dataclass(frozen=True, slots=True)
class Attribute(Construct):
    """`attribute(steps=5) edge w -> r with corrupt`."""

    options: tuple[Named, ...]
    target: Target
    value: Value


@dataclass(frozen=True, slots=True)
class Freeze(Construct):
    """`freeze norms, patterns`."""

    what: tuple[Name, ...]


@dataclass(frozen=True, slots=True)
class Interval(Construct):
    """`with interval 0.95 seed=1`: a bootstrap interval of that level."""

    level: Number | Parameter
    options: tuple[Option, ...] = ()


@dataclass(frozen=True, slots=True)
class Measured(Construct):
    """`diff`, `kl(clean) as kl`, `diff with interval 0.95`: one thing measured."""

    value: Value
    alias: Name | None = None
    interval: Interval | None = None


@dataclass(frozen=True, slots=True)
class Measure(Construct):
    """`measure diff, kl(clean) as kl`."""

    items: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Keep(Construct):
    """`keep top 200 by diff`."""

    top: Number | Parameter
    by: Name


@dataclass(frozen=True, slots=True)
class Prune(Construct):
    """`prune kl < 0.0575`."""

    metric: Name
    op: Comparison
    bound: Bound


@dataclass(frozen=True, slots=True)
class Expect(Construct):
    """`expect recovered at head[3, 1], end > 0.1`, `expect diff == 3.2 within 0.1`; `at` gives one coordinate a loop
    variable, or is empty."""

    metric: Name
    at: tuple[Set | Bound, ...]
    op: Comparison
    bound: Bound
    tolerance: Number | Parameter | None = None


@dataclass(frozen=True, slots=True)
class ExpectTop(Construct):
    """`expect recovered top(3) includes head[3, 1]`; `cells` gives one coordinate a loop variable."""

    metric: Name
    top: Number | Parameter
    cells: tuple[Set | Bound, ...]


@dataclass(frozen=True, slots=True)
class Show(Construct):
    """`show heatmap`, `show heatmap "heads.png"`."""

    kind: Name
    file: Text | Parameter | None = None


@dataclass(frozen=True, slots=True)
class Save(Construct):
    """`save "heads.parquet"`."""

    file: Text | Parameter


Clause = For | Run | Patch | Attribute | Freeze | Measure | Keep | Prune | Expect | ExpectTop | Show | Save


@dataclass(frozen=True, slots=True)
class Experiment(Construct):
    """`experiment heads "each head, restored" { ... }`; clauses in the order in which they are written."""

    name: Name
    title: Text | None
    clauses: tuple[Clause, ...]


Statement = Model | Sae | Data | Metric | Let | Experiment


@dataclass(frozen=True, slots=True)
class Spec(Construct):
    """A whole spec: its statements, in the order in which they are written."""

    items: tuple[Statement, ...]
