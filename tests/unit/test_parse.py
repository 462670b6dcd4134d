"""The parser: its tree, places, limits, round trips; never anything but a tree or diagnostics."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import lark
import pytest

from patchc.diagnostics import PatchcError, Source
from patchc.parse import parse, print_spec, tree
from patchc.parse.parser import MAX_BYTES, MAX_DEPTH, parser
from patchc.parse.situation import RESERVED
from patchc.resources import grammar_text

ROOT = Path(__file__).parents[2]

WHOLE = """\
# Which heads move the indirect object's name to the end?
model "ioi-tiny" dtype=float32 bos=true revision="main" seed=3
sae latent "dir" at resid_pre[*]
data "prompts.jsonl"[..99] { at end -1 at s1 wrong first + 1 at name "Mary" at span 2..5 at next end - 1 }
data {
  clean   "When Mary and John went to the shop, John gave a bag to"
  answer  {" Mary", " Ann"}
  at s2   wrong last
}
metric diff      = logit(answer) - logit(wrong) / 2
metric recovered = diff from corrupt to clean per prompt
metric other     = -(first(answer) + kl(clean) @ end) * 0.5e-3 + head[3, 1].pattern[end, s2]
let movers = head[3, 1] | head[3, {1, 2}].q | (head[..2, 1..] - head[l - 1, ${H}]).{q, k}
let via(s, r) = s -> mlp* -> r -> any* -> logits
experiment heads "each head, restored" {
  for h in head, p in positions, l in 2..4, k in ..3, j in 5.., c in {-8, 0.5, "x", end - 1}
  run corrupt
  freeze norms, patterns
  patch node h.z @ p with clean @ s2
  patch edge head[1, 0] -> (head[3, 1].q @ {s2, end}) with 0.3 * clean + 0.7 * self
  patch path via(h, movers.q @ 2..) with mean(corrupt, over=positions, by=template)
  patch all except circuit("ioi.circuit.json") with tensor("v.safetensors", "key")
  patch all with blocked
  attribute(steps=5) edge h -> logits with zero
  measure recovered with interval 0.95 seed=1, kl(clean) as kl
  keep top 200 by kl
  prune kl < ${TAU}
  expect recovered at head[3, 1], -2 > -0.1
  expect kl == 0.2 within 0.05
  expect recovered top(3) includes head[3, 1]
  show heatmap
  show heatmap "heads.png"
  save "heads.parquet"
}
"""
EXAMPLES = sorted((ROOT / "examples").rglob("*.patch"))
SPECS = [WHOLE, *(path.read_text(encoding="utf-8") for path in EXAMPLES)]


def parsed(text: str) -> tree.Spec:
    return parse(Source("a.patch", text))


def failure(text: str) -> PatchcError:
    with pytest.raises(PatchcError) as error:
        parsed(text)
    return error.value


def parts(item: Any) -> list[Any]:
    """Everything in a tree: constructs, tuples' members and plain values."""
    if isinstance(item, tuple):
        return [x for member in item for x in parts(member)]
    inner = [getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "span"] if is_node(item) else []
    return [item, *(x for member in inner for x in parts(member))]


def inside(item: tree.Construct) -> list[Any]:
    return [getattr(item, f.name) for f in dataclasses.fields(item) if f.name != "span"]


def is_node(item: object) -> bool:
    return isinstance(item, tree.Construct)


# ---- the grammar


def test_the_grammar_has_no_conflicts_and_no_ambiguous_tokens() -> None:
    lark.Lark(grammar_text(), parser="lalr", lexer="basic", start="spec", strict=True)


def test_the_reserved_words_are_the_grammars() -> None:
    words = {t.name for t in parser().terminals if t.pattern.value.isalpha()}
    assert words == RESERVED


# ---- the tree


@pytest.mark.parametrize("text", SPECS)
def test_nothing_raw_is_left_in_the_tree(text: str) -> None:
    allowed = (tree.Construct, str, int, float, type(None))
    for part in parts(parsed(text)):
        assert isinstance(part, allowed), part
        assert not isinstance(part, (lark.Token, lark.Tree))


def test_the_whole_spec_has_every_construct() -> None:
    everything = {c for c in vars(tree).values() if isinstance(c, type) and issubclass(c, tree.Construct)}
    assert {type(part) for part in parts(parsed(WHOLE)) if is_node(part)} == everything - {tree.Construct}


