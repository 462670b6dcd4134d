"""Metrics: arithmetic over logits, probabilities and the like, each read at one token of a prompt."""

from __future__ import annotations

from dataclasses import replace

from patchc.diagnostics import RULES, PatchcError, nearest
from patchc.ir.experiment import (
    Called,
    Constant,
    Expression,
    Kl,
    Measure,
    Metric,
    Product,
    Quotient,
    Read,
    Sum,
)
from patchc.parse import tree
from patchc.resolve.answers import AnswerReader, Answers
from patchc.resolve.bindings import NO_LOCALS
from patchc.resolve.data import Dataset
from patchc.resolve.positions import Positions
from patchc.resolve.scope import BUILT_IN, NODE_NAMES, NOT_SUPPORTED_YET, WRONG_KIND, Scope, written

RECURSIVE_METRIC = RULES.add("recursive-metric", "a metric that is defined by itself")
NESTED_NORMALISED = RULES.add("nested-normalised", "a normalised metric inside arithmetic or another normalised one")
SAME_WORLD = RULES.add("same-world", "a metric normalised between two worlds that are one")
ONE_POSITION = RULES.add("one-position", "a metric at several positions of a prompt")
DIVISION_BY_ZERO = RULES.add("division-by-zero", "a metric divides by zero")

READS = tuple(m.value for m in Measure)
FUNCTIONS = (*READS, "kl")

Tokens = tuple[int, ...]


