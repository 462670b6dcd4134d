"""What a metric's expression reads from a run: its leaves, from left to right, and the same with others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from patchc.ir.experiment import (
    Called,
    Constant,
    Continuation,
    Expression,
    Kl,
    Leaf,
    NodeRead,
    Product,
    Quotient,
    Read,
    Sum,
)


def leaves(expression: Expression) -> Iterator[Leaf]:
    """Everything that an expression reads from a run."""
    match expression:
        case Read() | Continuation() | Kl() | NodeRead() | Called():
            yield expression
        case Sum(terms):
            for _, term in terms:
                yield from leaves(term)
        case Product(factors):
            for factor in factors:
                yield from leaves(factor)
        case Quotient(over, under):
            yield from leaves(over)
            yield from leaves(under)
        case Constant():
            pass


def with_leaves(expression: Expression, others: Mapping[Leaf, Leaf]) -> Expression:
    """The expression with some leaves in the place of others."""
    match expression:
        case Read() | Continuation() | Kl() | NodeRead() | Called():
            return others.get(expression, expression)
        case Sum(terms):
            return Sum(tuple((factor, with_leaves(term, others)) for factor, term in terms))
        case Product(factors):
            return Product(tuple(with_leaves(factor, others) for factor in factors))
        case Quotient(over, under):
            return Quotient(with_leaves(over, others), with_leaves(under, others))
        case Constant():
            return expression
