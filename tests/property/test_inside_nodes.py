"""Starts inside nodes of traced models: identities between sites, and patterns changed by hand in the model itself."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch as mocked

import pytest
import torch
from torch import Tensor

from patchc.codegen.emit import compiled_graph
from patchc.codegen.saved import load_saved, save_graph
from patchc.ir.bits import bitset
from patchc.ir.dag import Dag
from patchc.ir.experiment import (
    Blocked,
    Cell,
    FromWorld,
    Given,
    Itself,
    Mean,
    Moved,
    Patch,
    Prompts,
    Value,
    World,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.lower.fold import Fold
from patchc.lower.masked import lower_masked
from tests.differential.test_compiled_equals_hooks import compiled, experiment, plain_runs, prompts
from tests.models import MODELS, loaded_model, logits_of

CLOSE = 2e-5
CLEAN, CORRUPT = Value(((1.0, FromWorld("clean")),)), Value(((1.0, FromWorld("corrupt")),))
ZERO, BLOCKED = Value(()), Value(((1.0, Blocked()),))
HALF = Value(((0.3, FromWorld("corrupt")), (0.7, Itself())))
WITH_MLPS = [kind for kind in MODELS if kind != "native-attn-only"]


def start(graph: ResidualGraph, value: Value, step: Step) -> Patch:
    return Patch(Seq((step, Star(Step(graph.all)), Step(graph.logits_set))), value)


def head(graph: ResidualGraph, layer: int, h: int) -> int:
    node = graph.node("head", layer, h)  # type: ignore[arg-type]
    assert node is not None
    return 1 << node.id


def mlp(graph: ResidualGraph, layer: int) -> int:
    node = graph.node("mlp", layer)  # type: ignore[arg-type]
    assert node is not None
    return 1 << node.id


def logits(kind: str, data: Prompts, *cells: tuple[Patch, ...]) -> list[Tensor]:
    with torch.no_grad():
        return compiled(loaded_model(kind), data, experiment([Cell((), c) for c in cells]))


def base(kind: str, data: Prompts) -> Tensor:
    with torch.no_grad():
        return loaded_model(kind).pieces.unembed(plain_runs(loaded_model(kind), data)["clean"].stream[-1])


def near(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < CLOSE)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", [(5,), (4, 6, 4)], ids=["one prompt", "two lengths"])
def test_attention_identities(kind: str, lengths: tuple[int, ...]) -> None:
    """The run's own pattern is no change; q and k of a world are its pattern, and its scores; values of both add up."""
    data, graph = prompts(Random(f"{kind} {lengths}"), lengths), loaded_model(kind).graph
    own, queries, pattern, scores, both, half = logits(
        kind,
        data,
        (start(graph, CLEAN, Step(head(graph, 0, 1), site=Site.PATTERN)),),
        tuple(start(graph, CORRUPT, Step(head(graph, 1, 2), site=site)) for site in (Site.Q, Site.K)),
        (start(graph, CORRUPT, Step(head(graph, 1, 2), site=Site.PATTERN)),),
        (start(graph, CORRUPT, Step(head(graph, 1, 2), site=Site.SCORES)),),
        tuple(start(graph, CORRUPT, Step(head(graph, 1, 2), site=site)) for site in (Site.PATTERN, Site.V)),
        (start(graph, HALF, Step(head(graph, 1, 2), site=Site.PATTERN)),),
    )
    assert torch.equal(own, base(kind, data))
    assert near(queries, pattern)
    assert near(queries, scores)
    (whole,) = logits(kind, data, (start(graph, CORRUPT, Step(head(graph, 1, 2))),))
    assert near(both, whole)
    assert not near(pattern, base(kind, data))
    assert not near(half, pattern)


