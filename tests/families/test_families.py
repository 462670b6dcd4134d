"""Every family of the table: traced and proved, then node, edge and path patches as plain forward hooks give them."""

from __future__ import annotations

from functools import partial
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
from patchc.model.load import LoadedModel
from tests.families.bridges import bridge, first_layer
from tests.families.rows import FAMILIES, Bridged, Family
from tests.families.table import table
from tests.families.unknown import Unknown, UnknownHooks
from tests.models import D_VOCAB, logits_of

LENGTHS = (5, 9, 5)
"""More tokens than a sliding window of 4 shows; neither the batch nor a length that is traced."""
TRACED = [f for f in FAMILIES if not f.refused]
BRIDGED = [f for f in TRACED if not f.no_bridge and f.bridge is not Bridged.SAME]
UNBRIDGED = [f for f in TRACED if f.no_bridge and hasattr(f.build(f.attention), "config")]

METRIC = "metric diff = logit(answer) - logit(wrong)\n"
ONE_LAYER = f"""{METRIC}
experiment of_edge {{ run clean patch edge embed -> head[0, 2].v with corrupt measure diff }}
experiment of_node {{ run clean patch node head[0, 1] with corrupt measure diff }}
experiment of_path {{ run clean patch path embed -> head[0, 3] -> logits with corrupt measure diff }}
"""
SPEC = f"""{METRIC}
experiment direct {{ run clean patch edge head[0, 1] -> head[1, 2].v with corrupt measure diff }}
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
experiment the_rest {{ run clean patch all except head[0, *] -> logits with corrupt measure diff }}
experiment embedding {{ run clean patch path embed -> mlp[0] -> (any)* -> logits with corrupt measure diff }}
"""
INSIDE = """
experiment mixed { run clean patch node head[0, 2].z with corrupt measure diff }
experiment neurons { run clean patch node mlp[1].post[{3, 7}] with corrupt measure diff }
"""
MIDDLE = "experiment middle { run clean patch node resid_mid[0] @ 2 with corrupt measure diff }\n"
PATTERN = "experiment pattern { run clean patch node head[1, 1].pattern with corrupt measure diff }\n"


def prompts() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    clean, corrupt = (
        [torch.randint(3, D_VOCAB, (n,), generator=generator).tolist() for n in LENGTHS] for _ in range(2)
    )
    return {"clean": clean, "corrupt": corrupt, "answer": [11, 12, 13], "wrong": [21, 22, 23]}


def untraced(module: nn.Module) -> Model:
    """Traced anew, with the proof: the cache of traces is off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHC_CACHE", "off")
        return patchc.load(module)


def spec(graph: ResidualGraph, attention: str) -> str:
    blocks = [graph.layer_block(kind, 0) for kind in (BlockKind.ATTENTION, BlockKind.MLP)]
    parallel = len({block.rank for block in blocks if block is not None}) == 1
    inside = INSIDE if graph.d_mlp else ""  # experts have no neurons to reach
    return SPEC + inside + ("" if parallel else MIDDLE) + (PATTERN if attention == "eager" else "")


def name(family: Family) -> str:
    return family.name


@pytest.mark.parametrize("family", TRACED, ids=name)
def test_patches_are_those_of_plain_hooks(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    module = family.build(family.attention)
    if isinstance(module, Unknown):
        monkeypatch.setattr(hook_proof, "ForwardHooks", UnknownHooks)
    monkeypatch.setattr(check, "Oracle", partial(Oracle, driver=family.driver))
    model = untraced(module)
    has_its_own_logits(model.loaded)
    matches_hooks(model, spec(model.loaded.graph, family.attention))


def has_its_own_logits(loaded: LoadedModel) -> None:
    world, layout = World("clean", tuple(map(tuple, prompts()["clean"]))), Layout(LENGTHS)
    with torch.no_grad():
        run = run_world(loaded.pieces, world, layout, loaded.pieces.tables(layout))
        mine = loaded.pieces.unembed(run.stream[-1]).split(LENGTHS)
    for ids, got in zip(world.ids, mine, strict=True):
        torch.testing.assert_close(got, logits_of(loaded.eager, torch.tensor([ids]))[0], rtol=1e-4, atol=1e-4)


def matches_hooks(model: Model, text: str) -> None:
    """Every cell is the hooks', and most of them change what is measured: two backends that do nothing agree too."""
    results = model.compile(text, prompts()).run(check="all", progress=False, write=False)
    changed = [abs(r.values["diff"] - r.baselines["diff"]["clean"]) > 1e-4 for r in results.values()]
    assert sum(changed) > len(changed) // 2


@pytest.mark.parametrize("family", BRIDGED, ids=name)
def test_patches_of_a_bridge_are_those_of_hooks_on_the_plain_model(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folding norms into weights and centring these changes no difference of two logits."""
    plain = first_layer(family.build(family.attention))

    def oracle(_: nn.Module, *args: Any, **more: Any) -> Oracle:
        return Oracle(plain, *args, driver=family.driver, **more)

    monkeypatch.setattr(check, "Oracle", oracle)
    matches_hooks(untraced(bridge(plain, family.bridge is Bridged.COMPATIBLE)), ONE_LAYER)


@pytest.mark.parametrize("family", UNBRIDGED, ids=name)
def test_a_bridge_is_refused_where_the_table_says_so(family: Family) -> None:
    with pytest.raises(patchc.PatchcError) as caught:
        untraced(bridge(first_layer(family.build(family.attention)), False))
    assert caught.value.diagnostics[0].code in ("model-has-hooks", "model-not-understood")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.refused], ids=name)
def test_refused_for_what_it_is(family: Family) -> None:
    with pytest.raises(patchc.PatchcError) as caught:
        untraced(family.build(family.attention))
    (diagnostic,) = caught.value.diagnostics
    assert diagnostic.code == "model-not-understood"
    assert family.refused in diagnostic.message
    assert "\n" not in diagnostic.message


def test_the_readme_has_this_table() -> None:
    """Where it has one: every row of it is a row here, and the other way round."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert table() in text


def test_every_row_is_in_the_table() -> None:
    assert len(table().splitlines()) == 2 + len(FAMILIES)
    assert len({f.name for f in FAMILIES}) == len(FAMILIES)
