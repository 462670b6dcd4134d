"""Means of groups, of prompts alone and of other data, and metrics that read nodes and answers of several tokens."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from patchc.diagnostics import PatchcError
from patchc.ir.experiment import (
    Called,
    Continuation,
    Mean,
    Metric,
    NodeRead,
    Noise,
    Patch,
    Probe,
    Prompts,
    Sum,
    Value,
    World,
)
from patchc.ir.graph import Kind
from patchc.ir.paths import Alt, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from tests.models import D_VOCAB
from tests.unit.oracle_models import CORRUPT, Fixture, cell, experiment, head, largest_difference, prompts, to_logits


def rows(*lengths: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randint(0, D_VOCAB, (n,), generator=generator).tolist()) for n in lengths)


def followed() -> Prompts:
    """Two prompts of 3 and 2 tokens, twice: followed by one answer's first tokens, and by another's."""
    alone = {"clean": rows(3, 2), "corrupt": rows(3, 2, seed=1)}
    answers = rows(2, 2, 1, 1, seed=2)
    worlds = [
        World(name, tuple((*ids[i % 2], *answer) for i, answer in enumerate(answers))) for name, ids in alone.items()
    ]
    return Prompts(Layout((5, 4, 4, 3)), tuple(worlds), copies=2, own=(3, 2, 3, 2))


EMBED = Probe(1)


def read(f: Fixture, value: Value, probe: Probe = EMBED) -> Tensor:
    return f.oracle.read(experiment(), cell(Patch(Step(probe.nodes, site=probe.site), value)), probe)


def mean_of(mean: Mean) -> Value:
    return Value(((1.0, mean),))


# ---- means


def test_a_groups_mean_is_over_its_own_rows() -> None:
    f = Fixture("native", data=prompts(3, 3, 3, 4))
    base = f.oracle.read(experiment(), cell(), EMBED)
    got = read(f, mean_of(Mean("clean", groups=(0, 1, 0, 1))))
    assert (got[:3] - (base[:3] + base[6:9]) / 2).abs().max() < 1e-6
    assert (got[3:6] - (base[3:6] + base[9:12]) / 2).abs().max() < 1e-6
    assert torch.equal(got[12], base[12])
    over = read(f, mean_of(Mean("clean", True, groups=(0, 1, 0, 1))))
    assert (over[0] - torch.cat([base[:3], base[6:9]]).mean(0)).abs().max() < 1e-6
    assert torch.equal(over[0], over[8])


def test_answers_that_follow_prompts_do_not_change_the_prompts_mean() -> None:
    f = Fixture("native", data=followed())
    base = f.oracle.read(experiment(), cell(), EMBED)
    got = read(f, mean_of(Mean("clean")))
    assert (got[:2] - (base[:2] + base[5:7]) / 2).abs().max() < 1e-6
    assert torch.equal(got[2], base[2])  # the other prompt is over
    assert (got[3:5] - (base[3:5] + base[7:9]) / 2).abs().max() < 1e-6  # so far from the prompts' ends
    assert (got[12] - (base[12] + base[15]) / 2).abs().max() < 1e-6  # the other answer counts by itself
    assert (got[9:12] - got[:3]).abs().max() < 1e-6
    over = read(f, mean_of(Mean("clean", True)))
    assert (over - torch.cat([base[:3], base[5:7]]).mean(0)).abs().max() < 1e-6


def test_noise_is_measured_on_the_prompts_alone() -> None:
    f = Fixture("native", data=followed())
    base = f.oracle.read(experiment(), cell(), EMBED).double()
    absolute, relative = (read(f, Value(((1.0, Noise(1.0, 0, relative)),))) for relative in (False, True))
    std = torch.cat([base[:3], base[5:7]]).std(correction=0)
    assert (relative - std * absolute).abs().max() < 1e-6
    assert torch.equal(absolute[:3], absolute[9:12])  # a copy has the same noise


@pytest.mark.parametrize("site", [Site.OUT, Site.Z, Site.PATTERN, Site.SCORES])
def test_other_data_have_their_own_rows(site: Site) -> None:
    data = prompts(3, 2)
    other = World("abc", rows(4, 5, 3, 4, seed=9), Layout((4, 5, 3, 4)))
    f = Fixture("native", data=Prompts(data.layout, (*data.worlds, other)))
    alone = Fixture("native", data=Prompts(other.layout, (World("clean", other.ids),)))
    node = head(f.graph, 1, 2)
    probe = Probe(node, site)
    theirs = alone.oracle.read(experiment(), cell(), probe)
    by_row = list(theirs.split(other.layout.lengths))
    want = torch.stack([torch.stack([row[p] for row in by_row]).mean(0) for p in range(3)])
    got = read(f, mean_of(Mean("abc")), probe)
    if site in (Site.PATTERN, Site.SCORES):
        got, want = got.nan_to_num(neginf=0.0).tril()[:3, :3], want.nan_to_num(neginf=0.0)[:, :3]
    assert (got[:3] - want).abs().max() < 1e-5
    if site is Site.OUT:
        over = read(f, mean_of(Mean("abc", True)), probe)
        assert (over - theirs.mean(0)).abs().max() < 1e-5


# ---- metrics that read nodes


TENSORS = {key: torch.randn(width, generator=torch.Generator().manual_seed(5)) for key, width in (("d", 32), ("h", 8))}


@cache
def reading(kind: str = "gpt2") -> Fixture:
    return Fixture(kind, data=prompts(4, 5, 4), tensors=TENSORS)


def ends(f: Fixture) -> tuple[int, ...]:
    return tuple(f.data.layout.token(i, -1) for i in range(f.data.n))


def numbers(f: Fixture, metric: Metric, *patches: Patch) -> Tensor:
    return f.oracle.measure(experiment(metric), [cell(*patches)])[metric.name][0]


def test_a_dot_product_is_with_what_the_node_writes() -> None:
    f = reading()
    high, low = head(f.graph, 1, 2), head(f.graph, 0, 1)
    metric = Metric("m", NodeRead(Probe(high), ends(f), key="d"))
    out = f.oracle.read(experiment(), cell(), Probe(high))[list(ends(f))]
    assert numbers(f, metric).tolist() == pytest.approx((out @ TENSORS["d"]).tolist(), abs=1e-5)
    path = Patch(Seq((Step(low), Step(high, ports=1))), CORRUPT)
    assert (numbers(f, metric, path) - numbers(f, metric)).abs().max() > 1e-4


def test_entries_and_neurons_are_read_one_by_one() -> None:
    f = reading()
    layout, high = f.data.layout, head(f.graph, 1, 2)
    mlp = f.graph.node(Kind.MLP, 1)
    assert mlp is not None
    looked_at = tuple(layout.token(i, 1) for i in range(3))
    entry = Metric("entry", NodeRead(Probe(high, Site.PATTERN), ends(f), looked_at))
    neuron = Metric("neuron", NodeRead(Probe(1 << mlp.id, Site.POST), ends(f), neuron=3))
    pattern = f.oracle.read(experiment(), cell(), Probe(high, Site.PATTERN))
    post = f.oracle.read(experiment(), cell(), Probe(1 << mlp.id, Site.POST))
    assert numbers(f, entry).tolist() == pytest.approx([pattern[t, 1].item() for t in ends(f)])
    assert numbers(f, neuron).tolist() == pytest.approx([post[t, 3].item() for t in ends(f)])


def test_a_whole_read_is_the_sum_of_its_writers() -> None:
    f = reading()
    layer = f.graph.blocks[3]
    low = head(f.graph, 0, 1)
    ends_at = Alt((Step(layer.nodes), Step(f.graph.below(3), site=Site.STREAM, rank=3),
                   Step(f.graph.below(4), site=Site.STREAM, rank=4)))  # fmt: skip
    path = Patch(Seq((Step(low), Star(Step(f.graph.all)), ends_at)), CORRUPT)

    def at(probe: Probe) -> Tensor:
        return f.oracle.read(experiment(), cell(path), probe)

    below, above = (at(Probe(f.graph.below(rank), Site.STREAM, rank)) for rank in (3, 4))
    written = at(Probe(layer.nodes, Site.ATTN_OUT))
    assert (above - below - written).abs().max() < 1e-5
    base = f.oracle.read(experiment(), cell(), Probe(layer.nodes, Site.ATTN_OUT))
    assert (written - base).abs().max() > 1e-3


def test_a_node_read_is_normalised_by_its_worlds_own_runs() -> None:
    f = reading()
    high = head(f.graph, 1, 2)
    node = NodeRead(Probe(high, Site.Q), ends(f), key="h")
    of_means, of_ratios = (Metric(str(each), node, "clean", "corrupt", each) for each in (False, True))
    through = Seq((Step(f.graph.input), Star(Step(f.graph.all)), Step(high)))
    whole = Patch(through, CORRUPT)
    assert numbers(f, of_means).mean().item() == pytest.approx(0, abs=1e-5)
    assert numbers(f, of_ratios).tolist() == pytest.approx([0, 0, 0], abs=1e-4)
    assert numbers(f, of_means, whole).mean().item() == pytest.approx(1, abs=1e-4)
    assert numbers(f, of_ratios, whole).tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    raw = [numbers(f, Metric("raw", node), *patches) for patches in ((), (whole,))]
    part = Patch(Seq((Step(f.graph.input), Step(high))), CORRUPT)
    want = (numbers(f, Metric("raw", node), part) - raw[0].mean()) / (raw[1].mean() - raw[0].mean())
    assert numbers(f, of_means, part).tolist() == pytest.approx(want.tolist(), abs=1e-4)


def test_a_path_to_a_node_leaves_the_logits_alone() -> None:
    f = reading()
    low, high = head(f.graph, 0, 1), head(f.graph, 1, 2)
    path = Patch(Seq((Step(low), Star(Step(f.graph.all)), Step(high))), CORRUPT)
    assert largest_difference(f.logits(path), f.logits()) == 0.0
    past = f.oracle.read(experiment(), cell(Patch(to_logits(f.graph, Step(low)), CORRUPT)), Probe(high))
    assert torch.equal(past, f.oracle.read(experiment(), cell(), Probe(high)))


@pytest.mark.parametrize(("key", "message"), [("none", "no tensor 'none'"), ("h", r"must be \[32\]")])
def test_a_metrics_tensor_that_does_not_fit_is_an_error(key: str, message: str) -> None:
    f = reading()
    with pytest.raises(PatchcError, match=message):
        numbers(f, Metric("m", NodeRead(Probe(1), ends(f), key=key)))


# ---- answers of several tokens


def test_an_answer_of_several_tokens_is_read_where_it_stands() -> None:
    data = followed()
    f = Fixture("native", data=data, metrics={"length": lambda logits: torch.full((len(logits),), logits.shape[1])})
    layout, ids = data.layout, data.worlds[0].ids
    answers, tokens = [], []
    for row in range(2):
        answers.append((*ids[row][data.own[row] :], 7))
        tokens.append(tuple(layout.token(row, data.own[row] - 1 + i) for i in range(3)))
    second = Continuation(((8,), (9,)), ((layout.token(2, 2),), (layout.token(3, 1),)))
    first = Continuation(tuple(answers), tuple(tokens))
    metrics = [
        Metric("first", first),
        Metric("both", Sum(((1.0, first), (-1.0, second)))),
        Metric("n", Called("length")),
    ]
    got = f.oracle.measure(experiment(*metrics), [cell()])
    want = []
    for row, logits in enumerate(f.plain("clean")[:2]):
        predicted = logits[data.own[row] - 1 :].log_softmax(-1)
        want.append(sum(predicted[i, answer].item() for i, answer in enumerate(answers[row])))
    assert got["first"].shape == (1, 2)
    assert got["first"][0].tolist() == pytest.approx(want, abs=1e-5)
    other = [x[own - 1].log_softmax(-1) for x, own in zip(f.plain("clean")[2:], data.own, strict=False)]
    assert (got["first"] - got["both"])[0].tolist() == pytest.approx([other[0][8].item(), other[1][9].item()], abs=1e-5)
    assert got["n"][0].tolist() == [3, 2]  # the prompts alone, each once
