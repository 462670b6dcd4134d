"""Values from elsewhere: groups of prompts, other files, other prompts, other tokens; noise and its seeds."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from patchc.ir.experiment import FromWorld, Mean, Moved, Noise, Value
from patchc.ir.printer import print_study
from tests.unit.resolving import SMALL, errors, experiment, resolved, study

SHORT = "The keys are left"
LONG = "When Mary and John went to the shop"
PROMPTS: list[dict[str, Any]] = [
    {"clean": SHORT, "corrupt": "The key is left", "answer": " Mary", "template": "a", "at_": 1},
    {"clean": LONG, "corrupt": "When Mary and Tom went to the shop", "answer": " Mary", "template": "b", "at_": 3},
    {"clean": "The keys are old", "corrupt": "The key is old", "answer": " John", "template": "a", "at_": 2},
    {"clean": "When Ann and John went to the shop", "corrupt": LONG, "answer": " John", "template": "a", "at_": 0},
    {"clean": "The old key is", "corrupt": "The old keys are", "answer": " Mary", "template": "b", "at_": 3},
    {"clean": "When Tom and Ann went to the shop", "corrupt": LONG, "answer": " Mary", "template": "b", "at_": 7},
]
OFFSETS = (0, 4, 12, 16, 24, 28, 36)
METRIC = "measure logit(answer)"


def values(body: str, **options: Any) -> list[Value]:
    options.setdefault("data", PROMPTS)
    found = experiment(f"run clean {body} {METRIC}", **options)
    return [p.value for c in found.cells for p in c.patches]


def source(value: str, **options: Any) -> Any:
    (found,) = values(f"patch node mlp[0] with {value}", **options)
    ((coefficient, only),) = found.terms
    assert coefficient == 1
    return only


def refused(value: str, at: str = "mlp[0]", **options: Any) -> tuple[str, str]:
    options.setdefault("data", PROMPTS)
    (found,) = errors(f"experiment e {{ run clean patch node {at} with {value} {METRIC} }}", **options)
    return found.code, found.message


# ---- means


def test_prompts_with_equal_cells_are_one_group() -> None:
    assert source("mean(corrupt, by=template)") == Mean("corrupt", groups=(0, 1, 0, 0, 1, 1))
    assert source("mean(by=answer)") == Mean("clean", groups=(0, 0, 1, 1, 0, 0))


def test_a_column_that_groups_is_in_use() -> None:
    data = 'data { clean "The keys are" answer " Mary" template "a" }\n'
    body = "run clean patch node mlp[0] with mean(by=template) measure logit(answer)"
    assert not resolved(f"{data}{data.replace('keys', 'key')} experiment e {{ {body} }}").warnings


def test_the_mean_over_a_prompt_alone_is_the_run_itself() -> None:
    assert refused("mean(by=corrupt)", data=PROMPTS[:3])[0] == "worlds-equal"


def test_a_mean_over_each_prompt_alone_is_not_the_mean_over_all() -> None:
    assert source("mean(by=template, over=positions)") == Mean("clean", True, (0, 1, 0, 0, 1, 1))


# ---- other data


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / "abc.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def test_the_mean_of_another_file_is_of_a_world_of_its_own(tmp_path: Path) -> None:
    base = written(tmp_path, {"abc": "Ann went", "clean": LONG + "."}, {"abc": "Tom", "clean": "The shop"})
    body = f'run clean patch node mlp[0] with mean("abc.jsonl") patch node mlp[1] with mean("abc.jsonl", abc) {METRIC}'
    found = study(
        f"experiment e {{ {body.replace('mlp[1]', 'mlp[1] @ 1')} }}",
        data=[{"clean": "The keys are", "answer": " Mary"}],
        base=base,
    )
    own, other, third = found.prompts.worlds
    assert (own.name, own.layout) == ("clean", None)
    assert other.name == "abc.jsonl:clean"
    assert other.layout is not None
    assert other.layout.lengths == (9, 2)
    assert [len(i) for i in other.ids] == [9, 2]
    assert third.name == "abc.jsonl:abc"
    first, second = (p.value.terms[0][1] for p in found.experiments[0].cells[0].patches)
    assert (first, second) == (Mean("abc.jsonl:clean"), Mean("abc.jsonl:abc"))
    assert "world abc.jsonl:abc, of 2 prompts of" in print_study(found, SMALL)


def test_without_the_runs_column_the_first_of_texts_is_taken(tmp_path: Path) -> None:
    base = written(tmp_path, {"n": 3, "text": LONG, "other": "The"})
    assert source('mean("abc.jsonl")', base=base) == Mean("abc.jsonl:text")
    assert source('mean("abc.jsonl", over=positions)', base=base) == Mean("abc.jsonl:text", True)


def test_a_mean_of_other_data_has_every_position_that_is_needed(tmp_path: Path) -> None:
    base = written(tmp_path, {"text": "The keys are left"}, {"text": "The"})
    code, message = refused('mean("abc.jsonl")', base=base)
    assert (code, "position 4; its longest prompt has 4 tokens" in message) == ("mean-position", True)
    assert refused('mean("abc.jsonl") @ 4', base=base, data=[PROMPTS[1]])[0] == "mean-position"
    assert source('mean("abc.jsonl") @ 3', base=base).source == Mean("abc.jsonl:text")
    (value,) = values('patch node mlp[0] @ 3 with mean("abc.jsonl")', base=base)
    assert value.terms == ((1.0, Mean("abc.jsonl:text")),)


def test_other_data_can_be_at_fault(tmp_path: Path) -> None:
    base = written(tmp_path, {"n": 3})
    assert refused('mean("abc.jsonl")', base=base)[0] == "no-text-column"
    assert refused('mean("abc.jsonl", text)', base=base)[0] == "unknown-name"
    assert refused('mean("abc.jsonl", n)', base=base)[0] == "wrong-kind"
    assert refused('mean("none.jsonl")', base=base)[0] == "missing-file"
    assert refused('mean("abc.jsonl", n, n)', base=base)[0] == "bad-argument"


# ---- other prompts


def drawn(found: Moved) -> list[int]:
    """The prompt that each prompt is given; its tokens are in order."""
    out: list[int] = []
    for start, end in pairwise(OFFSETS):
        row = found.tokens[start:end]
        prompt = OFFSETS.index(row[0])
        assert row == tuple(range(OFFSETS[prompt], OFFSETS[prompt + 1]))
        out.append(prompt)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_another_prompt_of_equal_length_is_drawn_never_itself(seed: int) -> None:
    found = source(f"resample(seed={seed})")
    assert found.source == FromWorld("clean")
    for i, other in enumerate(drawn(found)):
        assert other != i
        assert len(PROMPTS[i]["clean"].split()) == len(PROMPTS[other]["clean"].split())


def test_every_other_prompt_can_be_drawn() -> None:
    draws = {drawn(source(f"resample(seed={seed})"))[0] for seed in range(20)}
    assert draws == {2, 4}


def test_a_resampled_prompt_can_share_its_cell_of_a_column() -> None:
    found = source("resample(corrupt, same=answer, seed=3)", data=[PROMPTS[i] for i in (0, 4, 0, 4)])
    assert found.source == FromWorld("corrupt")
    assert refused("resample(same=answer, seed=3)") == (
        "no-other-prompt",
        "no other prompt has the 4 tokens and the same answer of prompt 2, so that it cannot be resampled",
    )


def test_a_prompts_draw_does_not_depend_on_prompts_of_other_lengths() -> None:
    mixed = drawn(source("resample(seed=5)"))
    alone = source("resample(seed=5)", data=[PROMPTS[0], PROMPTS[1], PROMPTS[2], PROMPTS[3], PROMPTS[4]])
    assert alone.tokens[:4] == tuple(range(OFFSETS[mixed[0]], OFFSETS[mixed[0]] + 4))


def test_draws_are_written_down() -> None:
    assert [drawn(source(f"resample(seed={s})")) for s in range(3)] == [
        drawn(source(f"resample(clean, seed={s})")) for s in range(3)
    ]
    assert source("resample") == source("resample(seed=0)")


def test_prompts_whose_answers_follow_them_are_drawn_with_their_rows() -> None:
    rows = [{"clean": SHORT, "answer": a} for a in (" Mary and", " John and", " Ann went to", " Tom went to")]
    found = experiment(
        "run clean patch node mlp[0] with resample(seed=1) patch node mlp[1] with clean @ 1 measure logprob(answer)",
        data=rows,
    )
    resampled, moved = (p.value.terms[0][1] for p in found.cells[0].patches)
    assert isinstance(resampled, Moved)
    assert isinstance(moved, Moved)
    assert [resampled.tokens[t] for t in (0, 5, 10, 16)] == [5, 0, 16, 10]
    assert [moved.tokens[t] for t in (4, 9, 15, 21)] == [1, 6, 11, 17]


def test_other_data_have_no_answers_that_follow(tmp_path: Path) -> None:
    base = written(tmp_path, {"text": LONG})
    rows = [{"clean": SHORT, "answer": " Mary and"}]
    body = 'run clean patch node mlp[0] with mean("abc.jsonl") measure logprob(answer)'
    (found,) = errors(f"experiment e {{ {body} }}", data=rows, base=base)
    assert (found.code, found.message.endswith("position 4; no answer follows there")) == ("mean-position", True)
    assert experiment(body.replace("mlp[0]", "mlp[0] @ 0..3"), data=rows, base=base).cells


def test_a_resampled_prompt_at_a_position() -> None:
    found = source("resample(seed=0) @ at_")
    own = drawn(source("resample(seed=0)"))
    at = [OFFSETS[j] + PROMPTS[i]["at_"] for i, j in enumerate(own)]
    assert found.tokens == tuple(t for i, t in enumerate(at) for _ in range(OFFSETS[i + 1] - OFFSETS[i]))


# ---- other tokens


def test_a_value_of_another_position_is_that_of_each_prompts_own() -> None:
    found = source("corrupt @ at_")
    expected = [OFFSETS[i] + p["at_"] for i, p in enumerate(PROMPTS) for _ in range(OFFSETS[i + 1] - OFFSETS[i])]
    assert found == Moved(FromWorld("corrupt"), tuple(expected))
    assert source("mean(by=template) @ 0").source == Mean("clean", groups=(0, 1, 0, 0, 1, 1))


def test_several_positions_of_one_prompt_are_none() -> None:
    code, message = refused("corrupt @ 1..2")
    assert (code, "this is 2 in prompt 0" in message) == ("several-places", True)


# ---- noise, seeds


def test_seeds_are_kept_each_once() -> None:
    body = "for s in {3, 1} run clean patch node mlp[0] with self + noise(sigma=3, seed=s) "
    body += "patch node mlp[1] with resample(seed=s) patch node mlp[2] with noise(std=1, seed=3)"
    found = study(f"experiment e {{ {body} {METRIC} }}", data=PROMPTS)
    assert set(found.seeds) == {("noise", 3), ("noise", 1), ("resample", 3), ("resample", 1)}
    assert len(found.seeds) == 4
    assert "seed 3 of noise" in print_study(found, SMALL)
    noise = found.experiments[0].cells[1].patches[0].value.terms[1][1]
    assert noise == Noise(3.0, 1, relative=True)


def test_cells_with_one_seed_share_one_draw() -> None:
    found = values("for h in head[1, *] patch node h with resample(seed=0)")
    assert len(found) == 4
    assert len({id(v) for v in found}) == 1
