"""Arithmetic of metrics: sums, products and quotients with their units, and with what is known folded.

A number without a unit goes with anything. What is read from a run is for `metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchc.diagnostics import RULES, Note, PatchcError, Span
from patchc.ir.experiment import Constant, Expression, Measure, Product, Quotient, Sum

UNITS_DIFFER = RULES.add("units-differ", "a sum or a difference of numbers in different units")
DIVISION_BY_ZERO = RULES.add("division-by-zero", "a metric divides by zero")

UNITS = {
    Measure.LOGIT: "logits",
    Measure.PROB: "probability",
    Measure.LOGPROB: "nats",
    Measure.LOSS: "nats",
    Measure.RANK: "count",
    Measure.CORRECT: "fraction",
}
"""The unit of each thing that is read from the logits."""

_IN_WORDS = {"logits": "in logits", "nats": "in nats"}


@dataclass(frozen=True, slots=True)
class Typed:
    """An expression and its unit; `where` is the place that the unit comes from."""

    expression: Expression
    unit: str | None = None
    where: Span | None = None

    @property
    def constant(self) -> float | None:
        """The number that this is, where it is known."""
        return self.expression.number if isinstance(self.expression, Constant) else None


def number(value: float) -> Typed:
    """A number of the spec."""
    return Typed(Constant(value))


def negated(term: Typed) -> Typed:
    return Typed(_sum([(-1, term.expression)]), term.unit, term.where)


def added(terms: Sequence[tuple[int, Typed, Span | None]]) -> Typed:
    """The sum of (sign, term, its place). Raises `units-differ`."""
    united = next((t for _, t, _ in terms if t.unit is not None), None)
    for sign, term, span in terms:
        if united is not None and term.unit not in (None, united.unit):
            raise _differ(united, term, "subtracted" if sign < 0 else "added", span)
    expression = _sum([(sign, t.expression) for sign, t, _ in terms])
    return Typed(expression, united.unit if united else None, united.where if united else None)


def _differ(first: Typed, second: Typed, what: str, span: Span | None) -> PatchcError:
    notes = [Note(f"{_words(t.unit)} from here", t.where) for t in (first, second) if t.where is not None]
    message = f"this is {_words(second.unit)} and what stands before it is {_words(first.unit)}: they cannot be {what}"
    return PatchcError([UNITS_DIFFER.at(span, message, notes=notes)])


def _words(unit: str | None) -> str:
    return _IN_WORDS.get(unit or "", f"a {unit}")


def multiplied(a: Typed, b: Typed) -> Typed:
    """A product has the unit of the one factor that has one; of two units there is none."""
    factor = b if a.unit is None else a if b.unit is None else None
    return Typed(_product(a.expression, b.expression), factor and factor.unit, factor and factor.where)


def divided(over: Typed, under: Typed, span: Span | None) -> Typed:
    """A ratio of equal units has none. Raises `division-by-zero`."""
    by = under.constant
    if by == 0:
        raise DIVISION_BY_ZERO.error("this divides by zero", span=span)
    expression = Quotient(over.expression, under.expression) if by is None else _sum([(1 / by, over.expression)])
    return Typed(expression, over.unit, over.where) if under.unit is None else Typed(expression)


# ---- with what is known folded


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


def _product(a: Expression, b: Expression) -> Expression:
    if isinstance(a, Constant):
        return _sum([(a.number, b)])
    if isinstance(b, Constant):
        return _sum([(b.number, a)])
    parts = [p for e in (a, b) for p in (e.factors if isinstance(e, Product) else (e,))]
    return Product(tuple(parts))
