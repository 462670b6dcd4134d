"""Metrics, answers of several tokens, and whole specs of the kinds that researchers write, on GPT-2's shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchc.ir.experiment import (
    Continuation,
    Expression,
    Metric,
    NodeRead,
    Product,
    Prompts,
    Quotient,
    Read,
    Study,
    Sum,
)
from patchc.ir.graph import residual_graph
from patchc.ir.paths import Site
from tests.unit.resolving import GPT2, SMALL, Words, errors, resolved, study

LOOKS_AHEAD = residual_graph(
    "tracr", n_layers=1, n_heads=1, d_model=8, d_head=4, d_vocab=60, has_pos_embed=True, causal=False
)
TEXTS = [" went", " left", " went to", " went to the", " the shop", " old shop and", " and"]


def measured(text: str, data: Any = None, **options: Any) -> tuple[Prompts, tuple[Metric, ...]]:
    """What an experiment of one patch measures."""
    body = f"experiment e {{ run clean patch node mlp[0] with corrupt measure {text} }}"
    found = study(body, options.pop("graph", SMALL), **({"data": data} if data else {}), **options)
    return found.prompts, found.experiments[0].metrics


def leaves(expression: Expression) -> Iterator[Expression]:
    match expression:
        case Sum(terms):
            for _, term in terms:
                yield from leaves(term)
        case Product(parts):
            for part in parts:
                yield from leaves(part)
        case Quotient(over, under):
            yield from (*leaves(over), *leaves(under))
        case _:
            yield expression


# ---- answers of several tokens


PROMPTS = st.lists(st.tuples(st.integers(1, 4), st.sampled_from(TEXTS), st.sampled_from(TEXTS)), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.sampled_from(TEXTS), st.booleans())
def test_the_tokens_that_predict_an_answer_stand_right_before_it(
    drawn: list[tuple[int, str, str]], literal: str, bos: bool
) -> None:
    data = [
        {"clean": "When" + " Mary" * n, "corrupt": "When" + " Ann" * n, "answer": a, "wrong": w} for n, a, w in drawn
    ]
    tokenizer = Words(bos=bos)
    text = f'logprob(answer) as a, logprob(wrong) as w, logprob("{literal}") as l'
    prompts, metrics = measured(f"{text}, logit(first(answer)) as f, kl(clean) as k", data, tokenizer=tokenizer)
    assert prompts.n == len(drawn)
    assert len(prompts.worlds[0].ids) == prompts.layout.n_prompts == prompts.n * prompts.copies
    wanted = {"a": [a for _, a, _ in drawn], "w": [w for _, _, w in drawn], "l": [literal] * len(drawn)}
    for metric in metrics[:3]:
        several = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in wanted[metric.name]]
        check_leaf(metric.expression, several, prompts)
    for metric in metrics[3:]:
        read: Any = metric.expression
        assert [prompts.layout.place(t) for t in read.tokens] == [
            (i, n - 1) for i, n in enumerate(prompts.own_lengths[: prompts.n])
        ]


def check_leaf(read: Expression, answers: list[list[int]], prompts: Prompts) -> None:
    if all(len(ids) == 1 for ids in answers):
        assert isinstance(read, Read)
        assert [list(a) for a in read.answers] == answers
        return
    assert isinstance(read, Continuation)
    assert [list(a) for a in read.answers] == answers
    rows = set[int]()
    for prompt, (ids, tokens) in enumerate(zip(read.answers, read.tokens, strict=True)):
        assert len(ids) == len(tokens)
        places = [prompts.layout.place(t) for t in tokens]
        (row,) = {r for r, _ in places}
        rows.add(row - prompt)
        first = prompts.own_lengths[row] - 1
        assert [p for _, p in places] == list(range(first, first + len(ids)))
        for world in prompts.worlds:
            assert world.ids[row][first + 1 : first + len(ids)] == ids[:-1]
            assert len(world.ids[row]) == prompts.layout.lengths[row] == first + len(ids)
    assert len(rows) == 1  # one copy of the prompts holds the whole answer


def test_prompts_stand_once_where_no_answer_has_several_tokens() -> None:
    prompts, _ = measured("logprob(answer), logprob(wrong)")
    assert (prompts.copies, prompts.own, prompts.own_lengths) == (1, (), prompts.layout.lengths)


def test_a_metric_that_is_not_measured_has_its_copy_too() -> None:
    data = [{"clean": "When Mary", "corrupt": "When Ann", "answer": " went to"}]
    text = "metric m = logprob(answer)\nexperiment e { run clean patch node mlp[0] with corrupt measure kl(clean) }"
    assert study(text, data=data).prompts.layout.lengths == (3,)


def test_a_model_that_looks_ahead_takes_no_answer_of_several_tokens() -> None:
    data = [{"clean": "When Mary", "corrupt": "When Ann", "answer": " went to"}]
    text = "experiment e { run clean patch node mlp[0] with corrupt measure logprob(answer) }"
    (found,) = errors(text, LOOKS_AHEAD, data=data)
    assert (found.code, "looks ahead" in found.message) == ("multi-token-answer", True)
    assert study(text.replace("(answer)", "(first(answer))"), LOOKS_AHEAD, data=data).prompts.copies == 1


def test_a_parameter_can_be_an_answer_of_several_tokens() -> None:
    prompts, (metric,) = measured("logprob(${A}) as a", parameters={"A": " old shop"})
    assert isinstance(metric.expression, Continuation)
    assert prompts.layout.lengths == (15,)


def test_a_position_from_the_end_counts_in_the_prompt() -> None:
    data = [{"clean": "When Mary", "corrupt": "When Ann", "answer": " went to the"}]
    body = "for p in -2..-1 run clean patch node mlp[0] @ p with corrupt measure logprob(answer)"
    found = study(f"experiment e {{ {body} }}", data=data)
    paths: list[Any] = [c.patches[0].path for c in found.experiments[0].cells]
    assert [found.prompts.layout.numbers(p.parts[0].tokens) for p in paths] == [[0], [1]]


# ---- units


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("logit(answer) - logit(wrong)", "logits"),
        ("-2 * logprob(answer) + 1", "nats"),
        ("loss - kl(clean)", "nats"),
        ("prob(answer) / 2", "probability"),
        ("rank(answer)", "count"),
        ("correct", "fraction"),
        ("prob(answer) / prob(wrong)", None),
        ("logit(answer) * prob(answer)", None),
        ("1 / logit(answer)", None),
        ("head[1, 0].pattern[end, 0]", None),
        ("head[1, 0].pattern[end, 0] + prob(answer)", "probability"),
        ("logit(answer) from corrupt to clean", None),
    ],
)
def test_the_unit_of_a_metric(text: str, unit: str | None) -> None:
    _, (metric,) = measured(text + " as m")
    assert metric.unit == unit


# ---- tensors in files


def probe_file(path: Path, **shapes: list[int]) -> None:
    header = json.dumps(
        {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode())


def test_the_direction_of_a_dot_comes_from_a_file(tmp_path: Path) -> None:
    probe_file(tmp_path / "probe.safetensors", w=[32], small=[8])
    text = 'dot(resid_post[2] @ end, tensor("probe.safetensors", "{}")) as m'
    _, (metric,) = measured(text.format("w"), base=tmp_path)
    read = metric.expression
    assert isinstance(read, NodeRead)
    assert (read.key, read.probe.site, read.tokens) == ("probe.safetensors#w", Site.STREAM, (13,))
    body = f"experiment e {{ run clean patch node mlp[0] with corrupt measure {text.format('small')} }}"
    (found,) = errors(body, base=tmp_path)
    assert found.code == "tensor-shape"


SHARED = residual_graph(
    "gqa", n_layers=2, n_heads=4, d_model=32, d_head=8, d_vocab=60, has_pos_embed=False, n_kv_heads=2
)


@pytest.mark.parametrize(
    ("node", "code"),
    [
        ("kv[1, 0].k", "not-a-number"),
        ("kv[1, 0]", "wrong-kind"),
        ("head[1, 0].k", None),
        ("head[1, 0].in", "unknown-site"),
    ],
)
def test_a_key_value_head_is_read_by_a_query_head_of_it(node: str, code: str | None) -> None:
    text = f'experiment e {{ run clean patch node mlp[0] with corrupt measure dot({node} @ end, tensor("v")) }}'
    found = errors(text, SHARED, tensors={"v": (8,)})
    assert [d.code for d in found] == ([code] if code else [])


# ---- whole specs, in the manner of published work


IOI = [
    {
        "clean": "When Mary and John went to the shop, John gave a bag to",
        "corrupt": "When Mary and John went to the shop, Mary gave a bag to",
        "answer": " Mary",
        "wrong": " John",
    },
    {
        "clean": "After Tom and Ann went to the shop, Ann gave keys to",
        "corrupt": "After Tom and Ann went to the shop, Tom gave keys to",
        "answer": " Tom",
        "wrong": " Ann",
    },
]
IOI_DATA = """
model "gpt2" dtype=float32
data "ioi.jsonl"[..1] {
  at io      answer first
  at subject wrong last
  at end     -1
}
metric diff      = logit(answer) - logit(wrong)
metric recovered = diff from corrupt to clean
"""
SPECS = {
    "greater_than": """
