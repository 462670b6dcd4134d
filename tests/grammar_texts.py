"""Random specs drawn from the grammar itself, so that a construct added to it is in them.

What comes is a list of tokens; `spaced` joins them with random white space, line breaks and comments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from random import Random

from lark.grammar import NonTerminal, Rule, Symbol

from patchc.parse.parser import parser

SAMPLES = {
    "NAME": ["a", "head", "answer", "clean", "x_1", "latent"],
    "STRING": ['" Mary"', '"a \\"b\\" \\u00e9"', '"# no comment"', '"{ -> }"', '""', '"' + "long " * 30 + '"'],
    "PARAM": ["${H}", "${OUT_2}"],
    "INT": ["0", "3", "007", "12345"],
    "FLOAT": ["0.5", "1e-3", "2.50", "1.5E+2"],
    "COMPARE": ["<", "<=", ">", ">=", "=="],
}
"""Texts for the terminals that are no fixed word."""

COMMENTS = ["#", "# a remark", "#\ttabbed  ", '# with # and " and }', "# é", "# " + "long " * 25]


def tokens(
    rng: Random, start: str = "spec", most: int = 120, samples: Mapping[str, Sequence[str]] = SAMPLES
) -> list[str]:
    """The tokens of a random sentence of `start`; after `most` of them, only what ends soonest is added."""
    out: list[str] = []
    stack: list[Symbol] = [NonTerminal(start)]
    while stack:
        symbol = stack.pop()
        if symbol.is_term:
            out.append(rng.choice(samples.get(symbol.name) or [_words()[symbol.name]]))
        else:
            stack += reversed(_expansion(rng, symbol.name, len(out) + len(stack) > most))
    return out


def spaced(rng: Random, words: list[str], comments: float = 0.1) -> str:
    """Tokens with something between any two; `comments`: how often there is one."""
    out = [_gap(rng, comments)]
    for word in words:
        out += [word, _gap(rng, comments) or " "]
    return "".join(out) + rng.choice(["", "# at the end", "\n\n\n", "\t"])


def _gap(rng: Random, comments: float) -> str:
    gap = rng.choice(["", " ", "  ", "\n", "\n\n", "\r\n", "\n\n\n\n", "\t", " \n \t"])
    if rng.random() < comments:
        gap += " " + rng.choice(COMMENTS) + rng.choice(["\n", "\r\n", "\n\n\n"]) + _gap(rng, comments)
    return gap


def _expansion(rng: Random, name: str, soon: bool) -> list[Symbol]:
    options = _rules()[name]
    if soon:
        options = [min(options, key=_depth_of)]
    return rng.choice(options).expansion


@cache
def _rules() -> dict[str, list[Rule]]:
    found: dict[str, list[Rule]] = {}
    for rule in parser().rules:
        found.setdefault(rule.origin.name, []).append(rule)
    return found


@cache
def _words() -> dict[str, str]:
    return {t.name: t.pattern.value for t in parser().terminals if t.pattern.type == "str"}


@cache
def _depths() -> dict[str, int]:
    """The fewest rules below each rule, up to a fixed point."""
    depths: dict[str, int] = {}
    for _ in range(len(_rules())):
        for name, rules in _rules().items():
            known = [d for r in rules if (d := _known_depth(r, depths)) is not None]
            if known:
                depths[name] = min(known)
    return depths


def _known_depth(rule: Rule, depths: dict[str, int]) -> int | None:
    inner = [0 if s.is_term else depths.get(s.name) for s in rule.expansion]
    return None if None in inner else 1 + max((d for d in inner if d is not None), default=0)


def _depth_of(rule: Rule) -> int:
    depth = _known_depth(rule, _depths())
    assert depth is not None
    return depth
