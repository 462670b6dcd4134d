"""What a metric's expression reads from a run: its leaves, from left to right."""

from __future__ import annotations

from collections.abc import Iterator

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