@pytest.mark.parametrize("text", SPECS)
def test_every_place_is_inside_the_place_round_it(text: str) -> None:
    def check(item: tree.Construct) -> None:
        assert item.span is not None
        for part in [p for x in inside(item) for p in parts(x) if is_node(p)]:
            assert item.span.start <= part.span.start < part.span.end <= item.span.end

    for part in parts(parsed(text)):
        if is_node(part):
            check(part)


def test_places_do_not_matter_to_equality() -> None:
    assert parsed("let a = head[3, 1]") == parsed("\n\nlet   a=head[ 3,1 ]")


@pytest.mark.parametrize("text", SPECS)
def test_what_is_printed_parses_to_the_same_tree(text: str) -> None:
    spec = parsed(text)
    printed = print_spec(spec)
    assert parsed(printed) == spec
    assert print_spec(parsed(printed)) == printed


# ---- what editors write


def test_a_byte_order_mark_is_no_column() -> None:
    spec = parsed("\ufefflet a = head\r\n\tlet b = mlp\r\n")
    first, second = (item.span for item in spec.items)
    assert first is not None
    assert second is not None
    assert first.source.position(first.start) == (1, 1)
    assert second.source.position(second.start) == (2, 2)


def test_line_ends_and_tabs_change_nothing() -> None:
    assert parsed(WHOLE.replace("\n", "\r\n").replace("  ", "\t")) == parsed(WHOLE)


def test_places_count_code_points() -> None:
    (error,) = failure('model "日本🙂"\nlet é = a').diagnostics
    assert error.span is not None
    assert error.span.source.position(error.span.start) == (2, 5)


# ---- limits


def test_a_text_that_is_too_large_is_refused() -> None:
    fits = "#" * (MAX_BYTES - 1) + "\n"
    assert parsed(fits).items == ()
    assert [d.code for d in failure(fits + "\n").diagnostics] == ["spec-too-large"]


def test_brackets_that_are_nested_too_deep_are_refused() -> None:
    nested = "let a = " + "(" * MAX_DEPTH + "b" + ")" * MAX_DEPTH
    assert len(parsed(nested).items) == 1
    assert print_spec(parsed(nested))
    assert [d.code for d in failure(nested.replace("b", "(b)")).diagnostics] == ["nested-too-deep"]


def test_brackets_in_texts_and_comments_do_not_nest() -> None:
    assert parsed(f'# {"(" * 99}\nmodel "{"[" * 99}"').items


def test_long_chains_are_flat() -> None:
    spec = parsed("let a = " + " -> ".join(["b"] * 5_000))
    assert parsed(print_spec(spec)) == spec


def test_more_errors_than_anyone_reads_are_cut() -> None:
    assert len(failure("let let\n" * 1000).diagnostics) == 20
    assert len(failure("§\n" * 1000).diagnostics) == 20


# ---- never anything else


def test_random_damage_gives_a_tree_or_diagnostics() -> None:
    random_ = random.Random(0)
    trees = sum(is_tree(damaged(SPECS[i % len(SPECS)], random_)) for i in range(200))
    assert 0 < trees < 200


def damaged(text: str, random_: random.Random) -> str:
    """The text after up to four bytes or pieces were changed, cut out or put in."""
    data = bytearray(text.encode())
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(data))
        match random_.randrange(3):
            case 0:
                data[at] = random_.randrange(256)
            case 1:
                del data[at : at + random_.randint(1, 30)]
            case _:
                pieces = [b"(", b"}", b'"', b"->", b" patch ", b"\\u", b"\xff", b"@"]
                data[at:at] = random_.choice(pieces)
    return data.decode(errors="replace")


def is_tree(text: str) -> bool:
    """Whether a text parses; if it does its tree can be printed, if not every diagnostic has its place."""
    try:
        spec = parsed(text)
    except PatchcError as error:
        found = error.diagnostics
    else:
        assert parsed(print_spec(spec)) == spec
        return True
    assert found
    assert all(d.span is not None and d.span.start <= d.span.end <= len(text) for d in found)
    return False


def test_parsing_needs_no_torch() -> None:
    modules = "patchc.parse, patchc.diagnostics.render"
    code = f"import sys, {modules}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
