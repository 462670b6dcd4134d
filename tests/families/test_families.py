"""Every family of the table: traced and proved, then node, edge and path patches as plain forward hooks give them."""

from __future__ import annotations

import copy
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import patchc
from patchc.api import Model
from patchc.execute import check, hook_proof
from patchc.execute.base import run_world
from patchc.execute.hooks import Oracle
from patchc.ir.experiment import World
from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.tokens import Layout
from tests.families.rows import FAMILIES, Family
from tests.families.table import HEAD, table
from tests.families.unknown import Unknown, UnknownHooks
from tests.models import D_VOCAB, logits_of

LENGTHS = (5, 9, 5)
"""More tokens than a sliding window of 4 shows; neither the batch nor a length that is traced."""
RUNS = [pytest.param(f, a, id=f"{f.name} {a}") for f in FAMILIES if not f.refused for a in f.attention]
BRIDGED = [f for f in FAMILIES if not f.refused and not f.no_bridge]

METRIC = "metric diff = logit(answer) - logit(wrong)\n"
EDGE = "experiment direct { run clean patch edge head[0, 1] -> head[1, 2].v with corrupt measure diff }\n"
SPEC = f"""{METRIC}{EDGE}
experiment head_node {{ run clean patch node head[0, 1] with corrupt measure diff }}
experiment head_path {{ run clean patch path head[0, 1] -> mlp[1] -> logits with corrupt measure diff }}
experiment query {{ run clean patch node head[1, 0].q with corrupt measure diff }}
experiment key {{ run clean patch node head[1, 3].k @ 1 with corrupt measure diff }}
experiment value {{ run clean patch node head[0, 2].v with corrupt measure diff }}
experiment shared_key {{ run clean patch node kv[1, 0].k with corrupt measure diff }}
experiment mlp_edge {{ run clean patch edge mlp[0] -> head[1, *].q with corrupt measure diff }}
experiment mlp_node {{ run clean patch node mlp[1] with corrupt measure diff }}
experiment attention {{ run clean patch node attn_out[0] with corrupt measure diff }}
experiment stream {{ run clean patch node resid_pre[1] @ 2 with corrupt measure diff }}
experiment embedding {{ run clean patch path embed -> mlp[0] -> (any)* -> logits with corrupt measure diff }}
"""
MIDDLE = "experiment middle { run clean patch node resid_mid[0] @ 2 with corrupt measure diff }\n"
PATTERN = "experiment pattern { run clean patch node head[1, 1].pattern with corrupt measure diff }\n"


def prompts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = (
        [torch.randint(3, D_VOCAB, (n,), generator=generator).tolist() for n in LENGTHS] for _ in range(2)
    )
    return {"clean": clean, "corrupt": corrupt, "answer": [11, 12, 13], "wrong": [21, 22, 23]}


@cache
def model(family: Family, attention: str) -> Model:
    return untraced(family.build(attention))


def untraced(module: nn.Module) -> Model:
    """Traced anew, with the proof: the cache of traces is off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHC_CACHE", "off")
        return patchc.load(module)


def spec(graph: ResidualGraph, attention: str) -> str:
    blocks = [graph.layer_block(kind, 0) for kind in (BlockKind.ATTENTION, BlockKind.MLP)]
    parallel = len({block.rank for block in blocks if block is not None}) == 1
    return SPEC + ("" if parallel else MIDDLE) + (PATTERN if attention == "eager" else "")


@pytest.mark.parametrize(("family", "attention"), RUNS)
def test_the_logits_are_the_models_own(family: Family, attention: str) -> None:
    loaded = model(family, attention).loaded
    worlds = (World("clean", tuple(map(tuple, prompts()["clean"]))),)
    layout = Layout(LENGTHS)
    with torch.no_grad():
        run = run_world(loaded.pieces, worlds[0], layout, loaded.pieces.tables(layout))
        mine = loaded.pieces.unembed(run.stream[-1]).split(LENGTHS)
    for ids, got in zip(worlds[0].ids, mine, strict=True):
        torch.testing.assert_close(got, logits_of(loaded.eager, torch.tensor([ids]))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "attention"), RUNS)
def test_patches_are_those_of_plain_hooks(family: Family, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family.build(attention).__class__ is Unknown:
        monkeypatch.setattr(hook_proof, "ForwardHooks", UnknownHooks)
    monkeypatch.setattr(check, "Oracle", partial(Oracle, driver=family.driver))
    loaded = model(family, attention)
    results = loaded.compile(spec(loaded.graph, attention), prompts()).run(check="all", progress=False, write=False)
    changed = [abs(r.values["diff"] - r.baselines["diff"]["clean"]) > 1e-4 for r in results.values()]
    assert sum(changed) > len(changed) // 2  # two backends that do nothing agree too


@pytest.mark.parametrize("family", BRIDGED, ids=lambda f: f.name)
def test_a_bridge_is_traced_as_the_model_is(family: Family) -> None:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    attention = family.attention[-1]
    module: Any = copy.deepcopy(model(family, attention).loaded.eager)
    bridge: Any = build_bridge_from_module(module, type(module).__name__, hf_config=module.config)
    text = METRIC + EDGE
    mine, its = (
        m.compile(text, prompts()).run(progress=False, write=False)
        for m in (model(family, attention), untraced(bridge))
    )
    assert its["direct"].values["diff"] == pytest.approx(float(mine["direct"].values["diff"]), abs=1e-4)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.refused], ids=lambda f: f.name)
def test_refused_for_what_it_is(family: Family) -> None:
    with pytest.raises(patchc.PatchcError) as caught:
        untraced(family.build(family.attention[0]))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "model-not-understood"
    assert family.refused in diagnostic.message
    assert "\n" not in diagnostic.message


def test_the_readme_has_this_table() -> None:
    """Where it has one: every row of it is a row here, and the other way round."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    if HEAD in text:
        assert table() in text


def test_every_row_is_in_the_table() -> None:
    assert len(table().splitlines()) == 2 + len(FAMILIES)
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)
