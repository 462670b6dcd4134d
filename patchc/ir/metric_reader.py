"""The printed form of metrics' expressions, read back from the bottom up. Paths and tokens are for `path_reader`."""

from __future__ import annotations

from typing import Any

from lark import Token

from patchc.ir.experiment import (
    Called,
    Constant,
    Continuation,
    Expression,
    Kl,
    Measure,
    NodeRead,
    Probe,
    Product,
    Quotient,
    Read,
    Sum,
)
from patchc.ir.path_reader import Built, Change, PathReader
from patchc.ir.paths import Step


class MetricReader(PathReader):
    """Expressions over the graph and the layout."""

    def reading(self, items: list[Any]) -> Read | Continuation:
        measure, *rest = items
        answers = tuple(a for a in rest if isinstance(a, tuple))
        spans = [s for s in rest if isinstance(s, list)]
        if True in rest:
            return Continuation(answers, tuple(map(tuple, spans)))
        return Read(Measure(measure), answers, _single(spans))

    def in_turn(self, _: list[Any]) -> bool:
        return True

    def answer(self, items: list[int]) -> tuple[int, ...]:
        return tuple(items)

    def kl(self, items: list[Any]) -> Kl:
        return Kl(items[0], _single(items[1:]))

    def node_at(self, items: list[Any]) -> NodeRead:
        probe, *rest = items
        neuron = rest.pop(0)[0] if isinstance(rest[0], tuple) else -1
        return NodeRead(probe, _single(rest), neuron=neuron)

    def node_entries(self, items: list[Any]) -> NodeRead:
        probe, *pairs = items
        return NodeRead(probe, tuple(t for t, _ in pairs), tuple(s for _, s in pairs))

    def neuron(self, items: list[int]) -> tuple[int]:
        return (items[0],)

    def pair(self, items: list[int]) -> tuple[int, int]:
        return items[0], items[1]

    def dot(self, items: list[Any]) -> NodeRead:
        *at, key = items
        read = self.node_at(at)
        return NodeRead(read.probe, read.tokens, neuron=read.neuron, key=key)

    def probe(self, items: list[Any]) -> Probe:
        base: Built = items[0]
        changes: list[Change] = items[1:]
        step = base(True)
        for change in changes:
            assert isinstance(step, Step)
            step = change(step, True)
        assert isinstance(step, Step)
        return Probe(step.nodes, step.site, step.rank)

    def inside(self, items: list[Any]) -> Probe:
        return self.probe(items)

    def called(self, items: list[Any]) -> Called:
        name, *reads = items
        return Called(name, *reads[0]) if reads else Called(name)

    def reads(self, items: list[Any]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        *columns, tokens = items
        return tuple(tokens), None if columns == [None] else tuple(columns)

    def whole_rows(self, _: list[Any]) -> None:
        return None

    def constant(self, items: list[float]) -> Constant:
        return Constant(items[0])

    def sum(self, items: list[Any]) -> Sum:
        return Sum(tuple(item for item in items if isinstance(item, tuple)))

    def signed(self, items: list[Any]) -> tuple[float, Expression]:
        sign, number, expression = items
        return (-number if sign == "-" else number), expression

    def product(self, items: list[Expression]) -> Product:
        return Product(tuple(items))

    def quotient(self, items: list[Expression]) -> Quotient:
        return Quotient(items[0], items[1])

    def span(self, items: list[int]) -> list[int]:
        return items

    def span_range(self, items: list[int]) -> list[int]:
        """From a token to a position of the same prompt."""
        first, position = items
        prompt, start = self.layout.place(first)
        return [self.layout.token(prompt, p) for p in range(start, position + 1)]

    def span_listed(self, items: list[int]) -> list[int]:
        return items

    def PLUS(self, token: Token) -> str:  # noqa: N802
        return str(token)


def _single(spans: list[list[int]]) -> tuple[int, ...]:
    """The token of each prompt."""
    if any(len(span) != 1 for span in spans):
        raise ValueError("one token a prompt is read here")
    return tuple(span[0] for span in spans)
