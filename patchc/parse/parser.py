"""Text to tree: limits first, then lark; where lark finds an error, `recover` finds the others.

The parser is built on first use, so that importing patchc costs nothing.
"""

from __future__ import annotations

import re
from functools import cache

from lark import Lark
from lark.exceptions import UnexpectedInput

from patchc.diagnostics import RULES, Report, Source, Span
from patchc.parse import tree
from patchc.parse.build import build
from patchc.parse.recover import syntax_errors
from patchc.resources import grammar_text

TOO_LARGE = RULES.add("spec-too-large", "a spec's text is larger than any spec needs to be")
TOO_DEEP = RULES.add("nested-too-deep", "brackets inside brackets, deeper than any spec needs")

MAX_BYTES = 256 * 1024
MAX_DEPTH = 50

_BRACKETS = re.compile(r'"(?:[^"\\\n]|\\.)*"?|#[^\n]*|[([{]|[)\]}]')


def parse(source: Source) -> tree.Spec:
    """The syntax tree of a spec. Raises `PatchcError` with every syntax error of the text.

    Spans refer to the text without a byte order mark, as editors count columns.
    """
    source = Source(source.name, source.text.removeprefix("\ufeff"))
    report = Report()
    _check_limits(source, report)
    report.raise_errors()
    try:
        spec = build(parser().parse(source.text), source, report)
    except UnexpectedInput:
        for diagnostic in syntax_errors(source, parser()):
            report.add(diagnostic)
        report.raise_errors()
        raise
    report.raise_errors()
    return spec


@cache
def parser() -> Lark:
    """The LALR(1) parser of the grammar; it keeps no state between parses."""
    return Lark(grammar_text(), parser="lalr", lexer="basic", start="spec", propagate_positions=True)


@cache
def concrete_parser() -> Lark:
    """The same parser, with every token in its tree."""
    return Lark(grammar_text(), parser="lalr", lexer="basic", start="spec", keep_all_tokens=True)


def _check_limits(source: Source, report: Report) -> None:
    """Recursion further on follows brackets only: this bounds it."""
    size = len(source.text.encode(errors="replace"))
    if size > MAX_BYTES:
        message = f"this spec has {size} bytes; at most {MAX_BYTES} are read"
        report.add(TOO_LARGE.at(None, message, fix='put the data into a file: `data "prompts.jsonl"`'))
        return
    depth = 0
    for match in _BRACKETS.finditer(source.text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            message = f"brackets are nested deeper than {MAX_DEPTH} here"
            report.add(TOO_DEEP.at(Span(source, *match.span()), message, fix="name a part of it with `let`"))
            return