@pytest.mark.parametrize("kind", WITH_MLPS)
@pytest.mark.parametrize("lengths", [(5,), (4, 6, 4)], ids=["one prompt", "two lengths"])
def test_mlp_identities(kind: str, lengths: tuple[int, ...]) -> None:
    """An MLP's input, its neurons and its output in another world are one thing; neurons add up but for a norm."""
    data, graph = prompts(Random(f"{kind} {lengths}"), lengths), loaded_model(kind).graph
    tokens = bitset([0, 2, 3])
    upper = -1 << graph.d_mlp // 3
    below = start(graph, CORRUPT, Step(head(graph, 0, 0)))  # so that what the MLP reads has changed
    for also in ((), (below,)):
        sites = [
            (*also, start(graph, CORRUPT, Step(mlp(graph, 1), site=site, tokens=tokens)))
            for site in (Site.OUT, Site.IN, Site.POST)
        ]
        halves = tuple(
            start(graph, CORRUPT, Step(mlp(graph, 1), site=Site.POST, tokens=tokens, neurons=n))
            for n in (upper, ~upper)
        )
        blend = start(graph, HALF, Step(mlp(graph, 1), tokens=tokens))
        blended = start(graph, HALF, Step(mlp(graph, 1), site=Site.POST, tokens=tokens))
        out, read, post, parts, half, halved = logits(
            kind, data, *sites, (*also, *halves), (*also, blend), (*also, blended)
        )
        assert near(out, read)
        assert near(out, post)
        assert near(out, parts)
        adds_up = all(b.neurons_add_up for b in graph.blocks)  # no norm after the MLP: half of each is half of all
        assert near(half, halved) == adds_up
        assert not near(out, half)
        assert not near(out, base(kind, data))


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "native-rms-rotary"])
def test_input_is_read_by_the_mlp_alone(kind: str) -> None:
    """A blend at the input, whole: the MLP on the blended stream, the stream itself untouched."""
    m, data = loaded_model(kind), prompts(Random(kind), (5, 4))
    graph, runs = m.graph, plain_runs(m, data)
    block = graph.blocks[-1]
    (got,) = logits(kind, data, (start(graph, HALF, Step(mlp(graph, 1), site=Site.IN)),))
    with torch.no_grad():
        x = 0.3 * runs["corrupt"].stream[block.rank] + 0.7 * runs["clean"].stream[block.rank]
        want = m.pieces.unembed(runs["clean"].stream[block.rank] + m.pieces.mlp(1, x))
    assert near(got, want)
    assert not near(want, base(kind, data))


# ---- by hand: the model's own attention with its pattern changed