class Metrics:
    """The metrics of a spec, by name or as they are written in `measure`."""

    def __init__(self, scope: Scope, dataset: Dataset, positions: Positions):
        self._scope = scope
        self._data = dataset
        self._positions = positions
        self._answers = AnswerReader(dataset)
        self._open: list[str] = []
        self._circles: list[set[str]] = []
        """Metrics that are defined by one another, which has been reported."""

    def measured(self, node: tree.Measured) -> Metric:
        """One thing of a `measure` clause, under its alias, its own name or the text as written."""
        name = node.alias.text if node.alias else written(node.value)
        return replace(self.metric(node.value, name), span=node.span)

    def check(self, metric: tree.Metric) -> None:
        """Resolve a declared metric, for its errors."""
        self.metric(metric.value, metric.name.text)

    def metric(self, node: tree.Value, name: str) -> Metric:
        """A metric, normalised where it says so or where it is the name of one that is."""
        match node:
            case tree.Normalised():
                return self._normalised(node, name)
            case tree.Ref(tree.Name(text), (), ()) if text in self._scope.metrics:
                with self._opened(node.name):
                    return self.metric(self._scope.metrics[text].value, name)
            case _:
                return Metric(name, self._expression(node, None), span=node.span)

    def _normalised(self, node: tree.Normalised, name: str) -> Metric:
        if node.per is not None and node.per.text != "prompt":
            raise WRONG_KIND.error("only `per prompt` can stand here", fix="write `per prompt`", span=node.per.span)
        zero, one = self._data.world(node.zero), self._data.world(node.one)
        if all(self._data.same(zero, one)):
            told = "one world" if zero == one else "the same text in every prompt"
            message = f"{zero!r} and {one!r} are {told}, so that nothing lies between 0 and 1"
            raise SAME_WORLD.error(
                message, fix="name two different worlds, as in `from corrupt to clean`", span=node.span
            )
        expression = self._expression(node.inner, None)
        return Metric(name, expression, zero, one, node.per is not None, node.span)

    # ---- arithmetic

    def _expression(self, node: tree.Value, at: Tokens | None) -> Expression:
        """`at`: the tokens that an enclosing `@` gives."""
        match node:
            case tree.Number() | tree.Parameter():
                return Constant(float(self._scope.number(node)))
            case tree.Ref():
                return self._name(node, at)
            case tree.Function():
                return self._function(node, at)
            case tree.Parens():
                return self._expression(node.inner, at)
            case tree.Negated():
                return _scaled(self._expression(node.inner, at), -1)
            case tree.Sum():
                return _sum([(1 if sign == "+" else -1, self._expression(t, at)) for sign, t in node.terms])
            case tree.Product():
                return self._product(node, at)
            case tree.At():
                return self._expression(node.inner, self._place(node.place))
            case tree.Normalised():
                raise NESTED_NORMALISED.error("a normalised metric cannot be a part of another", span=node.span)

    def _product(self, node: tree.Product, at: Tokens | None) -> Expression:
        out = self._expression(node.factors[0][1], at)
        for operator, factor in node.factors[1:]:
            by = self._expression(factor, at)
            if operator == "*":
                out = _product(out, by)
            elif isinstance(by, Constant) and by.number == 0:
                raise DIVISION_BY_ZERO.error("this divides by zero", span=node.span)
            else:
                out = _scaled(out, 1 / by.number) if isinstance(by, Constant) else Quotient(out, by)
        return out

    # ---- names and functions

    def _name(self, node: tree.Ref, at: Tokens | None) -> Expression:
        name = node.name.text
        if name in NODE_NAMES or node.indices or node.sites:
            raise NOT_SUPPORTED_YET.error("a metric that reads a node is not supported yet", span=node.span)
        if name in self._scope.metrics:
            with self._opened(node.name):
                return self._inner(node, self._scope.metrics[name].value, at)
        if name in self._scope.called:
            return Called(name)
        if name in READS:
            return Read(Measure(name), self._answers.column(tree.Name("answer", span=node.span)), self._tokens(at))
        raise self._scope.not_a("a metric", node.name, [*self._scope.metrics, *self._scope.called, *FUNCTIONS])

    def _inner(self, node: tree.Ref, value: tree.Value, at: Tokens | None) -> Expression:
        if isinstance(value, tree.Normalised):
            message = f"{node.name.text!r} is normalised, and cannot be a part of another metric"
            raise NESTED_NORMALISED.error(message, span=node.span)
        return self._expression(value, at)

    def _function(self, node: tree.Function, at: Tokens | None) -> Expression:
        name = node.name.text
        if name == "dot":
            raise NOT_SUPPORTED_YET.error("dot is not supported yet", span=node.span)
        if name not in FUNCTIONS:
            raise self._no_function(node.name)
        if len(node.arguments) != 1:
            raise WRONG_KIND.error(f"{name} takes one {'world' if name == 'kl' else 'answer'}", span=node.span)
        argument = node.arguments[0]
        if name == "kl":
            if not isinstance(argument, tree.Ref) or argument.indices or argument.sites:
                raise WRONG_KIND.error("kl takes a world", fix="as in `kl(clean)`", span=node.span)
            return Kl(self._data.world(argument.name), self._tokens(at))
        return Read(Measure(name), self._answer(argument, name), self._tokens(at))

    def _no_function(self, name: tree.Name):
        if name.text in BUILT_IN or name.text in self._scope.names:
            return self._scope.not_a("a metric's function", name, FUNCTIONS)
        message = f"no function {name.text!r}; a metric has {', '.join(FUNCTIONS)}"
        return WRONG_KIND.error(message, fix=nearest(name.text, FUNCTIONS), span=name.span)

    def _answer(self, node: tree.Argument, name: str, first: bool = False) -> Answers:
        match node:
            case tree.Text():
                return self._answers.literal(node.text, node.span, first)
            case tree.Ref(column, (), ()):
                return self._answers.column(column, first)
            case tree.Function(tree.Name("first"), (inner,)) if not first:
                return self._answer(inner, name, True)
            case tree.Parameter():
                return self._answers.literal(self._scope.text(node), node.span, first)
            case _:
                message = f'{name} takes a column or a text: {name}(answer), {name}(" Mary"), {name}(first(answer))'
                raise WRONG_KIND.error(message, span=node.span)

    # ---- positions

    def _tokens(self, at: Tokens | None) -> Tokens:
        """The token of each prompt that is read: the last where nothing else is said."""
        layout = self._data.layout
        return at if at is not None else tuple(layout.token(i, -1) for i in range(layout.n_prompts))

    def _place(self, place: tree.Place) -> Tokens:
        layout = self._data.layout
        spots = self._positions.place(place, NO_LOCALS)
        many = next((i for i, here in enumerate(spots) if len(here) > 1), None)
        if many is not None:
            message = f"a metric is read at one position; this is {len(spots[many])} in prompt {many}"
            raise ONE_POSITION.error(message, span=place.span)
        return tuple(layout.offsets[i] + here[0] for i, here in enumerate(spots))

    def _opened(self, name: tree.Name) -> _Opened:
        if name.text in self._open:
            circle = self._open[self._open.index(name.text) :]
            if set(circle) in self._circles:
                raise PatchcError(())
            self._circles.append(set(circle))
            chain = " -> ".join([*circle, name.text])
            raise RECURSIVE_METRIC.error(f"{name.text!r} is defined by itself ({chain})", span=name.span)
        return _Opened(self._open, name.text)


class _Opened:
    """While a metric's definition is read, its name stands on the stack."""

    def __init__(self, stack: list[str], name: str):
        self._stack, self._name = stack, name

    def __enter__(self) -> None:
        self._stack.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._stack.pop()


# ---- arithmetic with what is known folded


def _sum(terms: list[tuple[float, Expression]]) -> Expression:
    """A flat linear combination; numbers are added up."""
    flat: list[tuple[float, Expression]] = []
    constant = 0.0
    for coefficient, term in terms:
        for c, inner in term.terms if isinstance(term, Sum) else ((1.0, term),):
            if isinstance(inner, Constant):
                constant += coefficient * c * inner.number
            else:
                flat.append((coefficient * c, inner))
    if not flat:
        return Constant(constant)
    if constant:
        flat.append((constant, Constant(1.0)))
    return flat[0][1] if len(flat) == 1 and flat[0][0] == 1 else Sum(tuple(flat))


def _scaled(expression: Expression, by: float) -> Expression:
    return _sum([(by, expression)])


def _product(a: Expression, b: Expression) -> Expression:
    if isinstance(a, Constant):
        return _scaled(b, a.number)
    if isinstance(b, Constant):
        return _scaled(a, b.number)
    parts = [p for e in (a, b) for p in (e.factors if isinstance(e, Product) else (e,))]
    return Product(tuple(parts))
