"""What could stand at a place, in words: the parser's terminals, grouped as people think of them."""

from __future__ import annotations

from patchc.parse.situation import CLAUSES, STATEMENTS, TARGETS

ABSORBED = frozenset({"INT", "PARAM", "FIRST", "LAST", "LBRACE"})
"""What a value, an index or a set needs no mention of."""

# What may stand next, by the terminals that begin it; an earlier line takes its own from later ones.
EXPECTED: tuple[tuple[str, frozenset[str]], ...] = (
    ("a clause (`run`, `patch`, `measure`, ...)", CLAUSES),
    ("a statement (`data`, `metric`, `let`, `experiment`, ...)", STATEMENTS),
    ("`node`, `edge`, `path` or `all`", TARGETS),
    ("a value or a metric", frozenset({"NAME", "LPAR", "FLOAT", "MINUS"})),
    ("a node or a path", frozenset({"NAME", "LPAR"})),
    ("an index", frozenset({"INT", "STAR", "NAME"})),
    ("a position", frozenset({"INT", "LBRACE", "NAME"})),
    ("a number or a name", frozenset({"INT", "NAME"})),
    ("a number", frozenset({"FLOAT", "INT"})),
    ("a column or `at`", frozenset({"NAME", "AT", "RBRACE"})),
    ("a name", frozenset({"NAME"})),
    ("a text in double quotes", frozenset({"STRING"})),
    ("a comparison (`<`, `>`, `<=`, `>=`, `==`)", frozenset({"COMPARE"})),
    ("a whole number", frozenset({"INT"})),
    ("`with` and a value", frozenset({"WITH"})),
    ("`in`", frozenset({"IN"})),
    ("`=`", frozenset({"EQUAL"})),
    ("`at`", frozenset({"AT"})),
    ("`by`", frozenset({"BY"})),
    ("`to`", frozenset({"TO"})),
    ("`top`", frozenset({"TOP"})),
    ("`includes`", frozenset({"INCLUDES"})),
    ("`interval`", frozenset({"INTERVAL"})),
    ("`within`", frozenset({"WITHIN"})),
    ("`{`", frozenset({"LBRACE"})),
    ("`)`", frozenset({"RPAR"})),
    ("`]`", frozenset({"RSQB"})),
    ("`}`", frozenset({"RBRACE"})),
)


def expected(accepts: frozenset[str]) -> str:
    """What could stand here, in words; operators are left out, as nearly always one could."""
    left, found = set(accepts), list[str]()
    for words, terminals in EXPECTED:
        if terminals <= left:
            found.append(words)
            left -= terminals | ABSORBED if "NAME" in terminals else terminals
    if not found:
        return "the end of the file"
    return ", ".join(found[:-1]) + " or " + found[-1] if len(found) > 1 else found[0]
