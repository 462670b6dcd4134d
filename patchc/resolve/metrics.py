"""Metrics: arithmetic over logits, probabilities and the like, each read at one token of a prompt.

What a node computes is read by `probes`; units and what can be folded are for `arithmetic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from patchc.diagnostics import RULES, PatchcError, Severity, nearest
from patchc.ir.experiment import Called, Interval, Kl, Measure, Metric, Read
from patchc.parse import tree
from patchc.resolve.answers import AnswerReader
from patchc.resolve.arithmetic import UNITS, Typed, added, divided, multiplied, negated, number
from patchc.resolve.continuations import SUMMED, Continuations
from patchc.resolve.data import Dataset
from patchc.resolve.positions import Positions
from patchc.resolve.probes import Probes
from patchc.resolve.scope import BUILT_IN, NODE_NAMES, WRONG_KIND, Scope, gathered, written

RECURSIVE_METRIC = RULES.add("recursive-metric", "a metric that is defined by itself")
NESTED_NORMALISED = RULES.add("nested-normalised", "a normalised metric inside arithmetic or another normalised one")
SAME_WORLD = RULES.add("same-world", "a metric normalised between two worlds that are one")
BAD_INTERVAL = RULES.add("bad-interval", "a bootstrap interval that cannot be drawn as it is asked for")
OFFSET_OF_NUMBER = RULES.add(
    "offset-of-number", "a whole number right after a metric's position, which it is not added to", Severity.WARNING
)

METRIC_TOO_LARGE = RULES.add("metric-too-large", "metrics that stand in one another so often that no run computes them")

MAX_NAMED = 1000
"""How often metrics may be named in one, in those that it names, and so on."""
MAX_DEPTH = 50
"""How deep, one in the other."""

READS = tuple(m.value for m in Measure)
FUNCTIONS = (*READS, "kl", "dot")
RESAMPLES = range(100, 1_000_001)

Tokens = tuple[int, ...]


class Metrics:
    """The metrics of a spec, by name or as they are written in `measure`."""

    def __init__(
        self,
        scope: Scope,
        dataset: Dataset,
        positions: Positions,
        probes: Probes,
        answers: AnswerReader,
        continuations: Continuations,
    ):
        self._scope = scope
        self._data = dataset
        self._positions = positions
        self._probes = probes
        self._answers = answers
        self._continuations = continuations
        self._open: list[str] = []
        self._named = 0
        self._circles: list[set[str]] = []
        """Metrics that are defined by one another, which has been reported."""

    def measured(self, node: tree.Measured) -> Metric:
        """One thing of a `measure` clause, under its alias, its own name or the text as written."""
        name = node.alias.text if node.alias else written(node.value)
        interval = self._interval(node.interval) if node.interval else None
        return replace(self.metric(node.value, name), span=node.span, interval=interval)

    def check(self, metric: tree.Metric) -> None:
        """Resolve a declared metric, for its errors."""
        self.metric(metric.value, metric.name.text)

    def metric(self, node: tree.Value, name: str) -> Metric:
        """A metric by its expression."""
        self._named = 0
        return self._metric(node, name)

    def _metric(self, node: tree.Value, name: str) -> Metric:
        """The same, normalised where it says so or where it is the name of one that is."""
        match node:
            case tree.Normalised():
                return self._normalised(node, name)
            case tree.Ref(tree.Name(text), (), ()) if text in self._scope.metrics:
                with self._opened(node.name):
                    return self._metric(self._scope.metrics[text].value, name)
            case _:
                found = self._typed(node, None)
                return Metric(name, found.expression, span=node.span, unit=found.unit)

    def _normalised(self, node: tree.Normalised, name: str) -> Metric:
        if node.per is not None and node.per.text != "prompt":
            raise WRONG_KIND.error("only `per prompt` can stand here", fix="write `per prompt`", span=node.per.span)
        zero, one = self._data.world(node.zero), self._data.world(node.one)
        if all(self._data.same(zero, one)):
            told = "one world" if zero == one else "the same text in every prompt"
            message = f"{zero!r} and {one!r} are {told}, so that nothing lies between 0 and 1"
            fix = "name two different worlds, as in `from corrupt to clean`"
            raise SAME_WORLD.error(message, fix=fix, span=node.span)
        expression = self._typed(node.inner, None).expression
        return Metric(name, expression, zero, one, node.per is not None, node.span)

    # ---- intervals

    def _interval(self, node: tree.Interval) -> Interval:
        level = self._scope.number(node.level)
        if not 0 < level < 1:
            fix = f"write `interval {level / 100:g}`" if 50 <= level < 100 else "as in `interval 0.95`"
            message = f"an interval's level lies between 0 and 1, and this is {level:g}"
            raise BAD_INTERVAL.error(message, fix=fix, span=node.level.span)
        options = self._options(node)
        resamples = options.get("resamples", Interval(level).resamples)
        if resamples not in RESAMPLES:
            message = f"between {RESAMPLES[0]:,} and {RESAMPLES[-1]:,} resamples are drawn, not {resamples:,}"
            raise BAD_INTERVAL.error(message, span=node.span)
        if len(self._data.lengths) < 2:
            message = "an interval is drawn over prompts, and there is one prompt"
            raise BAD_INTERVAL.error(message, fix="give more prompts, or leave the interval out", span=node.span)
        return Interval(float(level), options.get("seed", 0), resamples)

    def _options(self, node: tree.Interval) -> Mapping[str, int]:
        out: dict[str, int] = {}
        for option in node.options:
            name = option.name.text
            if name not in ("seed", "resamples"):
                fix = nearest(name, ("seed", "resamples"))
                raise BAD_INTERVAL.error(f"an interval has seed and resamples, no {name}", fix=fix, span=option.span)
            value = self._scope.number(option.value) if isinstance(option.value, tree.Number | tree.Parameter) else None
            if not isinstance(value, int):
                raise BAD_INTERVAL.error(f"{name} is a whole number", fix=f"as in `{name}=1`", span=option.value.span)
            out[name] = value
        return out

    # ---- arithmetic

    def _typed(self, node: tree.Value, at: Tokens | None) -> Typed:
        """`at`: the tokens that an enclosing `@` gives."""
        match node:
            case tree.Number() | tree.Parameter():
                return number(float(self._scope.number(node)))
            case tree.Ref():
                return self._name(node, at)
            case tree.Function():
                return self._function(node, at)
            case tree.Parens():
                return self._typed(node.inner, at)
            case tree.Negated():
                return negated(self._typed(node.inner, at))
            case tree.Sum():
                self._warn_offset(node)
                found = gathered((t for _, t in node.terms), lambda t: self._typed(t, at))
                signs = (1 if sign == "+" else -1 for sign, _ in node.terms)
                spans = (t.span for _, t in node.terms)
                return added(list(zip(signs, found, spans, strict=True)))
            case tree.Product():
                return self._product(node, at)
            case tree.At():
                self._probes.check_place(node)
                return self._typed(node.inner, self._positions.one(node.place))
            case tree.Normalised():
                raise NESTED_NORMALISED.error("a normalised metric cannot be a part of another", span=node.span)

    def _warn_offset(self, node: tree.Sum) -> None:
        """`logit(answer) @ end - 1` takes 1 from the logit; most likely the position was meant."""
        for (_, term), (sign, by) in pairwise(node.terms):
            last = term.factors[-1][1] if isinstance(term, tree.Product) else term
            if not (isinstance(last, tree.At) and isinstance(last.place, tree.Name | tree.Number)):
                continue
            if isinstance(by, tree.Number) and isinstance(by.value, int):
                done, to = ("added", "to") if sign == "+" else ("taken", "from")
                message = f"{by.value} is {done} {to} the number that is read, not {to} its position"
                fix = f"@ {{{written(last.place)} {sign} {by.value}}} for the position"
                self._scope.report.add(OFFSET_OF_NUMBER.at(node.span, message, fix=fix))

    def _product(self, node: tree.Product, at: Tokens | None) -> Typed:
        out, *others = gathered((f for _, f in node.factors), lambda f: self._typed(f, at))
        for (operator, _), by in zip(node.factors[1:], others, strict=True):
            out = multiplied(out, by) if operator == "*" else divided(out, by, node.span)
        return out

    # ---- names and functions

    def _name(self, node: tree.Ref, at: Tokens | None) -> Typed:
        name = node.name.text
        if name in NODE_NAMES or name in self._scope.lets or node.indices or node.sites:
            return Typed(self._probes.number(node, at))
        if name in self._scope.metrics:
            with self._opened(node.name):
                return self._inner(node, self._scope.metrics[name].value, at)
        if name in self._scope.called:
            return Typed(Called(name))
        if name in READS:
            answer = tree.Ref(tree.Name("answer", span=node.span), span=node.span)
            return self._read(Measure(name), answer, at, node)
        if name in FUNCTIONS:
            raise WRONG_KIND.error(f"{name} takes {TAKES[name]}", fix=f"as in `{EXAMPLES[name]}`", span=node.span)
        raise self._scope.not_a("a metric", node.name, [*self._scope.metrics, *self._scope.called, *FUNCTIONS])

    def _inner(self, node: tree.Ref, value: tree.Value, at: Tokens | None) -> Typed:
        if isinstance(value, tree.Normalised):
            message = f"{node.name.text!r} is normalised, and cannot be a part of another metric"
            raise NESTED_NORMALISED.error(message, span=node.span)
        return self._typed(value, at)

    def _function(self, node: tree.Function, at: Tokens | None) -> Typed:
        name = node.name.text
        if name == "dot":
            return Typed(self._probes.dot(node, at))
        if name not in FUNCTIONS:
            raise self._no_function(node)
        if len(node.arguments) != 1:
            fix = _difference(name, node.arguments)
            raise WRONG_KIND.error(f"{name} takes {TAKES.get(name, 'one answer')}", fix=fix, span=node.span)
        argument = node.arguments[0]
        if name == "kl":
            if not isinstance(argument, tree.Ref) or argument.indices or argument.sites:
                raise WRONG_KIND.error("kl takes a world", fix="as in `kl(clean)`", span=node.span)
            return Typed(Kl(self._data.world(argument.name), self._tokens(at)), "nats", node.span)
        return self._read(Measure(name), argument, at, node)

    def _no_function(self, node: tree.Function):
        name = node.name
        if name.text in BUILT_IN or name.text in self._scope.names:
            return self._scope.not_a("a metric's function", name, FUNCTIONS)
        measure = name.text.removesuffix("_diff").removesuffix("_difference")
        fix = _difference(measure, node.arguments) if measure != name.text else None
        message = f"no function {name.text!r}; a metric has {', '.join(FUNCTIONS)}"
        return WRONG_KIND.error(message, fix=fix or nearest(name.text, FUNCTIONS), span=name.span)

    # ---- answers

    def _read(self, measure: Measure, node: tree.Argument, at: Tokens | None, whole: tree.Construct) -> Typed:
        answer, first = self._answer(node, measure)
        unit = UNITS[measure]
        if measure == SUMMED and not first and self._answers.is_several(answer):
            return Typed(self._continued(answer, at, whole), unit, whole.span)
        if isinstance(answer, tree.Text):
            ids = self._answers.literal(answer.text, answer.span, first)
        else:
            ids = self._answers.column(answer, first)
        return Typed(Read(measure, ids, self._tokens(at)), unit, whole.span)

    def _continued(self, answer: tree.Name | tree.Text, at: Tokens | None, whole: tree.Construct):
        if at is not None and at != self._positions.last:
            message = "an answer of several tokens follows the prompt, and this is read at another position"
            raise WRONG_KIND.error(message, fix="`first(...)` reads the first token anywhere", span=whole.span)
        return self._continuations.read(self._answers.sequences(answer), whole.span)

    def _answer(self, node: tree.Argument, measure: Measure) -> tuple[tree.Name | tree.Text, bool]:
        """A column or a text, and whether only its first token is meant."""
        match node:
            case tree.Text():
                return node, False
            case tree.Ref(column, (), ()):
                return column, False
            case tree.Parameter():
                return tree.Text(self._scope.text(node), span=node.span), False
            case tree.Function(tree.Name("first"), (tree.Text() | tree.Ref(_, (), ()) | tree.Parameter() as inner,)):
                return self._answer(inner, measure)[0], True
            case _:
                message = f'{measure} takes a column or a text: {measure}(answer), {measure}(" Mary"), '
                raise WRONG_KIND.error(message + f"{measure}(first(answer))", span=node.span)

    # ---- positions

    def _tokens(self, at: Tokens | None) -> Tokens:
        """The token of each prompt that is read: the last where nothing else is said."""
        return self._positions.last if at is None else at

    def _opened(self, name: tree.Name) -> _Opened:
        if name.text in self._open:
            circle = self._open[self._open.index(name.text) :]
            if set(circle) in self._circles:
                raise PatchcError(())
            self._circles.append(set(circle))
            chain = " -> ".join([*circle, name.text])
            raise RECURSIVE_METRIC.error(f"{name.text!r} is defined by itself ({chain})", span=name.span)
        self._named += 1
        if self._named > MAX_NAMED or len(self._open) >= MAX_DEPTH:
            message = f"metrics stand in this one more than {MAX_NAMED:,} times, or more than {MAX_DEPTH} deep"
            raise METRIC_TOO_LARGE.error(message, span=name.span)
        return _Opened(self._open, name.text)


TAKES = {"kl": "one world", "dot": "a node and a tensor"}
EXAMPLES = {"kl": "kl(clean)", "dot": 'dot(resid_post[0] @ -1, tensor("probe.safetensors", "w"))'}


def _difference(measure: str, arguments: Sequence[tree.Argument]) -> str | None:
    """The fix for a function of two answers, which is a difference."""
    if measure not in READS or len(arguments) != 2:
        return None
    first, second = (written(argument) for argument in arguments)
    return f"write `{measure}({first}) - {measure}({second})`"


class _Opened:
    """While a metric's definition is read, its name stands on the stack."""

    def __init__(self, stack: list[str], name: str):
        self._stack, self._name = stack, name

    def __enter__(self) -> None:
        self._stack.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._stack.pop()