@contextmanager
def tampered(layer: int, change: Callable[[Tensor], Tensor]) -> Generator[None]:
    """The model's attention with `change` done to its scores `[prompt, head, query, key]` in one layer, which gives the
    pattern."""
    calls = 0

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **more: Any) -> Tensor:
        times = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        scores = q @ k.transpose(-1, -2) * (more.get("scale") or q.shape[-1] ** -0.5)
        n = scores.shape[-1]
        shown = torch.ones(n, n, dtype=torch.bool).tril() if attn_mask is None else attn_mask
        return softmax(scores.masked_fill(~shown, float("-inf")), -1) @ v

    def softmax(x: Tensor, *_: Any, **__: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return change(x) if calls == layer + 1 else x.exp() / x.exp().sum(-1, keepdim=True)

    functional = "torch.nn.functional"
    with (
        mocked(f"{functional}.scaled_dot_product_attention", attend),
        mocked(f"{functional}.softmax", softmax),
        mocked("torch.softmax", softmax),
    ):
        yield
    assert calls == 2


def by_hand(kind: str, data: Prompts, layer: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits `[token, d_vocab]` of the clean prompts, one by one."""
    return torch.cat([run_by_hand(kind, ids, layer, change) for ids in data.worlds[0].ids])


def run_by_hand(kind: str, ids: Sequence[int], layer: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    with tampered(layer, change):
        return logits_of(loaded_model(kind).eager, torch.tensor([ids]))[0]


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_a_column_of_the_pattern_is_zeroed(kind: str, layer: int) -> None:
    data, graph = prompts(Random(kind), (5, 7)), loaded_model(kind).graph
    column = bitset(data.layout.token(p, 2) for p in range(2))

    def zeroed(scores: Tensor) -> Tensor:
        pattern = scores.softmax(-1)
        pattern[:, 1, :, 2] = 0
        return pattern

    step = Step(head(graph, layer, 1), site=Site.PATTERN, sources=column)
    (got,) = logits(kind, data, (start(graph, ZERO, step),))
    want = by_hand(kind, data, layer, zeroed)
    assert near(got, want)
    assert not near(got, base(kind, data))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", MODELS)
def test_blocked_entries_leave_the_rest_renormalised(kind: str, layer: int) -> None:
    data, graph = prompts(Random(kind), (5, 7)), loaded_model(kind).graph
    ask, look = (bitset(data.layout.token(p, at) for p in range(2) for at in places) for places in ((3, 4), (1, 4)))

    def blocked(scores: Tensor) -> Tensor:
        pattern = scores.softmax(-1)
        for t, s in ((3, 1), (4, 1), (4, 4)):
            pattern[:, 1:3, t, s] = 0
        return pattern / pattern.sum(-1, keepdim=True)

    two = head(graph, layer, 1) | head(graph, layer, 2)
    (got,) = logits(kind, data, (start(graph, BLOCKED, Step(two, site=Site.SCORES, tokens=ask, sources=look)),))
    assert near(got, by_hand(kind, data, layer, blocked))


def test_scores_of_zero_are_even_attention_to_what_is_visible() -> None:
    data, graph = prompts(Random(0), (5, 4)), loaded_model("gpt2-eager").graph

    def even(scores: Tensor) -> Tensor:
        pattern, n = scores.softmax(-1), scores.shape[-1]
        pattern[:, 1] = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
        return pattern

    (got,) = logits("gpt2-eager", data, (start(graph, ZERO, Step(head(graph, 1, 1), site=Site.SCORES)),))
    assert near(got, by_hand("gpt2-eager", data, 1, even))


def test_a_row_in_which_everything_is_blocked_attends_to_nothing() -> None:
    data, graph = prompts(Random(0), (5, 4)), loaded_model("llama-sdpa").graph
    row = bitset(data.layout.token(p, 3) for p in range(2))
    blocked, zeroed = logits(
        "llama-sdpa",
        data,
        (start(graph, BLOCKED, Step(head(graph, 0, 1), site=Site.SCORES, tokens=row)),),
        (start(graph, ZERO, Step(head(graph, 0, 1), site=Site.PATTERN, tokens=row)),),
    )
    assert bool(blocked.isfinite().all())
    assert torch.equal(blocked, zeroed)


@pytest.mark.parametrize("kind", ["gpt2-eager", "llama-sdpa"])
def test_values_of_rows(kind: str) -> None:
    """A mean is over the prompts that have the position; a moved row keeps its entries' positions."""
    data, graph = prompts(Random(kind), (5, 7, 5)), loaded_model(kind).graph
    offsets, seen = data.layout.offsets, list[Tensor]()

    def note(scores: Tensor) -> Tensor:
        seen.append(scores.softmax(-1))
        return seen[-1]

    for ids in data.worlds[1].ids:
        run_by_hand(kind, ids, 1, note)
    longest = max(data.layout.lengths)
    padded = torch.stack([torch.nn.functional.pad(p[0, 1], (0, longest - p.shape[-1]) * 2) for p in seen])
    count = torch.tensor([sum(n > t for n in data.layout.lengths) for t in range(longest)])
    mean = padded.sum(0) / count[:, None]

    def put(value: Tensor) -> Callable[[Tensor], Tensor]:
        def change(scores: Tensor) -> Tensor:
            pattern, n = scores.softmax(-1), scores.shape[-1]
            pattern[:, 1] = value[:n, :n].tril()
            return pattern

        return change

    swapped = tuple(t - offsets[p] + offsets[{0: 2, 2: 0}.get(p, p)] for p, n in enumerate(data.layout.lengths)
                    for t in range(offsets[p], offsets[p] + n))  # fmt: skip
    step = Step(head(graph, 1, 1), site=Site.PATTERN)
    moved = Value(((1.0, Moved(FromWorld("corrupt"), swapped)),))
    averaged, resampled = logits(
        kind, data, (start(graph, Value(((1.0, Mean("corrupt")),)), step),), (start(graph, moved, step),)
    )
    assert near(averaged, by_hand(kind, data, 1, put(mean)))
    want = [by_hand(kind, only(data, p), 1, put(padded[q])) for p, q in ((0, 2), (1, 1), (2, 0))]
    assert near(resampled, torch.cat(want))


def only(data: Prompts, prompt: int) -> Prompts:
    worlds = tuple(World(w.name, (w.ids[prompt],)) for w in data.worlds)
    return Prompts(Layout((data.layout.lengths[prompt],)), worlds)


# ---- what provably changes nothing, and what two patches cannot do


def test_what_changes_nothing_is_known() -> None:
    m = loaded_model("gpt2-sdpa")
    clean = ((1, 2, 3, 4, 5),)
    data = Prompts(Layout((5,)), (World("clean", clean), World("corrupt", ((1, 2, 9, 4, 5),))))
    graph = m.graph
    ahead = Step(head(graph, 1, 0), site=Site.PATTERN, tokens=bitset([1, 2]), sources=bitset([3, 4]))
    before = Step(head(graph, 1, 0), site=Site.SCORES, tokens=bitset([0, 1]))
    post = Step(mlp(graph, 0), site=Site.POST, tokens=bitset([0, 1]), neurons=1)

    for value, step in ((ZERO, ahead), (CORRUPT, before), (CORRUPT, post), (CLEAN, Step(1 << 3, site=Site.PATTERN))):
        folded = Fold(Dag(graph, data.layout), data, "clean").cell((start(graph, value, step),))
        assert folded.root == 0, step
        assert not folded.biting


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        (Step(0b1000, site=Site.PATTERN), Step(0b1000, site=Site.PATTERN), True),
        (Step(0b1000, site=Site.PATTERN, sources=1), Step(0b1000, site=Site.PATTERN, sources=2), False),
        (Step(0b1000, site=Site.PATTERN, tokens=1), Step(0b1000, site=Site.PATTERN, tokens=2), False),
        (Step(0b1000, site=Site.PATTERN), Step(0b1000, site=Site.SCORES), False),
        (Step(0b1000, site=Site.SCORES), Step(0b1000, site=Site.SCORES), True),
    ],
)
def test_two_values_at_one_entry_are_refused(one: Step, other: Step, clash: bool) -> None:

    m, data = loaded_model("gpt2-sdpa"), prompts(Random(0), (4,))
    cell = (start(m.graph, ZERO, one), start(m.graph, CORRUPT, other))
    faults = Fold(Dag(m.graph, data.layout), data, "clean").cell(cell).faults
    assert [f.code for f in faults] == ["two-values"] * clash


