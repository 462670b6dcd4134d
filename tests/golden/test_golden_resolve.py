"""Specs to resolved studies, and mistakes to diagnostics: tests/golden/resolve/*.test.

A case without a model, data or a metric of its own gets those of `tests.unit.resolving` after its text. The
model has 4 layers of 4 heads. `[prompts]` is what stands before the experiments: worlds, prompts, tensors, seeds.
Printed whole, every study parses back.
"""

from __future__ import annotations

import pytest
from harness import Case, Golden, cases

from patchc.diagnostics import PatchcError
from patchc.ir.printer import print_study
from patchc.ir.reader import read_study
from tests.unit.resolving import SMALL, resolved, short

EXTRA = {
    "tensors": {"direction": (32,), "narrow": (8,), "square": (8, 8), "wide": (64,)},
    "metrics": ("mine",),
}
PARAMETERS = {"K": 2}


@pytest.mark.parametrize("case", cases("resolve"), ids=str)
def test_resolve(case: Case, golden: Golden) -> None:
    golden(case, outcome(case.input))


def outcome(text: str) -> dict[str, str]:
    parameters = {name: value for name, value in PARAMETERS.items() if f"${{{name}}}" in text}
    try:
        found = resolved(text, SMALL, **EXTRA, parameters=parameters)
    except PatchcError as error:
        return {"errors": "\n".join(map(short, error.diagnostics))}
    assert read_study(print_study(found.study, SMALL, whole=True), SMALL) == found.study
    printed = print_study(found.study, SMALL)
    at = printed.index("experiment ")
    out = {"prompts": printed[printed.index("\n") + 1 : at].rstrip("\n"), "study": printed[at:]}
    if found.warnings:
        out["warnings"] = "\n".join(map(short, found.warnings))
    return out
