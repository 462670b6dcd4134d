"""The parts that statements are made of: literals, indices, sets of nodes and paths, values.

Use them by way of `parse.tree`, which has the statements too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from patchc.diagnostics import Span


@dataclass(frozen=True, slots=True)
class Construct:
    """What every construct has: its place in the spec, from its first character to its last."""

    span: Span | None = field(default=None, compare=False, repr=False, kw_only=True)


# ---- words and literals


@dataclass(frozen=True, slots=True)
class Name(Construct):
    """A word that is not reserved."""

    text: str


@dataclass(frozen=True, slots=True)
class Text(Construct):
    """A text in double quotes, its escapes read."""

    text: str


@dataclass(frozen=True, slots=True)
class Number(Construct):
    """`3` (int), `0.5` (float); negative where the minus can be nothing but a sign (indices, bounds)."""

    value: int | float


@dataclass(frozen=True, slots=True)
class Parameter(Construct):
    """`${NAME}`: stands for one literal, given from outside; `name` is without the braces."""

    name: str


# ---- indices and positions


@dataclass(frozen=True, slots=True)
class Every(Construct):
    """`*` as an index."""


@dataclass(frozen=True, slots=True)
class Offset(Construct):
    """`l + 1`, `l - 5`: a name's number and a whole number added to it."""

    base: Name | Parameter
    by: int


@dataclass(frozen=True, slots=True)
class Range(Construct):
    """`2..5` (inclusive), `..8` (`first` is None), `9..` (`last` is None)."""

    first: Item | None
    last: Item | None


@dataclass(frozen=True, slots=True)
class Braces(Construct):
    """`{1, 4}`, `{0.5, " went"}`, `{noun, end - 1}`: several, in order."""

    items: tuple[Element, ...]


Item = Number | Name | Parameter | Offset
Index = Item | Range | Every | Braces
Element = Item | Range | Text
Place = Number | Name | Parameter | Range | Braces


@dataclass(frozen=True, slots=True)
class Anchor(Construct):
    """`wrong first + 1`, `" John" last`, `"The Space Needle"`: where a column's or a given text stands."""

    text: Text | Name
    which: Literal["first", "last"] | None
    offset: int = 0


# ---- sets of nodes and of paths


@dataclass(frozen=True, slots=True)
class Site(Construct):
    """`.q`, `.{q, k, v}`, `.post[7]`: `names` are one, or several in braces (then without indices)."""

    names: tuple[Name, ...]
    indices: tuple[Index, ...] = ()


@dataclass(frozen=True, slots=True)
class Ref(Construct):
    """`head[9, *].q`, `movers`, `answer`: a name with indices and sites."""

    name: Name
    indices: tuple[Index, ...] = ()
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True, slots=True)
class Group(Construct):
    """`(a | b).q`: parentheses in a set."""

    inner: Set
    sites: tuple[Site, ...] = ()


@dataclass(frozen=True, slots=True)
class Call(Construct):
    """`via(s, r)`, `circuit("file.json")`: a `let` with parameters or a built-in that gives a set."""

    name: Name
    arguments: tuple[Set | Text | Parameter, ...]


@dataclass(frozen=True, slots=True)
class Star(Construct):
    """`mlp*`: any number of steps."""

    inner: Primary


@dataclass(frozen=True, slots=True)
class Placed(Construct):
    """`head[9, 9].q @ end`: at these positions only."""

    inner: Primary
    place: Place


@dataclass(frozen=True, slots=True)
class Sequence(Construct):
    """`a -> b -> logits`."""

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Union(Construct):
    """`a | b | c`."""

    parts: tuple[Primary | Star, ...]


@dataclass(frozen=True, slots=True)
class Difference(Construct):
    """`a - b - c`: the first without the others."""

    parts: tuple[Primary | Star, ...]


Primary = Ref | Group | Call
Step = Primary | Star | Placed
Set = Step | Sequence | Union | Difference


# ---- values and metrics


@dataclass(frozen=True, slots=True)
class Function(Construct):
    """`logit(answer)`, `mean(corrupt, over=positions)`, `tensor("v.safetensors", "key")`."""

    name: Name
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class Named(Construct):
    """`seed=0` in a function's parentheses, `steps=5` in `attribute`'s."""

    name: Name
    value: Value | Text | Braces


@dataclass(frozen=True, slots=True)
class At(Construct):
    """`clean @ noun`, `kl(clean) @ end`."""

    inner: Scalar
    place: Place


@dataclass(frozen=True, slots=True)
class Parens(Construct):
    """`(a + b)` in arithmetic."""

    inner: Value


@dataclass(frozen=True, slots=True)
class Negated(Construct):
    """`-a`."""

    inner: Scalar | At


@dataclass(frozen=True, slots=True)
class Product(Construct):
    """`a * b / c`, from left to right; the first operator is `*` and is not written."""

    factors: tuple[tuple[Literal["*", "/"], Factor], ...]


@dataclass(frozen=True, slots=True)
class Sum(Construct):
    """`a + b - c`, from left to right; the first operator is `+` and is not written."""

    terms: tuple[tuple[Literal["+", "-"], Term], ...]


@dataclass(frozen=True, slots=True)
class Normalised(Construct):
    """`diff from corrupt to clean per prompt`: 0 at the run of `zero`, 1 at that of `one`."""

    inner: Arithmetic
    zero: Name
    one: Name
    per: Name | None = None


Scalar = Number | Parameter | Ref | Function | Parens
Factor = Scalar | At | Negated
Term = Factor | Product
Arithmetic = Term | Sum
Value = Arithmetic | Normalised
Argument = Value | Text | Named
