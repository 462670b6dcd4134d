"""Nasty texts by hand: sizes, depths and numbers that no spec needs, each refused or read soon."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile import survive
from tests.unit.resolving import completed

HUGE = "1" + "0" * 400


def experiment(body: str) -> str:
    return f"experiment e {{ run clean\n {body}\n measure diff }}"


def path(text: str) -> str:
    return experiment(f"patch path {text} with corrupt")


def chained(first: str, then: str, n: int) -> str:
    """`a0 = first`, and n more lines in which `?` is the name before."""
    return f"{first}\n" + "".join(then.replace("!", f"a{i}").replace("?", f"a{i - 1}") + "\n" for i in range(1, n + 1))


PLAIN = experiment("patch node mlp[0] with corrupt")
REFUSED = {
    "stars": ("syntax-error", path("any" + "*" * 1000)),
    "stars_in_stars": ("nested-too-deep", path("(" * 1000 + "any" + ")*" * 1000)),
    "parentheses": ("nested-too-deep", "(" * 100_000),
    "brackets": ("nested-too-deep", "([{" * 50_000),
    "unclosed": ("syntax-error", '"' + "a" * 200_000),
    "ten_megabytes": ("spec-too-large", PLAIN + "\n#" + "x" * 10_000_000),
    "lines": ("spec-too-large", "\n" * 10_000_000),
    "long_name": ("unknown-name", experiment("patch node " + "a" * 200_000 + " with corrupt")),
    "factor": ("bad-number", experiment(f"patch node mlp[0] with {HUGE} * corrupt")),
    "in_a_metric": ("bad-number", f"metric m = logit(answer) / {HUGE}\n{PLAIN}"),
    "seed": ("bad-number", experiment(f"patch node mlp[0] with noise(std=1, seed={HUGE})")),
    "level": ("bad-number", experiment(f"patch node mlp[0] with corrupt\n measure diff with interval {HUGE}")),
    "digits": ("bad-number", experiment("patch node mlp[" + "9" * 100_000 + "] with corrupt")),
    "infinity": ("bad-number", experiment("patch node mlp[0] with 1e400 * corrupt")),
    "nothing_under": ("division-by-zero", f"metric m = logit(answer) / 0.{'0' * 400}1\n{PLAIN}"),
    "cells": ("too-many-cells", experiment("for a in any, b in any, c in any, d in any, f in any, p in positions "
                                           "patch node a @ p with corrupt")),
    "variables": ("too-many-cells", experiment("for " + ", ".join(f"l{i} in {{0, 1}}" for i in range(30))
                                               + " patch node mlp[l0] with corrupt")),
    "layers": ("too-many-cells", experiment("for l in 0..999999999 patch node mlp[0] with corrupt")),
    "heads": ("unknown-node", experiment("patch node head[0..999999999, *] with corrupt")),
    "positions": ("position-outside", experiment("patch node mlp[0] @ 0..999999999 with corrupt")),
    "doubled_metrics": ("metric-too-large", chained("metric a0 = logit(answer)", "metric ! = ? + ?", 40) + PLAIN),
    "multiplied_metrics": ("metric-too-large", chained("metric a0 = logit(answer)", "metric ! = ? * ?", 40) + PLAIN),
    "deep_metrics": ("metric-too-large", chained("metric a0 = logit(answer)", "metric ! = 1 / ?", 300) + PLAIN),
    "nul": ("syntax-error", PLAIN + "\0"),
    "surrogate": ("syntax-error", "\ud800" * 100),
    "right_to_left": ("syntax-error", PLAIN + " \u202e"),
    "mark_inside": ("syntax-error", PLAIN.replace("mlp", "mlp\ufeff")),
    "odd_quotes": ("syntax-error", '"\n' * 50_000),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = REFUSED[name]
    assert code in {d.code for d in survive(completed(text), tmp_path)}


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        experiment("patch node mlp[0] with corrupt\n" * 300),
        chained("let a0 = mlp[0] | head[0, 0]", "let ! = ? | ?", 40) + experiment("patch node a40 with corrupt"),
    ],
    ids=["mark", "carriage_returns", "patches", "doubled_lets"],
)
def test_read(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not [d for d in survive(completed(text), tmp_path) if d.is_error]