model "gpt2"
data "years.json"
metric mass = prob(answers) - prob(wrongs)
let movers = head[5, {1, 5}] | head[6, {1, 9}] | head[9, 1]
let late   = mlp[8..11]
let seen   = (embed -> movers -> late -> logits) | (embed -> (mlp[0..3] | head[0..4, *])* -> movers -> late* -> logits)
experiment ours {
  run corrupt
  patch path seen with clean
  measure mass from corrupt to clean as recovered
  expect recovered > 0.8
}
experiment rest { run corrupt patch all except seen with clean measure mass from corrupt to clean as recovered }
""",
    "several_metrics": IOI_DATA
    + """
metric each  = diff from corrupt to clean per prompt
metric share = prob(answer) / (prob(answer) + prob(wrong))
experiment heads {
  for h in head
  run corrupt
  patch node h with clean
  measure recovered with interval 0.95 seed=3, each, share, kl(clean) @ end, rank(answer), correct
  measure logprob(" Mary") as mary
  expect recovered top(10) includes head[9, 9]
  expect share at head[9, 9] == 0.5 within 0.5
  show table
}
""",
    "worlds": """
model "gpt2"
data {
  clean " When Mary and John went to the shop, John gave a bag to"
  other " When Tom and Ann went to the shop, Mary gave a bag to"
  flip  " When John and Mary went to the shop, John gave a bag to"
  answer " Mary" wrong " John"
  at end -1
}
metric diff = logit(answer) - logit(wrong)
experiment senders {
  for h in head[7..8, *], w in {other, flip}
  run clean
  patch path h -> mlp* -> head[9, {6, 9}].q @ end -> any* -> logits with w
  measure diff
}
experiment token_or_place {
  run other
  patch path embed -> any* -> head[9, 9].k -> any* -> logits with flip
  patch path embed -> any* -> head[9, 9].q -> any* -> logits with clean
  measure diff, kl(flip)
}
""",
    "each_prompt": IOI_DATA
    + """
