"""Hostile specs: random ones of the grammar, mutated ones, splices; and what has to hold of each whatever it is.

`survive` puts a text through everything that reads specs and needs no model, and watches what is opened meanwhile.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from patchc import checking
from patchc.diagnostics import RULES, Diagnostic, PatchcError, Source
from patchc.diagnostics.render import render, to_json
from patchc.ir.program import Rates
from patchc.model.outline import Outline
from patchc.parse import format_spec
from tests.golden.harness import HERE as GOLDEN
from tests.golden.harness import read
from tests.grammar_texts import SAMPLES, spaced, tokens
from tests.unit.resolving import SMALL, Words, completed

CLAUSES = ("for_", "patch", "measure", "expect", "show")
EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS = ("grammar", "clause", "characters", "words", "alike", "splice")

FILES = {
    "p.jsonl": '{"clean": "When Mary went to", "corrupt": "When John went to", "answer": " the", "wrong": " a"}\n' * 2,
    "p.csv": "clean,corrupt,answer,wrong\nWhen Mary went to,When John went to, the, a\n",
    "p.json": '{"prompts": [{"clean": "When Mary", "corrupt": "When John", "answers": [" went"], "wrong_answers": []}'
    '], "word_idxs": {"end": -1}}',
}
"""Data that a spec may name."""

WORDS = (
    "model data let metric sae experiment for in run patch node edge path all except with measure from to per prompt "
    "expect at top includes within show save as interval first last freeze attribute keep prune by clean corrupt zero "
    "mean self resample noise tensor blocked any head mlp input embed logits resid_pre[0] head[0, *] head[-1, 0..2].q "
    "mlp* (any)* positions heads layers prompts writers readers circuit nodes kl(clean) logit(answer) prob loss rank "
    '-> | * - + / @ .. . , = ( ) [ ] { } < <= > >= == # " "p.jsonl" "p.csv" "p.json" "gone.jsonl" " Mary" '
    "0 1 -1 3.5 1e9 99999999999999999999 0.00000000000000000001 1e308 1e999 ${X} ${ $ \\ ' ; : ! ? ^ % ~ & `"
).split(" ")
ODD = [
    *("\0", "\ufeff", "\u202e", "\u200b", "\u2028", "\r", "\r\n", "\t", "\x1b[2J", "\ud800"),
    *("\u00e9", "e\u0301", "\U0001f600", "\uff41", "\u2192", "\u2212", "\u201c"),
]
"""Characters that editors, terminals and people put where none should be."""

SENSIBLE = {
    "NAME": (
        "head head mlp any attn_out resid_pre resid_mid resid_post logits input embed attn_bias kv writers readers "
        "l h p clean corrupt answer wrong s2 end diff layers heads positions prompts q k v z post pattern scores out "
        "in zero mean self resample noise tensor blocked logit prob logprob rank correct loss kl dot circuit nodes std "
        "seed over by groups heatmap table bar line e x"
    ).split(),
    "STRING": ['" Mary"', '" John"', '"p.jsonl"', '"p.csv"', '"p.json"', '"gone.json"', '"out.json"', '"small"', '""'],
    "PARAM": ["${X}"],
    "INT": ["0", "1", "2", "3", "13", "100", "9" * 20, "9" * 900],
    "FLOAT": ["0.5", "1e-3", "0.0", "1e308"],
    "COMPARE": ["<", ">=", "=="],
}
"""Texts for the terminals of the grammar that mean something to the resolver."""


# ---- specs


def spec(rng: Random, kind: str) -> str:
    """A random text of a kind of `KINDS`."""
    match kind:
        case "grammar":
            text = spaced(rng, tokens(rng, "spec", rng.choice([10, 40, 120]), rng.choice([SAMPLES, SENSIBLE])), 0.02)
        case "clause":
            text = _clauses(rng)
        case "characters":
            text = _mutated(rng, rng.choice(_corpus()), list(rng.choice(_corpus())) + ODD)
        case "words":
            text = _mutated_words(rng, rng.choice(_corpus()))
        case "alike":
            text = _exchanged(rng, rng.choice(_corpus()))
        case _:
            text = _spliced(rng, rng.choice(_corpus()), rng.choice(_corpus()))
    return completed(text) if rng.random() < 0.8 else text


@cache
def _corpus() -> tuple[str, ...]:
    """Every example, and every golden case of parsing and resolving."""
    found = [path.read_text(encoding="utf-8") for path in sorted(EXAMPLES.glob("*.patch"))]
    for folder in ("parse", "resolve"):
        found += [case.input for path in sorted((GOLDEN / folder).glob("*.test")) for case in read(path)]
    return tuple(found)


def _clauses(rng: Random) -> str:
    """An experiment that may well be resolved, with random clauses, and some statements before it."""
    parts = [tokens(rng, rng.choice(["let", "metric"]), 12, SENSIBLE) for _ in range(rng.choice([0, 0, 1, 2]))]
    kinds = rng.choices(CLAUSES, [2, 5, 3, 1, 1], k=rng.choice([1, 2, 3]))
    body = [tokens(rng, kind, rng.choice([6, 12, 30]), SENSIBLE) for kind in sorted(kinds, key=CLAUSES.index)]
    words = [w for part in parts for w in part] + ["experiment", "e", "{", "run", "clean"]
    return " ".join(words + [w for part in body for w in ("\n", *part)] + ["\n", "measure", "diff", "}"])


def _mutated(rng: Random, text: str, alphabet: list[str]) -> str:
    parts = list(text)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        _mutate(rng, parts, alphabet)
    return "".join(parts)


def _mutated_words(rng: Random, text: str) -> str:
    parts = _pieces(text)
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        _mutate(rng, parts, [*WORDS, *parts, *ODD[:3]])
    return "".join(parts)


_SORTS = (
    re.compile(r'"(?:[^"\\\n]|\\.)*"'),
    re.compile(r"[A-Za-z_]\w*"),
    re.compile(r"[0-9]+"),
    re.compile(r"->|[-|*+/@]"),
)


def _exchanged(rng: Random, text: str) -> str:
    """Some words replaced by others of their sort, so that most of what comes still parses."""
    parts, others = _pieces(text), _pieces(rng.choice(_corpus())) + WORDS
    for _ in range(rng.choice([1, 2, 4, 10])):
        at = rng.randrange(len(parts))
        sort = next((s for s in _SORTS if s.fullmatch(parts[at])), None)
        if sort is not None:
            parts[at] = rng.choice([w for w in others if sort.fullmatch(w)])
    return "".join(parts)


def _pieces(text: str) -> list[str]:
    """Words, numbers, texts, signs and white space, one after another."""
    return re.findall(r'"(?:[^"\\\n]|\\.)*"|\w+|\s+|.', text, re.S)


def _mutate(rng: Random, parts: list[str], alphabet: list[str]) -> None:
    """Delete, repeat, swap, replace or insert, in place."""
    at, n = rng.randrange(len(parts) + 1), rng.choice([1, 1, 1, 2, 6])
    match rng.randrange(5):
        case 0:
            del parts[at : at + n]
        case 1:
            parts[at:at] = parts[at : at + n] * rng.choice([1, 1, 30])
        case 2:
            other = rng.randrange(len(parts) + 1)
            parts[at : at + n], parts[other : other + n] = parts[other : other + n], parts[at : at + n]
        case 3:
            parts[at : at + 1] = [rng.choice(alphabet)]
        case _:
            parts[at:at] = [rng.choice(alphabet) + " " * rng.randrange(2)]


def _spliced(rng: Random, a: str, b: str) -> str:
    """The start of one and the end of another, cut between words; or a piece of one in the other."""
    left, right = _pieces(a), _pieces(b)
    i, j = rng.randrange(len(left) + 1), rng.randrange(len(right) + 1)
    if rng.random() < 0.5:
        return "".join(left[:i] + right[j:])
    return "".join(left[:i] + right[j : j + rng.choice([3, 10, 40])] + left[i:])


# ---- what has to hold


def survive(text: str, folder: Path) -> list[Diagnostic]:
    """Format and check a text in `folder`; what comes out is a diagnostic that can be shown, or nothing."""
    with watched(text, folder):
        found = _formatting(text) + checked(text)
    for diagnostic in found:
        _is_sound(diagnostic)
    json.dumps(to_json(found))
    render(found, color=True)
    return found


def _formatting(text: str) -> list[Diagnostic]:
    try:
        format_spec(Source("a.patch", text))
    except PatchcError as error:
        return list(error.diagnostics) or [NOTHING_SAID]
    return []


NOTHING_SAID = Diagnostic("", "an error without a diagnostic")


def checked(text: str) -> list[Diagnostic]:
    """What `check` says of a text, on a graph without a model."""
    model = Outline("small", SMALL, Rates({}, 1, 1, 1, 1), 4, Words())
    with patch.object(checking, "chosen_outline", lambda *_, **__: model):
        return checking.check(text if "\n" in text else text + "\n")


def _is_sound(d: Diagnostic) -> None:
    """A registered code, words, and places inside their texts."""
    assert d.code in RULES.rules, d
    assert d.message.strip(), d
    assert d.fix is None or d.fix.strip(), d
    for span in (d.span, *(note.span for note in d.notes)):
        assert span is None or 0 <= span.start <= span.end <= len(span.source.text), d


# ---- what is opened

_RUNS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pickle.find_class", "socket.connect")
_watching: list[list[str]] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watching and (event in _RUNS or (event == "open" and isinstance(args[0], str | bytes | os.PathLike))):
        _watching[-1].append(f"{event} {os.fsdecode(args[0]) if event == 'open' else args[:1]}")


@cache
def _install() -> None:
    """An audit hook sees what Python opens, runs and connects to, however it does so; none can be removed again."""
    sys.addaudithook(_audit)


@contextmanager
def watched(text: str, folder: Path) -> Generator[None]:
    """Assert that nothing but the files that a text names are opened meanwhile, and that nothing is run.

    Python's own modules may be: what is imported late.
    """
    _install()
    seen: list[str] = []
    _watching.append(seen)
    try:
        yield
    finally:
        _watching.pop()
    strange = [s for s in seen if not _may(s, text, folder)]
    assert not strange, strange


def _may(seen: str, text: str, folder: Path) -> bool:
    event, _, name = seen.partition(" ")
    if event != "open":
        return False
    path = (folder / name).resolve()
    if path.suffix in (".py", ".pyc", ".so") or path.name == "patchc.lark":
        return True
    return path in {(folder / named).resolve() for named in _names(text)}


def _names(text: str) -> list[str]:
    """Every text of a spec that can name a file."""
    found: list[str] = []
    for written in re.findall(r'"(?:[^"\\\n]|\\.)*"', text):
        try:
            name = str(json.loads(written, strict=False))
        except ValueError:
            continue
        if "\0" not in name and len(name) < 200:
            found.append(name)
    return found