def test_two_values_at_one_neuron_are_refused() -> None:

    m, data = loaded_model("gpt2-sdpa"), prompts(Random(0), (4,))
    for neurons, codes in ((0b110, ["two-values"]), (0b101, [])):
        steps = (Step(mlp(m.graph, 0), site=Site.POST, neurons=n) for n in (0b010, neurons))
        cell = tuple(start(m.graph, v, s) for v, s in zip((ZERO, CORRUPT), steps, strict=True))
        assert [f.code for f in Fold(Dag(m.graph, data.layout), data, "clean").cell(cell).faults] == codes


# ---- the compiled graph


def cells_of(graph: ResidualGraph, data: Prompts) -> list[Cell]:
    layout = data.layout
    places = [bitset(layout.token(p, at) for p in range(layout.n_prompts)) for at in range(layout.lengths[0])]
    steps = [
        (ZERO, Step(head(graph, 0, 1), site=Site.PATTERN, sources=places[1])),
        (CORRUPT, Step(head(graph, 1, 2), site=Site.PATTERN, tokens=places[3] | places[4])),
        (HALF, Step(head(graph, 1, 0) | head(graph, 1, 3), site=Site.SCORES)),
        (Value(((1.0, Mean("corrupt")),)), Step(head(graph, 0, 2), site=Site.PATTERN)),
        (BLOCKED, Step(head(graph, 0, 1) | head(graph, 1, 1), site=Site.SCORES, sources=places[0] | places[1])),
    ]
    if graph.mlps:
        steps += [
            (CORRUPT, Step(mlp(graph, 0), site=Site.POST, tokens=places[2], neurons=0b1011)),
            (HALF, Step(mlp(graph, 1), site=Site.POST)),
            (HALF, Step(mlp(graph, 0), site=Site.IN, tokens=places[1])),
            (Value(((0.5, Given("post")), (0.5, Itself()))), Step(mlp(graph, 0), site=Site.POST, tokens=places[2])),
        ]
    return [Cell((), (start(graph, value, step),)) for value, step in steps]


