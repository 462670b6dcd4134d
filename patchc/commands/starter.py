"""A first spec for a model: two prompts that fit its tokenizer, and the experiments that most work starts with.

Which prompts fit is not guessed: a text is taken once the whole spec resolves without a warning.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from patchc.diagnostics import RULES, PatchcError, Severity, Source
from patchc.ir.graph import ResidualGraph
from patchc.parse import format_spec, parse
from patchc.resolve import resolve
from patchc.resolve.encode import NO_TOKENIZER, Encoder

NO_STARTER = RULES.add("no-starter", "no prompts were found that the model's tokenizer reads as a spec needs them")


class Described(Protocol):
    """What a starter spec needs to know of a model: no weights."""

    @property
    def graph(self) -> ResidualGraph: ...
    @property
    def tokenizer(self) -> Any | None: ...
    @property
    def bos(self) -> bool | None: ...


@dataclass(frozen=True, slots=True)
class Prompts:
    """Two prompts and what follows each."""

    clean: str
    corrupt: str
    answer: str
    wrong: str


KNOWN = (
    Prompts(
        "When Mary and John went to the shop, John gave a bag to",
        "When Mary and John went to the shop, Mary gave a bag to",
        " Mary",
        " John",
    ),
    Prompts("The capital of France is the city of", "The capital of Italy is the city of", " Paris", " Rome"),
    Prompts("The keys to the old cabinet", "The key to the old cabinet", " are", " is"),
    Prompts("The king went home because", "The queen went home because", " he", " she"),
    Prompts("a b c d a b c", "a b c e a b c", " d", " e"),
    Prompts(
        "On Friday it rained, today is Tuesday so tomorrow is",
        "On Friday it rained, today is Saturday so tomorrow is",
        " Wednesday",
        " Sunday",
    ),
)
"""Indirect objects (Wang et al. 2022), country and capital, subject and verb, pronouns, induction, days."""

MOST_TOKENS, MOST_WORDS = 5000, 60
"""How much of a vocabulary is looked at, and how many of its words are tried together."""

SPEC = """\
# Which heads of this model make it prefer the answer? To see: patchc run {file}
model {model}

# Two worlds that align token by token: what one of them computes is put into a run of the other.
data {{
  clean {clean}
  corrupt {corrupt}
  answer {answer}  # one token, the space before it included
  wrong {wrong}
  at end -1  # a named position: the last token
}}

metric diff = logit(answer) - logit(wrong)
metric recovered = diff from corrupt to clean  # 0 in the corrupt run, 1 in the clean run

# Each head's output in the corrupt run becomes the clean run's: which heads bring the answer back?
experiment heads "each head, restored" {{
  for h in head  # one cell each
  run corrupt
  patch node h with clean
  measure recovered
  show heatmap
}}

# One path of each head: what it writes at the end goes straight to the logits, and no other way.
experiment direct "each head, straight to the logits" {{
  for h in head
  run clean
  patch path h @ end -> logits with corrupt
  measure diff
}}
"""


def starter_spec(name: str, model: Described, file: str, base: Path) -> str:
    """A spec that runs on a model, called `name` from `base`; `file` is what its own first line calls it.

    Errors: `no-tokenizer`, `no-starter`.
    """
    if model.tokenizer is None:
        message = f"{name} has no tokenizer, and a spec's prompts are texts"
        fix = 'give token ids in Python: patchc.load(...).compile(spec, data={"clean": [[3, 1, 4]], ...})'
        raise NO_TOKENIZER.error(message, fix=fix)
    for prompts in chain(KNOWN, _from_vocabulary(model)):
        text = _written(name, prompts, file)
        if _fits(text, model, base):
            return text
    message = f"no two prompts were found that {name}'s tokenizer reads as equally many tokens, with one-token answers"
    raise NO_STARTER.error(message, fix="write the spec by hand, or give token ids in Python")


def _written(name: str, prompts: Prompts, file: str) -> str:
    texts = {"model": name, **{k: getattr(prompts, k) for k in Prompts.__dataclass_fields__}}
    quoted = {key: json.dumps(text, ensure_ascii=False) for key, text in texts.items()}
    return format_spec(Source(file, SPEC.format(file=file, **quoted)))


def _fits(text: str, model: Described, base: Path) -> bool:
    source = Source("<starter>", text)
    try:
        found = resolve(parse(source), source, model.graph, model.tokenizer, base=base, bos=model.bos)
    except PatchcError:
        return False
    return all(w.severity is Severity.NOTE for w in found.warnings)


# ---- prompts from a vocabulary


def _from_vocabulary(model: Described) -> Iterator[Prompts]:
    """`a b a` and `a c a`, in words that are one token each wherever they stand, joined as the tokenizer allows."""
    encoder = Encoder(model.tokenizer, model.bos)
    words = [*islice(_words(encoder, model), MOST_WORDS)]
    for apart, before in ((" ", " "), (" ", ""), ("", "")):
        for a, b, c in zip(words, words[1:], words[2:], strict=False):
            prompts = Prompts(apart.join([a, b, a]), apart.join([a, c, a]), before + b, before + c)
            if _aligns(encoder, prompts):
                yield prompts


def _words(encoder: Encoder, model: Described) -> Iterator[str]:
    """Tokens that are words and encode to themselves, then any other that does, each once."""
    tokenizer: Any = model.tokenizer
    special = set[int](getattr(tokenizer, "all_special_ids", ()))
    ids = [i for i in range(min(model.graph.d_vocab, len(tokenizer), MOST_TOKENS)) if i not in special]
    texts = {i: encoder.show(i) for i in ids}
    whole = (text for i, text in texts.items() if text.isprintable() and encoder.piece_or_none(text) == (i,))
    found = dict.fromkeys(stripped for text in whole if (stripped := text.strip()))
    yield from sorted(found, key=lambda word: not (word.isalpha() and word.isascii()))


def _aligns(encoder: Encoder, prompts: Prompts) -> bool:
    clean, corrupt = encoder.piece_or_none(prompts.clean), encoder.piece_or_none(prompts.corrupt)
    answers = [encoder.piece_or_none(text) for text in (prompts.answer, prompts.wrong)]
    aligned = clean is not None and corrupt is not None and len(clean) == len(corrupt)
    return aligned and all(answer is not None and len(answer) == 1 for answer in answers)
