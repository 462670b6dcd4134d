"""Syntax errors that a symbol makes: operators, brackets round indices, numbers, `=`, commas.

Rules for `explain`, which has their order: each looks at one kind of mistake and answers or passes.
"""

from __future__ import annotations

from patchc.diagnostics import Source
from patchc.parse.situation import CLAUSES, Mistake, Situation

SET_OPERATORS = ("->", "|", "-")


def index_brackets(s: Situation, source: Source) -> Mistake | None:
    """`head(9, 9)` and `head[9][9]`."""
    if s.kind in ("INT", "STAR") and s.previous_kind == "LPAR" and s.index > 1 and "NAME" in s.accepts:
        name = s.tokens[s.index - 2]
        if name.type == "NAME":
            return Mistake("indices stand in square brackets", f"write `{name}[{s.token}, ...]`")
    if s.kind == "LSQB" and s.previous_kind == "RSQB":
        return Mistake("indices stand in one pair of brackets", "write `head[3, 1]`")
    return None


# ---- sets


def mixed_operators(s: Situation, source: Source) -> Mistake | None:
    """`a -> b | c`, with both readings."""
    if s.previous_kind in ("MINUS", "ARROW", "VBAR"):
        return None
    before = s.chain_has(*SET_OPERATORS)
    if s.token not in SET_OPERATORS or before is None or before == s.token or "SLASH" in s.accepts:
        return None
    first, last = _readings(s, source)
    shown = [f"`({first}) {s.token} ...`", f"`{first[: len(first) - len(last)]}({last} {s.token} ...)`"]
    return Mistake(
        f"`{before}` and `{s.token}` need parentheses, to say which comes first",
        f"write {' or '.join(shown)}",
    )


def _readings(s: Situation, source: Source) -> tuple[str, str]:
    """The chain as written, and its last operand."""
    operators = [i for i in s.chain if s.tokens[i] in SET_OPERATORS]
    end = s.tokens[s.index - 1].end_pos
    start, last = s.tokens[s.chain[0]].start_pos, s.tokens[operators[-1] + 1].start_pos
    return " ".join(source.text[start:end].split()), " ".join(source.text[last:end].split())


def place_then_operator(s: Situation, source: Source) -> Mistake | None:
    """`a @ end | b`, `a @ end - 1`, `a @ p*`."""
    if not s.chain_has("@") or s.kind not in ("VBAR", "MINUS", "SIGN", "STAR") or "SLASH" in s.accepts:
        return None
    if s.kind == "STAR":
        return Mistake("`*` cannot follow a position", "write `(x @ p)*`: every repeated step at p")
    if s.kind != "VBAR" and s.next_kind == "INT":
        amount = s.tokens[s.index + 1]
        return Mistake("an offset from a position stands in braces", f"write `@ {{{s.previous} {s.token} {amount}}}`")
    return Mistake(f"`@` before {s.shown} needs parentheses", f"write `(a @ p) {s.token} b`")


def place(s: Situation, source: Source) -> Mistake | None:
    if s.kind != "PLACE":
        return None
    if s.previous_kind == "STAR":
        return Mistake("`@` cannot follow `*`", "write `(x @ p)*`: every repeated step at p")
    if operator := s.chain_has(*SET_OPERATORS):
        fix = f"write `(a {operator} b) @ p` or `a {operator} (b @ p)`"
        return Mistake(f"`@` after `{operator}` could mean one node or all of them", fix)
    if s.chain_has("@"):
        return Mistake("one position is enough", "write `@ {a, b}` for several")
    return None


def star(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "STAR" and s.previous_kind == "STAR":
        return Mistake("`**` says no more than `*`", "`x*` is any number of steps, none included")
    if s.kind == "SIGN" and "ARROW" in s.accepts:
        return Mistake("`+` stands in no path or set", "sets are joined with `|`; one step or more is `x -> x*`")
    if s.kind == "COMMA" and "ARROW" in s.accepts:
        return Mistake("`,` joins no nodes", "nodes are joined with `|`")
    return None


def arrow(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "ARROW" and "SLASH" in s.accepts:
        return Mistake("`->` makes a path, and here stands a value", "paths stand after `patch path` and in `let`")
    if s.kind == "COMPARE" and s.token == ">" and s.previous_kind == "MINUS":
        return Mistake("an arrow is written `->`, without a space", "write `->`")
    if s.kind == "EQUAL" and s.next_kind == "COMPARE":
        return Mistake("an arrow is written `->`, not `=>`", "write `->`")
    if s.kind == "ARROW" and s.previous_kind == "MINUS":
        return Mistake("an arrow is written `->`, with one dash", "write `->`")
    if s.kind == "COMPARE" and s.token == ">" and "ARROW" in s.accepts:
        return Mistake("`>` compares numbers; an arrow is written `->`", "write `->`")
    return None


# ---- symbols


def number(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "DOT" and "FLOAT" in s.accepts:
        return Mistake("a number starts with a digit", "write `0.5`")
    if s.kind == "DOT" and s.previous_kind in ("INT", "FLOAT"):
        return Mistake("a number ends with a digit", f"write `{s.previous}.0` or `{s.previous}`")
    if s.kind == "DOT" and s.previous_kind == "DOTS":
        return Mistake("a range has two dots", "write `2..5`")
    if s.kind == "FLOAT" and "INT" in s.accepts:
        return Mistake(f"{s.shown} is no whole number")
    if s.kind == "SIGN" and "MINUS" in s.accepts:
        return Mistake("a number has no `+` before it", "leave it out")
    if s.kind == "DOTS" and "SLASH" in s.accepts:
        return Mistake("a range cannot stand here", "ranges stand in `[ ]`, after `@`, and after `in`")
    return None


def equal(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "EQUAL" and "COMPARE" in s.accepts:
        return Mistake("`=` compares nothing", "write `==`, `<` or `>`")
    if s.kind == "EQUAL" and "IN" in s.accepts:
        return Mistake("a loop variable stands before `in`", f"write `{s.previous} in ...`")
    if s.kind == "EQUAL" and "STRING" in s.accepts:
        return Mistake("a column needs no `=`", f'write `{s.previous} "text"`')
    if s.kind == "COMPARE" and "EQUAL" in s.accepts:
        return Mistake(f"{s.shown} names nothing", "write `=`")
    if s.kind == "EQUAL":
        return Mistake("`=` cannot stand here", "`let x = nodes`, `metric m = number`; a patch's value follows `with`")
    return None


def comma(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "COMMA" and "AT" in s.accepts and s.opener == "{":
        return Mistake("columns need no `,`", "one on a line")
    if s.kind == "COMMA" and s.previous_kind == "COMMA":
        return Mistake("between two commas stands nothing", "leave one out")
    if s.previous_kind == "COMMA" and (s.starts_line or s.kind in CLAUSES or s.kind in ("RPAR", "RSQB")):
        return Mistake("this `,` is followed by nothing", "leave it out", s.previous)
    return None


def comment(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "SLASH" and s.next_kind == "SLASH":
        return Mistake("a comment starts with `#`, not with `//`")
    if s.kind == "MINUS" and s.next_kind == "MINUS" and s.starts_line:
        return Mistake("a comment starts with `#`, not with `--`")
    return None
