"""Syntax errors from the habits of Python and other tools: lists, quotes, hook names, arrows to the left.

Rules for `explain`, which has their order: each looks at one kind of mistake and answers or passes.
"""

from __future__ import annotations

import re

from lark import Token

from patchc.diagnostics import Source
from patchc.parse.elsewhere import node_meant
from patchc.parse.situation import CLOSERS, RESERVED, TARGETS, Mistake, Situation

LONG = 10
"""Digits of a number that no range has."""
VERBS = {"ablate": "zero", "knockout": "zero", "zero": "zero", "restore": "clean", "corrupt": "corrupt"}
"""What other tools call a patch, and with what value it is one."""


def python_range(s: Situation, source: Source) -> Mistake | None:
    """`range(4)`."""
    if s.previous_kind != "LPAR" or s.index < 2 or s.tokens[s.index - 2] != "range":
        return None
    bounds = [int(t) for t in _inside(s, s.index - 1) if t.type == "INT" and len(t) < LONG]
    first, last = (bounds[0], bounds[1] - 1) if len(bounds) > 1 else (0, (bounds or [1])[0] - 1)
    fix = f"write `{first}..{last}`, or `layers` for every layer" if bounds else "write `layers`, or as in `0..3`"
    return Mistake("a range is written with two dots, its ends included", fix, s.tokens[s.index - 2])


def dotted(s: Situation, source: Source) -> Mistake | None:
    """`blocks.3.attn.hook_z` and `head.3.1`."""
    if s.kind not in ("INT", "FLOAT") or s.previous_kind != "DOT":
        return None
    start = s.token.start_pos or 0
    before = re.search(r"[\w.]*$", source.text[:start])
    after = re.match(r"[\w.]*", source.text[start:])
    written = (before[0] if before else "") + (after[0] if after else "")
    meant = node_meant(written, re.findall(r"(?<![A-Za-z0-9_])\d+", written))
    return Mistake("a node's indices stand in brackets, not after a `.`", f"write `{meant or 'head[3, 1]'}`")


def arrow_to_the_left(s: Situation, source: Source) -> Mistake | None:
    """`a <- b`."""
    if not (s.kind == "COMPARE" and s.token == "<" and s.next_kind == "MINUS" and "ARROW" in s.accepts and s.chain):
        return None
    after = _while_same(s, s.index + 2)
    reader = _text(source, s.tokens[s.chain[0] : s.index])
    writer = _text(source, after) if after else "..."
    return Mistake("an arrow leads from what writes to what reads", f"write `{writer} -> {reader}`")


def several(s: Situation, source: Source) -> Mistake | None:
    """`[0, 1]`, `{head[3, 1], head[3, 2]}`, `head[(3, 1), (3, 2)]`: lists where the language has another form."""
    if s.kind == "LPAR" and s.previous_kind == "LSQB" and s.index > 1:
        pairs = [f"{s.tokens[s.index - 2]}[{_text(source, p[1:-1])}]" for p in _items(_inside(s, s.index - 1))]
        return Mistake("indices are no pairs; nodes are joined with `|`", f"write `{' | '.join(pairs)}`")
    if s.kind == "LSQB" and s.opener == "{" and not s.in_block:
        return _joined(s, source, s.open[-1])
    if s.kind not in ("LSQB", "LBRACE") or "NAME" not in s.accepts or s.previous_kind not in _BEFORE_LISTS:
        return None
    inside = _inside(s, s.index)
    if s.previous_kind in ("IN", "PLACE", "LSQB", "COMMA") and not any(t.type == "LSQB" for t in inside):
        return Mistake("several are written in braces", f"write `{{{_text(source, inside)}}}`")
    return _joined(s, source, s.index)


_BEFORE_LISTS = frozenset("IN PLACE LSQB COMMA NODE EDGE PATH ARROW VBAR MINUS LPAR EXCEPT EQUAL AT".split())


def _joined(s: Situation, source: Source, opener: int) -> Mistake:
    items = [_text(source, item) for item in _items(_inside(s, opener))]
    joined = " | ".join(items)
    before = s.tokens[opener - 1].type if opener else ""
    fix = f"({joined})" if len(items) > 1 and before in ("ARROW", "VBAR", "MINUS") else joined
    return Mistake("nodes stand in no list: they are joined with `|`", f"write `{fix}`" if joined else None)


def quoted_node(s: Situation, source: Source) -> Mistake | None:
    """`patch node "head[3, 1]"` and `f"head[3, 1]"`."""
    if s.kind != "STRING":
        return None
    inner = s.token[1:-1].strip()
    before = s.previous
    if before is not None and before in ("f", "r", "b", "rf", "fr") and before.end_pos == s.token.start_pos:
        fix = f"write `{inner}`; a number from outside is `${{NAME}}`" if "[" in inner else f"write `{s.token}`"
        return Mistake(f"`{before}` before a text means nothing here", fix, before)
    if {"NAME", "LPAR"} <= s.accepts and "STRING" not in s.accepts and s.previous_kind in _BEFORE_LISTS:
        return Mistake("nodes and paths stand without quotes", f"write `{inner}`" if inner else None)
    return None


def end_of_prompt(s: Situation, source: Source) -> Mistake | None:
    """`@ last`."""
    if s.kind in ("FIRST", "LAST") and s.previous_kind in ("PLACE", "DOTS") and "INT" in s.accepts:
        return Mistake(f"{s.shown} is no position by itself", f"write `{'-1' if s.kind == 'LAST' else '0'}`")
    return None


def verb(s: Situation, source: Source) -> Mistake | None:
    """`ablate node h`."""
    if s.kind != "NAME" or s.token not in VERBS or not {"PATCH", "MEASURE"} <= s.accepts:
        return None
    target = _text(source, _while_same(s, s.index + 1, stop=RESERVED - TARGETS))
    fix = f"write `patch {target or 'node ...'} with {VERBS[s.token]}`"
    return Mistake(f"{s.shown} is no clause: what changes a node is a patch", fix)


# ---- tokens


def _inside(s: Situation, opener: int) -> list[Token]:
    """The tokens between the bracket `opener` and the one that closes it, or the end of its line."""
    found, depth = list[Token](), 1
    for token in s.tokens[opener + 1 :]:
        if token.type != "STRING":
            depth += (token in CLOSERS) - (token in CLOSERS.values())
        if depth == 0 or token.type == "$END" or token.line != s.tokens[opener].line:
            break
        found.append(token)
    return found


def _items(tokens: list[Token]) -> list[list[Token]]:
    """What the commas outside of brackets divide."""
    out, depth = list[list[Token]]([[]]), 0
    for token in tokens:
        if token.type != "STRING":
            depth += (token in CLOSERS) - (token in CLOSERS.values())
        if token.type == "COMMA" and depth == 0:
            out.append([])
        else:
            out[-1].append(token)
    return [item for item in out if item]


def _while_same(s: Situation, start: int, stop: frozenset[str] = RESERVED) -> list[Token]:
    """The tokens from `start` to the next reserved word or the end of the line."""
    found = list[Token]()
    for token in s.tokens[start:]:
        if token.type in stop or token.type in ("$END", "RBRACE") or token.line != s.token.line:
            break
        found.append(token)
    return found


def _text(source: Source, tokens: list[Token]) -> str:
    """Tokens that stand together, as written, white space made single."""
    if not tokens:
        return ""
    return " ".join(source.text[tokens[0].start_pos : tokens[-1].end_pos].split())
