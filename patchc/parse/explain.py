"""A syntax error in the language's own words: what stands there, what could, and the fix where it is known.

Each rule looks at one kind of mistake and answers or passes: the first answer counts. More are in `symbols`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

from patchc.diagnostics import Diagnostic, Source, Span
from patchc.parse import habits, symbols
from patchc.parse.characters import SYNTAX
from patchc.parse.expected import expected
from patchc.parse.situation import (
    CLAUSES,
    CLOSERS,
    NAME_ONLY,
    RESERVED,
    STATEMENTS,
    TARGETS,
    Mistake,
    Situation,
)

OPERATORS = frozenset(
    [
        "ARROW",
        "VBAR",
        "MINUS",
        "SIGN",
        "STAR",
        "SLASH",
        "PLACE",
        "DOT",
        "EQUAL",
        "COMPARE",
        "WITH",
        "IN",
        "AS",
        "BY",
    ]
)
"""What needs something after it."""


Rule = Callable[[Situation, Source], Mistake | None]


def explain(situation: Situation, source: Source) -> Diagnostic:
    """The diagnostic for a place at which the parser could not go on."""
    mistake = next(m for m in (rule(situation, source) for rule in MISTAKES) if m is not None)
    token = mistake.about or situation.token
    span = Span(source, token.start_pos or 0, token.end_pos or 0)
    return SYNTAX.at(span, mistake.message, fix=mistake.fix)


def _words(terminals: Iterable[str]) -> list[str]:
    return [t.lower() for t in terminals if t in RESERVED]


def _meant(word: str, terminals: Iterable[str], cutoff: float) -> str | None:
    known = _words(terminals)
    if word.lower() in known:
        return word.lower()
    return next(iter(difflib.get_close_matches(word, known, 1, cutoff)), None)


# ---- words


def _misspelt_statement(s: Situation, source: Source) -> Mistake | None:
    """`mesure diff`: the first word of its line, here or before, nearly starts a statement."""
    for i in (s.index, s.index - 1):
        if i < 0 or s.tokens[i].type != "NAME" or (i and s.tokens[i - 1].line == s.tokens[i].line):
            continue
        if meant := _meant(s.tokens[i], STATEMENTS | CLAUSES, 0.7):
            return Mistake(f"`{s.tokens[i]}` starts no statement", f"did you mean `{meant}`?", s.tokens[i])
    return None


def _misspelt_word(s: Situation, source: Source) -> Mistake | None:
    """`patch node h wth clean`: nearly a word that could stand here."""
    if s.kind != "NAME" or not (meant := _meant(s.token, s.accepts, 0.7)):
        return None
    return Mistake(f"{s.shown} cannot stand here", f"did you mean `{meant}`?")


def _reserved_as_name(s: Situation, source: Source) -> Mistake | None:
    if s.kind not in RESERVED or "NAME" not in s.accepts or s.previous is None:
        return None
    if s.starts_line and s.kind in STATEMENTS | CLAUSES:
        if s.accepts != NAME_ONLY:
            return None
        fix = {"RUN": "`run clean`, or another column of the data", "SHOW": "`show heatmap`"}.get(s.previous_kind)
        return Mistake(f"`{s.previous}` needs a name after it", fix, s.previous)
    if s.accepts <= {"NAME", "BY"} or s.kind in CLAUSES | STATEMENTS | TARGETS or "AT" in s.accepts:
        return Mistake(
            f"{s.shown} is a word of the language, and no name", f"choose another name, such as `{s.token}_`"
        )
    return None


def _outside(s: Situation, source: Source) -> Mistake | None:
    if s.kind in CLAUSES and "EXPERIMENT" in s.accepts and s.previous_kind != "LBRACE":
        return Mistake(f"{s.shown} stands inside an experiment", "`experiment name { ... }`")
    return None


# ---- brackets


def _stray(s: Situation, source: Source) -> Mistake | None:
    if not (s.is_stray and s.in_block and s.tokens[s.first].type in CLAUSES | {"EXPERIMENT"}):
        return None
    return Mistake(f"{s.shown} stands outside of experiments", "move it above the experiment")


def _unclosed(s: Situation, source: Source) -> Mistake | None:
    """An opening bracket before a word, or an end of file, that no bracket can hold."""
    if s.opener is None:
        return None
    # A column may be called as a statement is, by mistake: then a text follows.
    statement = s.kind in STATEMENTS and s.next_kind not in ("STRING", "LBRACE", "PARAM")
    word = s.kind in STATEMENTS | CLAUSES | {"WITH", "AS"}
    parameters = s.kind == "EQUAL" and s.accepts == frozenset(("COMMA", "RPAR"))
    if s.kind == "$END" or statement or ((word or parameters) and not s.in_block):
        fix = f"`{CLOSERS[s.opener]}` before {s.shown}"
        return Mistake(f"this `{s.opener}` is never closed", fix, s.opener)
    return None


def _mismatched(s: Situation, source: Source) -> Mistake | None:
    if s.kind not in ("RPAR", "RSQB", "RBRACE"):
        return None
    if s.opener is None or (s.in_block and s.kind != "RBRACE"):
        return Mistake(f"{s.shown} closes nothing")
    if CLOSERS[s.opener] != s.token:
        line, column = source.position(s.opener.start_pos or 0)
        return Mistake(f"{s.shown} cannot close the `{s.opener}` of {line}:{column}", f"write `{CLOSERS[s.opener]}`")
    if s.previous_kind == "LSQB":
        return Mistake("these brackets are empty", "a name without brackets means every index", s.opener)
    return None


# ---- what is missing


def _target(s: Situation, source: Source) -> Mistake | None:
    if s.previous_kind == "ALL" and s.kind in ("NAME", "LPAR", "MINUS"):
        return Mistake(f"{s.shown} cannot follow `all`", "write `all except ...`, or `node ...`")
    if s.kind in ("NAME", "LPAR") and s.accepts >= TARGETS:
        word, what = s.tokens[s.first], s.token if s.kind == "NAME" else "..."
        fix = f"write `{word} node {what}`, `{word} edge a -> b` or `{word} path a -> ... -> logits`"
        return Mistake(f"what of {s.shown} is patched: the node, an edge, a path?", fix)
    return None


def _missing_with(s: Situation, source: Source) -> Mistake | None:
    word = s.tokens[s.first]
    if "WITH" not in s.accepts or word.type not in ("PATCH", "ATTRIBUTE"):
        return None
    if s.kind in ("TO", "FROM", "BY", "AS", "AT", "EQUAL", "STRING"):
        return Mistake(f"{s.shown} cannot stand here", "the value follows `with`: `patch node h with clean`")
    if s.kind in CLAUSES | STATEMENTS | {"RBRACE", "$END"}:
        return Mistake(f"this `{word}` has no value", "end it with `with clean`, or with another value", word)
    if s.kind in ("NAME", "INT", "FLOAT", "PARAM") and s.previous_kind in ("NAME", "RSQB", "RPAR"):
        return Mistake(f"`with` is missing before {s.shown}", f"write `with {s.token}`")
    return None


def _missing_word(s: Situation, source: Source) -> Mistake | None:
    """The one word that a statement needs between two parts, and that is not there."""
    needed = {
        "EQUAL": "`=`", "IN": "`in`", "TO": "`to` and a world",
        "COMPARE": "a comparison (`<`, `>`, `<=`, `>=`, `==`)", "TOP": "`top`", "BY": "`by` and a metric",
        "INTERVAL": "`interval` and a level", "INCLUDES": "`includes` and a cell",
    }  # fmt: skip
    forms = {
        "METRIC": "`metric diff = logit(answer) - logit(wrong)`",
        "LET": "`let movers = head[3, 1] | head[3, 2]`",
        "MODEL": '`model "gpt2" dtype=float32`',
        "FOR": "`for h in head`",
        "MEASURE": "`measure diff from corrupt to clean`",
        "PRUNE": "`prune kl < 0.05`",
        "KEEP": "`keep top 200 by diff`",
        "EXPECT": "`expect diff at head[3, 1] > 0.1`",
    }
    missing = [words for terminal, words in needed.items() if terminal in s.accepts]
    if not missing or "COMMA" in s.accepts or s.chain_has("@") or s.previous is None:
        return None
    form = forms.get(s.tokens[s.first].type)
    return Mistake(f"{missing[0]} is missing after `{s.previous}`", form and f"as in {form}")


def _block(s: Situation, source: Source) -> Mistake | None:
    if "LBRACE" in s.accepts and s.tokens[s.first].type == "EXPERIMENT" and not s.open and s.kind != "NAME":
        return Mistake("an experiment's clauses stand in braces", f"`{{` before {s.shown}")
    if s.previous_kind == "EXPERIMENT" and s.kind in ("STRING", "LBRACE"):
        return Mistake("an experiment needs a name", 'as in `experiment heads "each head, restored" {`')
    return None


def _quotes(s: Situation, source: Source) -> Mistake | None:
    if (
        s.kind in ("NAME", "DOT", "INT", "FLOAT", "SLASH")
        and {"STRING", "PARAM"} <= s.accepts
        and "NAME" not in s.accepts
    ):
        return Mistake(f"{s.shown} stands without quotes", 'a text is written `"..."`')
    if (
        s.kind == "STRING"
        and s.previous_kind == "NAME"
        and "LPAR" in s.accepts
        and s.previous in ("circuit", "tensor", "mean")
    ):
        return Mistake(f"{s.shown} stands without parentheses", f"write `{s.previous}({s.token})`")
    if s.kind == "STRING" and s.previous_kind == "SHOW":
        return Mistake("what is shown stands before the file", f"write `show heatmap {s.token}`")
    if s.kind == "STRING" and s.accepts == NAME_ONLY:
        return _name_in_quotes(s)
    return None


def _name_in_quotes(s: Situation) -> Mistake:
    inner = s.token[1:-1].strip()
    if re.fullmatch(r"[A-Za-z_]\w*", inner):
        return Mistake("a name stands here, without quotes", f"as in `{s.previous} {inner}`")
    if s.previous_kind == "RUN":
        return Mistake("`run` names a column of the data, not a text", "as in `run clean`, where the data has `clean`")
    return Mistake("a name stands here, and no text")


def _per(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "PER" and "FROM" in s.accepts:
        return Mistake("`per prompt` follows a normalised metric", "as in `diff from corrupt to clean per prompt`")
    return None


def _at_in_value(s: Situation, source: Source) -> Mistake | None:
    if s.kind == "AT" and "PLACE" in s.accepts:
        return Mistake("a position follows `@`, not `at`", "write `@ end`")
    return None


def _followed_by_nothing(s: Situation, source: Source) -> Mistake | None:
    """An operator at the end of its line, or before a word that cannot be its operand."""
    other = s.kind in RESERVED or s.kind in ("$END", "RBRACE", "RPAR", "RSQB")
    if s.previous_kind in OPERATORS and other and not (s.previous_kind == "STAR" and "ARROW" in s.accepts):
        return Mistake(f"`{s.previous}` needs {expected(s.accepts)} after it", None, s.previous)
    return None


def _missing_comma(s: Situation, source: Source) -> Mistake | None:
    operand = s.kind in ("NAME", "STRING", "INT", "FLOAT", "PARAM")
    if operand and "COMMA" in s.accepts and not s.starts_line and s.previous is not None:
        return Mistake(f"{s.shown} cannot follow `{s.previous}` without a comma", f"write `{s.previous}, {s.token}`")
    return None


def _anything(s: Situation, source: Source) -> Mistake:
    where = f" after `{s.previous}`" if s.previous is not None else ""
    return Mistake(f"{s.shown} cannot stand here{where}: expected {expected(s.accepts)}")


MISTAKES: tuple[Rule, ...] = (
    habits.verb,
    _misspelt_statement,
    symbols.comment,
    _stray,
    _unclosed,
    _mismatched,
    symbols.comma,
    habits.end_of_prompt,
    _reserved_as_name,
    _outside,
    _block,
    _misspelt_word,
    habits.python_range,
    habits.several,
    habits.dotted,
    habits.arrow_to_the_left,
    habits.quoted_node,
    symbols.index_brackets,
    symbols.mixed_operators,
    symbols.place_then_operator,
    symbols.place,
    symbols.arrow,
    symbols.star,
    symbols.number,
    symbols.equal,
    _quotes,
    _target,
    _at_in_value,
    _per,
    _followed_by_nothing,
    _missing_with,
    _missing_word,
    _missing_comma,
    _anything,
)
"""In order: what explains more mistakes, and explains them more surely, stands before what explains fewer."""
