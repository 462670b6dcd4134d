"""Values, what stands after `with`: linear combinations of worlds, means, tensors, noise, `self` and zero.

What the sources themselves mean is for `sources`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from patchc.diagnostics import RULES, Span
from patchc.ir.experiment import Blocked, FromWorld, Itself, Mean, Source, Value
from patchc.parse import tree
from patchc.resolve.bindings import Env, Number, WorldName
from patchc.resolve.data import Dataset
from patchc.resolve.other_data import OtherData
from patchc.resolve.places import Places
from patchc.resolve.scope import WRONG_KIND, Scope
from patchc.resolve.sources import BAD_ARGUMENT, NOISE, Sources
from patchc.resolve.tensors import Tensors

NOT_LINEAR = RULES.add("not-linear", "a value that is no linear combination of worlds, means, tensors and self")

NAMES = ("zero", "mean", "self", "resample", "noise", "tensor", "blocked")
EXAMPLES = {"noise": NOISE, "tensor": 'tensor("v.safetensors", "key")'}


@dataclass(frozen=True, slots=True)
class Linear:
    """A number (no sources), or a linear combination of sources."""

    number: float | None
    terms: tuple[tuple[float, Source], ...] = ()

    def scaled(self, by: float) -> Linear:
        if self.number is not None:
            return Linear(self.number * by)
        return Linear(None, tuple((c * by, s) for c, s in self.terms))


class Values:
    """The values of a spec. `run` is the world of the experiment, for a bare `mean`."""

    def __init__(self, scope: Scope, dataset: Dataset, tensors: Tensors, places: Places):
        self._scope = scope
        self._data = dataset
        self._places = places
        self.other = OtherData(dataset, tensors.base)
        self.sources = Sources(dataset, tensors, self.other, self._number)

    def value(self, node: tree.Value, env: Env, run: str) -> Value:
        """What is patched in."""
        if isinstance(node, tree.Normalised):
            raise WRONG_KIND.error("`from ... to` belongs to metrics, not to values", span=node.span)
        found = self._linear(node, env, run)
        if found.number is not None:
            message = f"this is the number {found.number:g}; a value is a world, a mean, a tensor, self or zero"
            raise NOT_LINEAR.error(message, fix="write `zero`" if found.number == 0 else None, span=node.span)
        if any(isinstance(source, Blocked) for _, source in found.terms) and not _is_alone(node):
            message = "`blocked` is no attention at all: it stands alone, without a factor"
            raise NOT_LINEAR.error(message, fix="write `blocked` alone", span=node.span)
        terms = _merged(found.terms)
        if not all(math.isfinite(c) for c, _ in terms):
            raise NOT_LINEAR.error("a factor here is too large for a 64-bit float", span=node.span)
        return Value(terms)

    # ---- arithmetic

    def _linear(self, node: tree.Arithmetic, env: Env, run: str) -> Linear:
        match node:
            case tree.Number() | tree.Parameter():
                return Linear(float(self._scope.number(node)))
            case tree.Ref():
                return self._name(node, env, run)
            case tree.Function():
                return self._function(node, env, run)
            case tree.Parens():
                return self._linear(_arithmetic(node.inner), env, run)
            case tree.Negated():
                return self._linear(node.inner, env, run).scaled(-1)
            case tree.Sum():
                return self._sum(node, env, run)
            case tree.Product():
                return self._product(node, env, run)
            case tree.At():
                return self._at(node, env, run)

    def _sum(self, node: tree.Sum, env: Env, run: str) -> Linear:
        parts = [self._linear(t, env, run).scaled(1 if sign == "+" else -1) for sign, t in node.terms]
        numbers = [p.number for p in parts if p.number is not None]
        if len(numbers) == len(parts):
            return Linear(sum(numbers))
        if any(numbers):
            raise NOT_LINEAR.error("a number cannot be added to a node's value", span=node.span)
        return Linear(None, tuple(t for p in parts for t in p.terms))

    def _product(self, node: tree.Product, env: Env, run: str) -> Linear:
        out = Linear(1.0)
        for operator, factor in node.factors:
            by = self._linear(factor, env, run)
            if operator == "/":
                out = out.scaled(1 / self._divisor(by, factor.span))
            elif by.number is not None:
                out = out.scaled(by.number)
            elif out.number is not None:
                out = by.scaled(out.number)
            else:
                raise NOT_LINEAR.error("two values cannot be multiplied", span=node.span)
        return out

    def _divisor(self, by: Linear, span: Span | None) -> float:
        if by.number is None:
            raise NOT_LINEAR.error("nothing can be divided by a node's value", span=span)
        if by.number == 0:
            raise NOT_LINEAR.error("this divides by zero", span=span)
        if not math.isfinite(by.number):
            raise NOT_LINEAR.error("this divides by a number that is too large for a 64-bit float", span=span)
        return by.number

    # ---- sources

    def _at(self, node: tree.At, env: Env, run: str) -> Linear:
        inner = self._linear(node.inner, env, run)
        if inner.number is not None:
            raise WRONG_KIND.error("a number is the same at every position", span=node.span)
        tokens = self._places.tokens(node.place, env)
        return Linear(None, tuple((c, self.sources.moved(s, tokens, node.span)) for c, s in inner.terms))

    def _number(self, node: tree.Value, env: Env) -> float:
        """Arithmetic that has to be a number."""
        found = self._linear(_arithmetic(node), env, "")
        if found.number is None:
            raise WRONG_KIND.error("a number is needed here", span=node.span)
        if not math.isfinite(found.number):
            raise BAD_ARGUMENT.error("this is too large for a 64-bit float", span=node.span)
        return found.number

    def _name(self, node: tree.Ref, env: Env, run: str) -> Linear:
        if node.indices or node.sites:
            raise WRONG_KIND.error("a node is no value; a value is what the node has in some world", span=node.span)
        name = node.name.text
        match env.get(name):
            case Number(value):
                return Linear(float(value))
            case WorldName(world):
                return _only(FromWorld(world))
            case None:
                return self._global(node.name, run)
            case _:
                raise WRONG_KIND.error(f"{name!r} is no value: it ranges over nodes or positions", span=node.span)

    def _global(self, name: tree.Name, run: str) -> Linear:
        match name.text:
            case "zero":
                return Linear(None)
            case "self":
                return _only(Itself())
            case "mean":
                return _only(Mean(run))
            case "blocked":
                return _only(Blocked())
            case "resample":
                return _only(self.sources.resampled(run, None, 0, name.span))
            case "noise" | "tensor" as function:
                message = f"{function} needs its arguments"
                raise BAD_ARGUMENT.error(message, fix=f"as in `{EXAMPLES[function]}`", span=name.span)
            case _:
                if name.text not in self._data.columns and self._data.records:
                    raise self._scope.not_a("a value", name, [*self._data.columns, *NAMES])
                return _only(FromWorld(self._data.world(name)))

    def _function(self, node: tree.Function, env: Env, run: str) -> Linear:
        match node.name.text:
            case "mean":
                return _only(self.sources.mean(node, env, run))
            case "tensor":
                return _only(self.sources.tensor(node))
            case "resample":
                return _only(self.sources.resample(node, env, run))
            case "noise":
                return _only(self.sources.noise(node, env))
            case "zero" | "self" | "blocked" as name:
                raise BAD_ARGUMENT.error(f"{name} takes no arguments", fix=f"write `{name}`", span=node.span)
            case _:
                raise self._scope.not_a("a value", node.name, ["mean", "resample", "noise", "tensor"])


def _only(source: Source) -> Linear:
    return Linear(None, ((1.0, source),))


def _is_alone(node: tree.Value) -> bool:
    """Whether this is a name, in parentheses or not."""
    while isinstance(node, tree.Parens):
        node = node.inner
    return isinstance(node, tree.Ref)


def _arithmetic(node: tree.Value) -> tree.Arithmetic:
    if isinstance(node, tree.Normalised):
        raise WRONG_KIND.error("`from ... to` stands at the end of a metric, not inside parentheses", span=node.span)
    return node


def _merged(terms: tuple[tuple[float, Source], ...]) -> tuple[tuple[float, Source], ...]:
    """One term a source, none with coefficient 0."""
    out: dict[Source, float] = {}
    for coefficient, source in terms:
        out[source] = out.get(source, 0.0) + coefficient
    return tuple((c, s) for s, c in out.items() if c != 0)
