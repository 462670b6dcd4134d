"""Values, what stands after `with`: worlds, means, tensors, `self`, zero, and linear combinations of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchc.diagnostics import RULES, Span
from patchc.ir.experiment import FromWorld, Given, Itself, Mean, Source, Value
from patchc.parse import tree
from patchc.resolve.bindings import Env, Number, WorldName
from patchc.resolve.data import Dataset
from patchc.resolve.scope import NOT_SUPPORTED_YET, WRONG_KIND, Scope
from patchc.resolve.tensors import Tensors

NOT_LINEAR = RULES.add("not-linear", "a value that is no linear combination of worlds, means, tensors and self")

NAMES = ("zero", "mean", "self")


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

    def __init__(self, scope: Scope, dataset: Dataset, tensors: Tensors):
        self._scope = scope
        self._data = dataset
        self._tensors = tensors

    def value(self, node: tree.Value, env: Env, run: str) -> Value:
        """What is patched in."""
        if isinstance(node, tree.Normalised):
            raise WRONG_KIND.error("`from ... to` belongs to metrics, not to values", span=node.span)
        found = self._linear(node, env, run)
        if found.number is not None:
            message = f"this is the number {found.number:g}; a value is a world, a mean, a tensor, self or zero"
            raise NOT_LINEAR.error(message, fix="write `zero`" if found.number == 0 else None, span=node.span)
        return Value(_merged(found.terms))

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
                raise NOT_SUPPORTED_YET.error("a value from another position is not supported yet", span=node.span)

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
        return by.number

    # ---- sources

    def _name(self, node: tree.Ref, env: Env, run: str) -> Linear:
        if node.indices or node.sites:
            raise WRONG_KIND.error("a node is no value; a value is what the node has in some world", span=node.span)
        name = node.name.text
        match env.get(name):
            case Number(value):
                return Linear(float(value))
            case WorldName(world):
                return Linear(None, ((1.0, FromWorld(world)),))
            case None:
                return self._global(node.name, run)
            case _:
                raise WRONG_KIND.error(f"{name!r} is no value: it ranges over nodes or positions", span=node.span)

    def _global(self, name: tree.Name, run: str) -> Linear:
        match name.text:
            case "zero":
                return Linear(None)
            case "self":
                return Linear(None, ((1.0, Itself()),))
            case "mean":
                return Linear(None, ((1.0, Mean(run)),))
            case "blocked" | "resample" | "noise":
                raise _unsupported(name.text, name.span)
            case _:
                if name.text not in self._data.columns and self._data.records:
                    raise self._scope.not_a("a value", name, [*self._data.columns, *NAMES])
                return Linear(None, ((1.0, FromWorld(self._data.world(name))),))

    def _function(self, node: tree.Function, env: Env, run: str) -> Linear:
        match node.name.text:
            case "mean":
                return Linear(None, ((1.0, self._mean(node, env, run)),))
            case "tensor":
                return Linear(None, ((1.0, self._tensor(node)),))
            case "resample" | "noise" | "blocked" as name:
                raise _unsupported(name, node.span)
            case _:
                raise self._scope.not_a("a value", node.name, ["mean", "tensor"])

    def _mean(self, node: tree.Function, env: Env, run: str) -> Mean:
        world, over_positions = run, False
        for argument in node.arguments:
            match argument:
                case tree.Named(tree.Name("over"), tree.Ref(tree.Name("positions"), (), ())):
                    over_positions = True
                case tree.Named(tree.Name("by")):
                    raise NOT_SUPPORTED_YET.error("mean(by=...) is not supported yet", span=argument.span)
                case tree.Text():
                    raise NOT_SUPPORTED_YET.error("the mean of another file is not supported yet", span=argument.span)
                case tree.Ref(name, (), ()):
                    local = env.get(name.text)
                    world = local.label if isinstance(local, WorldName) else self._data.world(name)
                case _:
                    raise WRONG_KIND.error("mean takes a world, and over=positions", span=argument.span)
        return Mean(world, over_positions)

    def _tensor(self, node: tree.Function) -> Given:
        texts = [a.text for a in node.arguments if isinstance(a, tree.Text)]
        if len(texts) != len(node.arguments) or len(texts) not in (1, 2):
            message = "tensor takes a safetensors file and a key, or the name of a tensor given in Python"
            raise WRONG_KIND.error(message, fix='as in `tensor("v.safetensors", "key")`', span=node.span)
        if len(texts) == 1:
            return Given(self._tensors.from_python(texts[0], node.span))
        return Given(self._tensors.from_file(texts[0], texts[1], node.span))


def _arithmetic(node: tree.Value) -> tree.Arithmetic:
    if isinstance(node, tree.Normalised):
        raise WRONG_KIND.error("`from ... to` stands at the end of a metric, not inside parentheses", span=node.span)
    return node


def _unsupported(name: str, span: Span | None) -> Any:
    return NOT_SUPPORTED_YET.error(f"{name} is not supported yet; zero, mean and another world are", span=span)


def _merged(terms: tuple[tuple[float, Source], ...]) -> tuple[tuple[float, Source], ...]:
    """One term a source, none with coefficient 0."""
    out: dict[Source, float] = {}
    for coefficient, source in terms:
        out[source] = out.get(source, 0.0) + coefficient
    return tuple((c, s) for s, c in out.items() if c != 0)
