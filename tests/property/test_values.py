"""Values that are no world's own, on random small networks: what they are by definition, and what must be the same."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.execute.base import PlainRun, run_world
from patchc.execute.indices import CPU, rows
from patchc.execute.noise import prompt_noise
from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.dag import Dag
from patchc.ir.experiment import Cell, FromWorld, Itself, Mean, Moved, Noise, Patch, Prompts, Value, World
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.lower.fold import Fold
from tests.drawn import data
from tests.toy import Toy, graph_of

EPS = 1e-9  # float64
quick = settings(max_examples=5, deadline=None)
randoms = st.randoms(use_true_random=False)

GRAPH = graph_of([("attention", 1), ("mlp", 2), ("attention", 3), ("mlp", 4)], 2, True, True, True)
TOY = Toy(GRAPH, 7)
HEAD, MLP = GRAPH.members(GRAPH.heads)[1], GRAPH.members(GRAPH.mlps)[0]
SITES = {
    "embed": (Step(0b11), ["embed", "pos_embed"], 6),
    "head": (Step(GRAPH.heads & GRAPH.blocks[1].nodes), ["head[0, 0]", "head[0, 1]"], 6),
    "z": (Step(1 << HEAD.id, site=Site.Z), ["head[0, 1].z"], 2),
    "q": (Step(1 << HEAD.id, site=Site.Q), ["head[0, 1].q"], 2),
    "k": (Step(1 << HEAD.id, site=Site.K), ["head[0, 1].k"], 2),
    "v": (Step(1 << HEAD.id, site=Site.V), ["head[0, 1].v"], 2),
    "mlp": (Step(1 << MLP.id), ["mlp[1]"], 6),
    "attn_out": (Step(GRAPH.blocks[3].nodes, site=Site.ATTN_OUT), ["attn_out[2]"], 6),
    "stream": (Step(GRAPH.below(3), site=Site.STREAM, rank=3), ["stream[3]"], 6),
}
"""Starts, with the places at which each has noise of its own, and their width."""
NOISE = Noise(0.7, seed=3)


def runs_of(prompts: Prompts) -> dict[str, PlainRun]:
    def run(world: World) -> PlainRun:
        layout = world.layout or prompts.layout
        return run_world(TOY, world, layout, TOY.tables(layout))

    return {world.name: run(world) for world in prompts.worlds}


def streams(prompts: Prompts, site: str, value: Value, graph: ResidualGraph = GRAPH) -> Tensor:
    """The final stream `[token, d_model]` of a patch of everything that reads the site."""
    patch = Patch(Seq((SITES[site][0], Star(Step(graph.all)), Step(graph.logits_set))), value)
    dag = Dag(graph, prompts.layout)
    folded = Fold(dag, prompts, "clean").cell(Cell((), (patch,)).patches)
    stored = Stored(TOY, prompts, "clean", runs_of(prompts), {})
    (out,) = Walk(dag, TOY, TOY.tables(prompts.layout), stored, prompts.layout.all).streams([folded.root])
    return out


def drawn(rng: Random, lengths: tuple[int, ...] = (3, 2, 3)) -> Prompts:
    return data(rng, Layout(lengths))


def one(source: FromWorld | Mean | Moved | Noise) -> Value:
    return Value(((1.0, source),))


def assert_same(prompts: Prompts, site: str, a: Value, b: Value) -> None:
    assert (streams(prompts, site, a) - streams(prompts, site, b)).abs().max() < EPS


@pytest.mark.parametrize("site", SITES)
@quick
@given(randoms)
def test_the_same_value_said_otherwise(site: str, rng: Random) -> None:
    prompts = drawn(rng)
    corrupt, mean, n = FromWorld("corrupt"), Mean("corrupt"), prompts.layout.n_tokens
    everywhere = Mean("corrupt", over_positions=True)
    assert_same(prompts, site, one(Moved(corrupt, tuple(range(n)))), one(corrupt))
    assert_same(prompts, site, one(Moved(everywhere, tuple(rng.randrange(n) for _ in range(n)))), one(everywhere))
    assert_same(prompts, site, one(Mean("corrupt", groups=(4, 4, 4))), one(mean))
    own_data = World("file", prompts.world("corrupt").ids, prompts.layout)
    both = replace(prompts, worlds=(*prompts.worlds, own_data))
    assert_same(both, site, one(Mean("file")), one(mean))
    assert_same(both, site, one(Mean("file", over_positions=True)), one(everywhere))


@pytest.mark.parametrize("site", SITES)
@quick
@given(randoms)
def test_a_group_is_a_study_of_its_own(site: str, rng: Random) -> None:
    prompts = drawn(rng)
    some = [0, 2]
    alone = Prompts(
        Layout(tuple(prompts.layout.lengths[i] for i in some)),
        tuple(World(w.name, tuple(w.ids[i] for i in some)) for w in prompts.worlds),
    )
    for over in (False, True):
        grouped = streams(prompts, site, one(Mean("corrupt", over, (1, 0, 1))))
        mine = sum(prompts.layout.prompt(i) for i in some)
        assert (grouped[rows(mine, CPU)] - streams(alone, site, one(Mean("corrupt", over)))).abs().max() < EPS


@pytest.mark.parametrize("site", SITES)
@quick
@given(randoms)
def test_moved_tokens_of_one_prompt_are_another_prompt(site: str, rng: Random) -> None:
    """Every token of one prompt from another of its length: as if the other stood there."""
    prompts = drawn(rng)
    ids = prompts.world("corrupt").ids
    swapped = replace(prompts, worlds=(*prompts.worlds, World("swapped", (ids[2], ids[1], ids[0]))))
    tokens = (5, 6, 7, 3, 4, 0, 1, 2)
    assert_same(swapped, site, one(Moved(FromWorld("corrupt"), tokens)), one(FromWorld("swapped")))


@pytest.mark.parametrize("site", SITES)
@quick
@given(randoms)
def test_noise_does_not_depend_on_the_other_prompts(site: str, rng: Random) -> None:
    prompts = drawn(rng)
    alone = Prompts(Layout((3,)), tuple(World(w.name, w.ids[:1]) for w in prompts.worlds))
    noisy = Value(((1.0, Itself()), (1.0, NOISE)))
    together = streams(prompts, site, noisy)
    assert (together[:3] - streams(alone, site, noisy)).abs().max() < EPS
    assert (together - runs_of(prompts)["clean"].stream[-1]).abs().max() > 1e-9


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("relative", [False, True])
def test_noise_is_the_numbers_of_its_places(site: str, relative: bool) -> None:
    """By what is stored: the value with noise less the value without is the noise of each place, added up."""
    prompts = drawn(Random(0))
    step, places, width = SITES[site]
    noise = replace(NOISE, relative=relative)
    runs = runs_of(prompts)
    stored = Stored(TOY, prompts, "clean", runs, {})
    at, block = rows(prompts.layout.all, CPU), GRAPH.members(step.nodes)[-1].block
    members = step.nodes >> GRAPH.blocks[block].first
    clean = Value(((1.0, FromWorld("clean")),))
    noisy = Value((*clean.terms, (2.0, noise)))

    def numbers(place: str, site_numbers: Tensor) -> Tensor:
        scale = noise.std * (site_numbers.std(correction=0) if relative else 1.0)
        parts = [prompt_noise(noise, place, i, n, width) for i, n in enumerate(prompts.layout.lengths)]
        return 2.0 * scale * torch.cat([torch.from_numpy(p) for p in parts])

    attention, base = runs["clean"].attention, runs["clean"]
    match site:
        case "embed":
            got = stored.node(0, members, noisy, at)
            want = sum(numbers(p, x) for p, x in zip(places, base.embed, strict=True))
        case "head":
            got = stored.node(block, members, noisy, at)
            written = [TOY.write(0, attention[1].z[:, [h]], [h]) for h in range(2)]
            want = sum(numbers(p, x) for p, x in zip(places, written, strict=True))
        case "z":
            got = stored.node(block, 0b10, noisy, at, Site.Z)
            want = TOY.write(0, numbers(places[0], attention[1].z[:, 1])[:, None], [1])
        case "q" | "k" | "v":
            port = "qkv".index(site)
            own = attention[1].raw[port][:, 1]
            got = stored.projection(block, port, 1, Value(((1.0, Itself()), (2.0, noise))), at, own) - own
            want = numbers(places[0], own)
        case "mlp":
            got, want = stored.node(block, 1, noisy, at), numbers(places[0], base.mlp[2])
        case "attn_out":
            got = stored.node(block, members, noisy, at, Site.ATTN_OUT)
            want = numbers(places[0], TOY.write(2, attention[3].z) + TOY.ob[2])
        case _:
            got, want = stored.stream(3, noisy, at), numbers(places[0], base.stream[3])
    assert (got - want).abs().max() < EPS


def test_answers_that_follow_are_averaged_among_themselves() -> None:
    """Two prompts of 2 and 1 tokens, followed by 1 and 2 tokens of an answer."""
    ids = ((1, 2, 3), (4, 5, 6))
    prompts = Prompts(Layout((3, 3)), (World("clean", ids), World("corrupt", ids)), own=(2, 1))
    stored = Stored(TOY, prompts, "clean", runs_of(prompts), {})
    embed = runs_of(prompts)["clean"].embed[0]

    def mean(over_positions: bool) -> Tensor:
        value = one(Mean("corrupt", over_positions))
        return stored.node(0, 1, value, rows(prompts.layout.all, CPU)) + embed

    first, follows = embed[[0, 3]].mean(0), embed[[2, 4]].mean(0)
    assert (mean(False) - torch.stack([first, embed[1], follows, first, follows, embed[5]])).abs().max() < EPS
    assert (mean(True) - embed[[0, 1, 3]].mean(0)).abs().max() < EPS


def test_copies_of_a_prompt_have_one_noise() -> None:
    ids = ((1, 2), (3, 4), (1, 2), (3, 4))
    prompts = Prompts(Layout((2, 2, 2, 2)), (World("clean", ids),), copies=2)
    out = streams(prompts, "mlp", Value(((1.0, Itself()), (1.0, NOISE))))
    assert torch.equal(out[:4], out[4:])
    assert not torch.equal(out[:2], out[2:4])
