"""The values of `${NAME}`: how they are read from text, and whether a spec has them. Where one is used, `Scope` looks
it up.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

from patchc.diagnostics import RULES, Diagnostic, nearest
from patchc.parse import tree

UNUSED_PARAMETER = RULES.add("unused-parameter", "a value is given for a ${NAME} that the spec does not have")
BAD_PARAMETER = RULES.add("bad-parameter", "a value given for a ${NAME} is neither a text nor a finite number")

Literal = str | int | float

LARGEST = 10**300
"""Whole numbers are smaller than this, as those that a spec writes are."""

_WHOLE = re.compile(r"-?[0-9]{1,300}")
_DECIMAL = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def read_literal(text: str) -> Literal:
    """`3` is an int, `0.5` and `1e-3` are floats, anything else is a text; `"3"` in double quotes too."""
    if _WHOLE.fullmatch(text):
        return int(text)
    if _DECIMAL.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    is_quoted = len(text) > 1 and text[0] == text[-1] == '"'
    return text[1:-1] if is_quoted else text


def parameter_names(spec: tree.Spec) -> tuple[str, ...]:
    """The names of a spec's parameters, in the order in which they first stand there."""
    return tuple(dict.fromkeys(node.name for node in _constructs(spec) if isinstance(node, tree.Parameter)))


def wrong_parameters(spec: tree.Spec, given: Mapping[str, object]) -> Iterator[Diagnostic]:
    """What is wrong with the values given for a spec, one not given aside: that is said where it is used."""
    known = parameter_names(spec)
    for name, value in given.items():
        if name not in known:
            there = ", ".join(f"${{{k}}}" for k in known)
            message = f"the spec has no ${{{name}}}; it has {there or 'no parameters'}"
            yield UNUSED_PARAMETER.at(None, message, fix=nearest(name, known))
        elif not _is_literal(value):
            is_long = isinstance(value, int) and not isinstance(value, bool)
            told = "one of more than 300 digits" if is_long else repr(value)
            message = f"${{{name}}} stands for a text or a finite number, not {told}"
            yield BAD_PARAMETER.at(None, message)


def _is_literal(value: object) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return abs(value) < LARGEST
    return isinstance(value, str) or (isinstance(value, float) and math.isfinite(value))


def _constructs(item: object) -> Iterator[tree.Construct]:
    """A construct and all that it is made of; nested no deeper than the parser lets brackets be."""
    if isinstance(item, tuple):
        for member in item:
            yield from _constructs(member)
    elif isinstance(item, tree.Construct):
        yield item
        for part in dataclasses.fields(item):
            if part.name != "span":
                yield from _constructs(getattr(item, part.name))
