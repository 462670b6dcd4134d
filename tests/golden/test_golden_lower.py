"""Patches to variant DAGs: tests/golden/lower/*.test.

The model has 2 layers of 2 heads, embeddings (rank 0), attention 0 (1), mlp 0 (2), attention 1 (3), mlp 1 (4), logits
(5). In `post_norm.test` a norm follows each attention block. One prompt of four tokens, `the cat sat on`; clean and
corrupt differ at position 1. The run is clean.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from harness import Case, Golden, cases

from patchc.diagnostics import Diagnostic, PatchcError, Source
from patchc.ir.bits import bitset
from patchc.ir.dag_text import dag_text
from patchc.ir.graph import ResidualGraph, residual_graph
from patchc.ir.program import End
from patchc.lower import lower
from patchc.parse import parse
from patchc.resolve import resolve

SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 8, "d_head": 4, "d_vocab": 9, "n_ctx": 8}
GRAPH = residual_graph("tiny", has_pos_embed=True, **SIZES)
POST_NORM = residual_graph("tiny", has_pos_embed=True, post_norm=True, **SIZES)
WORDS = ["The", " cat", " dog", " sat", " on", " mat", " rug"]
SPEC = """
model "tiny"
data { clean "The cat sat on" corrupt "The dog sat on" other "The dog cat on" answer " mat" at noun 1 at end -1 }
metric m = logit(answer)
experiment e {
  run clean
  LINES
  measure m
}
"""


def tokenizer(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
    return {"input_ids": [WORDS.index(w) for w in re.findall(r" ?\w+", text)]}


def decode(ids: list[int]) -> str:
    return "".join(WORDS[i] for i in ids)


tokenizer.decode = decode  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", cases("lower"), ids=str)
def test_lower(case: Case, golden: Golden) -> None:
    golden(case, lowered(case.input, POST_NORM if case.file.stem == "post_norm" else GRAPH))


def told(diagnostic: Diagnostic) -> str:
    """Its code and message, and the lines that its notes are about."""
    lines = [f"{diagnostic.code}: {diagnostic.message}"]
    for note in diagnostic.notes:
        assert note.span
        lines.append(f"    line {note.span.source.position(note.span.start)[0]}: {note.message}")
    return "\n".join(lines)


def lowered(lines: str, graph: ResidualGraph) -> dict[str, str]:
    source = Source("a.patch", SPEC.replace("LINES", lines.strip().replace("\n", "\n  ")))
    try:
        study = resolve(parse(source), source, graph, tokenizer, base=Path()).study
        (experiment,) = study.experiments
        found = lower(experiment, study.prompts, graph, [End(None, bitset([3]))])
    except PatchcError as error:
        return {"errors": "\n".join(map(told, error.diagnostics))}
    return {"dag": dag_text(found.dag, [root for roots in found.roots for root in roots])}