@pytest.mark.parametrize("kind", MODELS)
def test_graph_equals_sweep(kind: str) -> None:
    m, data = loaded_model(kind), prompts(Random(kind), (5, 5))
    e, tensors = experiment(cells_of(m.graph, data)), {"post": torch.linspace(-1, 1, max(m.graph.d_mlp, 1))}
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), tensors)
    ids = [torch.tensor(w.ids) for w in data.worlds[:2]]
    with torch.no_grad():
        for i, want in enumerate(compiled(m, data, e, tensors)):
            masks = torch.zeros(len(e.cells))
            masks[i] = 1
            assert near(graph(*ids, masks)[0].flatten(0, 1), want), e.cells[i]
            assert not near(want, base(kind, data))
        assert near(graph(*ids, torch.zeros(len(e.cells)))[0].flatten(0, 1), base(kind, data))
    for at in (0.0, 0.5, 1.0):
        masks = torch.full((len(e.cells),), at, requires_grad=True)
        (gradient,) = torch.autograd.grad(graph(*ids, masks)[0][:, -1, 3].sum(), masks)
        assert bool(gradient.isfinite().all())
        assert at == 1 or bool((gradient.abs() > 1e-7).all())  # what is blocked already cannot be set to zero


@pytest.mark.parametrize("kind", ["gpt2-sdpa", "gpt2-eager", "llama-eager", "native-rms-rotary", "neox-parallel"])
def test_a_graph_with_insides_can_be_saved(tmp_path: Path, kind: str) -> None:
    m, data = loaded_model(kind), prompts(Random(kind), (5, 5))
    e, tensors = experiment(cells_of(m.graph, data)), {"post": torch.linspace(-1, 1, m.graph.d_mlp)}
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean", "corrupt"), tensors)
    again = load_saved(save_graph(graph, tmp_path / "graph", m), m)
    args = *(torch.tensor(w.ids) for w in data.worlds[:2]), torch.linspace(0, 1, len(e.cells))
    with torch.no_grad():
        assert torch.equal(again(*args)[0], graph(*args)[0])


def test_everything_blocked_in_the_graph_is_no_attention() -> None:
    m, data = loaded_model("gpt2-sdpa"), prompts(Random(1), (4, 4))
    step = Step(head(m.graph, 1, 1), site=Site.SCORES)
    e = experiment([Cell((), (start(m.graph, BLOCKED, step),))])
    graph = compiled_graph(lower_masked(e, data, m.graph), m.pieces, ("clean",), {})
    (want,) = logits("gpt2-sdpa", data, e.cells[0].patches)
    with torch.no_grad():
        assert near(graph(torch.tensor(data.worlds[0].ids), torch.ones(1))[0].flatten(0, 1), want)