experiment each {
  for h in head[9, *], i in prompts
  run clean
  patch node h with corrupt
  measure diff
  expect diff at head[9, 9], 1 > -10
  save "each.parquet"
}
""",
    "blocks_and_files": """
model "ioi-tiny"
data { clean "When Mary and John" corrupt "When Ann and Tom" answer {" went", " left"} wrong " sat" }
data { clean "After Tom and Ann" corrupt "After John and Mary" answer {" went", " left"} wrong " sat" }
data "more.csv"
data "more.parquet"
metric p = prob(answer) - prob(wrong)
experiment h { for h in head run corrupt patch node h with clean measure p }
""",
    "attention": IOI_DATA
    + """
metric to_io = head[9, 9].pattern[end, io]
metric along = dot(resid_post[9] @ end, tensor("probe.safetensors", "w"))
experiment attends {
  for h in head[..8, *]
  run clean
  patch path h -> mlp* -> head[9, 9].q @ end with corrupt
  measure to_io, along, to_io from corrupt to clean as share, mlp[9].post[7] @ io as neuron
}
""",
}


@pytest.fixture(scope="module")
def fixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the specs name."""
    base = tmp_path_factory.mktemp("data")
    (base / "ioi.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*IOI, IOI[0]]))
    year = {"clean": "The keys in", "corrupt": "The key is", "answers": [" left", " sat"], "wrongs": [" went"]}
    (base / "years.json").write_text(json.dumps([year, year]))
    more = {"clean": "When Ann", "corrupt": "When Tom", "answer": " went", "wrong": " sat"}
    (base / "more.csv").write_text(",".join(more) + "\n" + ",".join(more.values()) + "\n")
    import pandas as pd

    pd.DataFrame([more]).to_parquet(base / "more.parquet")
    probe_file(base / "probe.safetensors", w=[768])
    return base


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_of_this_kind_resolves_on_gpt2s_shape(name: str, fixtures: Path) -> None:
    found = resolved(SPECS[name], GPT2, base=fixtures)
    assert found.warnings == ()
    check(name, found.study)


def check(name: str, found: Study) -> None:
    first = found.experiments[0]
    match name:
        case "several_metrics":
            assert (first.shape, found.seeds, found.prompts.n) == ((12, 12), (("interval", 3),), 2)
            assert [m.unit for m in first.metrics] == [None, None, None, "nats", "count", "fraction", "nats"]
            assert (first.expects[0].top, first.expects[0].indices) == (10, ((9, 9),))
        case "worlds":
            assert [w.name for w in found.prompts.worlds] == ["clean", "other", "flip"]
            assert [d.name for d in first.dims] == ["layer", "head", "w"]
        case "each_prompt":
            assert first.by_prompt is not None
            assert (first.by_prompt.axis, first.by_prompt.prompts, first.shape) == (2, (0, 1), (1, 12))
            assert first.expects[0].indices == ((0, 9, 1),)
        case "blocks_and_files":
            assert found.prompts.layout.lengths == (4, 4, 2, 2)
        case "attention":
            reads = [leaf for m in first.metrics for leaf in leaves(m.expression) if isinstance(leaf, NodeRead)]
            assert [r.probe.site for r in reads] == [Site.PATTERN, Site.STREAM, Site.PATTERN, Site.POST]
            assert [found.prompts.layout.place(t) for t in reads[0].sources] == [(0, 1), (1, 1)]
        case _:
            assert len(found.experiments) == 2
