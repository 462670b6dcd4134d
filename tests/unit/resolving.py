"""What the tests of `resolve` share: a word tokenizer without a model, two graphs, and a spec's study or
errors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from patchc.diagnostics import Diagnostic, PatchcError, Source
from patchc.ir.experiment import Experiment, Study
from patchc.ir.graph import residual_graph
from patchc.parse import parse
from patchc.resolve import Resolved, resolve

WORDS = (
    "When After The Mary and John Tom Ann went to the shop , gave a bag keys key old cabinet in is are left "
    "sat . Space Needle"
).split()
HERE = Path(__file__).parent

SMALL = residual_graph(
    "small", n_layers=4, n_heads=4, d_model=32, d_head=8, d_vocab=60, has_pos_embed=True, n_ctx=16, d_mlp=64
)
GPT2 = residual_graph(
    "gpt2", n_layers=12, n_heads=12, d_model=768, d_head=64, d_vocab=50257, has_pos_embed=True, n_ctx=1024, d_mlp=3072
)
ATTENTION_ONLY = residual_graph(
    "attn", n_layers=2, n_heads=2, d_model=8, d_head=4, d_vocab=60, has_pos_embed=True, has_mlp=False
)
PARALLEL = residual_graph(
    "neox", n_layers=2, n_heads=2, d_model=8, d_head=4, d_vocab=60, has_pos_embed=False, parallel=True
)


class Words:
    """A token a word, its space included. A word that is not in the vocabulary is an error, as in the shipped
    models; `unknown` makes it that token instead."""

    def __init__(self, bos: bool = False, unknown: bool = False):
        pieces = ["<bos>", "<unk>", " ", *(p for w in WORDS for p in (w, " " + w))]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.pieces = pieces
        self._adds_bos = bos
        self.bos_token_id = 0 if bos else None
        self.unk_token_id = 1 if unknown else None
        self.unk_token = "<unk>"

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        start = [0] if self._adds_bos and add_special_tokens else []
        return {"input_ids": start + [self._id(p) for p in re.findall(r" ?[A-Za-z]+|[^A-Za-z]", text)]}

    def _id(self, piece: str) -> int:
        if piece not in self.ids and self.unk_token_id is not None:
            return self.unk_token_id
        return self.ids[piece]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


DATA = """
data {
  clean   "When Mary and John went to the shop, John gave a bag to"
  corrupt "When Mary and John went to the shop, Mary gave a bag to"
  answer  " Mary"
  wrong   " John"
  at s2   wrong last
  at end  -1
}
"""
METRIC = "metric diff = logit(answer) - logit(wrong)\n"


def completed(text: str, has_data: bool = False) -> str:
    """The text with a model, data and `diff` after it where it has none of its own, so that its places stay."""
    """The text with a model, data and a metric after it where it has none of its own, so that its places
    stay."""
    out = text
    if not re.search(r"^model ", text, re.M):
        out += '\nmodel "small"'
    if not has_data and not re.search(r"^data", text, re.M):
        out += DATA
    if re.search(r"\bdiff\b", text) and not re.search(r"^metric ", text, re.M):
        out += METRIC
    return out


def resolved(text: str, graph: Any = SMALL, tokenizer: Any = None, **options: Any) -> Resolved:
    """A spec, completed and resolved."""
    source = Source("a.patch", completed(text, "data" in options))
    options.setdefault("base", HERE)
    return resolve(parse(source), source, graph, tokenizer or Words(), **options)


def study(text: str, graph: Any = SMALL, **options: Any) -> Study:
    return resolved(text, graph, **options).study


def experiment(body: str, graph: Any = SMALL, **options: Any) -> Experiment:
    """The one experiment with these clauses, `measure diff` added where nothing is measured."""
    measure = "" if "measure" in body else " measure diff"
    return study(f"experiment e {{ {body}{measure} }}", graph, **options).experiments[0]


def errors(text: str, graph: Any = SMALL, **options: Any) -> list[Diagnostic]:
    """What is wrong with a spec, completed."""
    try:
        resolved(text, graph, **options)
    except PatchcError as error:
        return list(error.diagnostics)
    return []


def error(body: str, graph: Any = SMALL, **options: Any) -> Diagnostic:
    """The one thing that is wrong with an experiment of these clauses."""
    measure = "" if "measure" in body else " measure diff"
    found = errors(f"experiment e {{ {body}{measure} }}", graph, **options)
    assert len(found) == 1, found
    return found[0]


def about(diagnostic: Diagnostic) -> str:
    """The text that a diagnostic is about."""
    span = diagnostic.span
    return span.source.text[span.start : span.end] if span else ""


def short(diagnostic: Diagnostic) -> str:
    """`severity[code] line:column "what it is about": message`, its notes and its fix."""
    where = ""
    if diagnostic.span is not None:
        line, column = diagnostic.span.source.position(diagnostic.span.start)
        where = f" {line}:{column} {about(diagnostic)!r}"
    lines = [f"{diagnostic.severity}[{diagnostic.code}]{where}: {diagnostic.message}"]
    lines += [f"    note: {note.message}" for note in diagnostic.notes]
    lines += [f"    help: {diagnostic.fix}"] if diagnostic.fix else []
    return "\n".join(lines)
