"""What metrics read inside a patched run, against brute force: paths that end at a node."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.execute.patterns import PlainRows
from patchc.execute.places import probe_place
from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.dag import Dag
from patchc.ir.experiment import Cell, FromWorld, Itself, Noise, Patch, Probe, Value
from patchc.ir.graph import QKV
from patchc.ir.ops import PATTERN, SCORES
from patchc.ir.paths import Alt, Seq, Site, Star, Step
from patchc.ir.verify import faults
from patchc.lower.fold import Fold, Folded
from tests.drawn import Case, Draw, case
from tests.property.test_unrolling import EPS, plain_runs
from tests.unrolled import Unrolled

ENTRIES = {Site.SCORES: SCORES, Site.PATTERN: PATTERN}
randoms = st.randoms(use_true_random=False)


def fold(c: Case, cell: Cell, *probes: Probe | None) -> tuple[Dag, Folded]:
    dag = Dag(c.graph, c.prompts.layout)
    return dag, Fold(dag, c.prompts, "clean").cell(cell.patches, probes)


def read(c: Case, dag: Dag, folded: Folded, *probes: Probe | None, tokens: int | None = None) -> list[Tensor]:
    """What each probe reads (None: the final stream) at `tokens`, `[token, width]`."""
    stored = Stored(c.toy, c.prompts, "clean", plain_runs(c), {})
    at = c.prompts.layout.all if tokens is None else tokens
    chosen = [t for t in range(c.prompts.layout.n_tokens) if at >> t & 1]
    ends = [(base(c, p)[chosen], at) for p in probes]
    found = Walk(dag, c.toy, c.toy.tables(c.prompts.layout), stored).read([folded.roots], ends)
    return [x[0] for x in found]


def base(c: Case, probe: Probe | None, world: str = "clean") -> Tensor:
    run = plain_runs(c)[world]
    if probe is not None and probe.site in ENTRIES:
        stored = Stored(c.toy, c.prompts, "clean", plain_runs(c), {})
        node, layout = c.graph.members(probe.nodes)[0], c.prompts.layout
        rows = PlainRows(stored, c.toy.tables(layout), node.block, node.layer, node.head)
        return rows.of_world(ENTRIES[probe.site], world, torch.arange(layout.n_tokens), max(layout.lengths))
    return run.stream[-1] if probe is None else probe_place(c.toy, probe).read(run)


def gap(one: Tensor, other: Tensor) -> float:
    """The largest difference; hidden scores are equal."""
    assert torch.equal(one.isinf(), other.isinf())
    return float((one - other).nan_to_num(nan=0.0).abs().max())


def unrolled(c: Case, cell: Cell, probe: Probe) -> Tensor:
    rows = [Unrolled(c.toy, c.prompts, "clean", i).read(cell, probe) for i in range(c.prompts.layout.n_prompts)]
    width, fill = max(x.shape[1] for x in rows), float("-inf") if probe.site is Site.SCORES else 0.0
    return torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in rows])


def drawn(rng: Random) -> tuple[Case, Probe]:
    c = case(rng)
    draw = Draw(rng, c.graph, c.prompts.layout, inside=rng.random() < 0.6)
    draw.probe = draw.any_probe()
    return replace(c, cell=draw.cell()), draw.probe


@settings(max_examples=250, deadline=None)
@given(randoms)
def test_what_is_read_equals_brute_force(rng: Random) -> None:
    c, probe = drawn(rng)
    dag, folded = fold(c, c.cell, None, probe)
    if folded.faults:
        return
    assert list(faults(dag, folded.roots)) == []
    expected, plain = unrolled(c, c.cell, probe), base(c, probe)
    final, got = read(c, dag, folded, None, probe)
    assert gap(got, expected) < EPS
    unchanged = (dag.layout.all & ~dag.changed[folded.roots[1]]).bit_count()
    assert ((expected - plain).nan_to_num(nan=0.0).abs().amax(-1) < EPS).sum() >= unchanged
    logits = torch.cat([Unrolled(c.toy, c.prompts, "clean", i).logits(c.cell) for i in range(c.prompts.n)])
    assert (c.toy.unembed(final) - logits).abs().max() < EPS


@settings(max_examples=60, deadline=None)
@given(randoms)
def test_reading_elsewhere_or_less_changes_nothing(rng: Random) -> None:
    """A probe beside others, at some tokens, with the logits or without."""
    c, probe = drawn(rng)
    other = Draw(rng, c.graph, c.prompts.layout, inside=True).any_probe()
    dag, folded = fold(c, c.cell, probe)
    if folded.faults:
        return
    (alone,) = read(c, dag, folded, probe)
    some = rng.getrandbits(dag.layout.n_tokens) | 1
    both_dag, both = fold(c, c.cell, other, None, probe)
    (_, _, got) = read(c, both_dag, both, other, None, probe, tokens=some)
    assert gap(got, alone[[t for t in range(dag.layout.n_tokens) if some >> t & 1]]) < EPS


def test_the_drawn_probes_see_effects() -> None:
    """Of every kind of place, and of complements too."""
    kinds: dict[str, int] = {}
    for seed in range(700):
        c, probe = drawn(Random(seed))
        dag, folded = fold(c, c.cell, probe)
        if not folded.faults and gap(read(c, dag, folded, probe)[0], base(c, probe)) > 1e-3:
            for name in (probe.site, "complement" if c.cell.patches[0].complement else "set"):
                kinds[name] = kinds.get(name, 0) + 1
    assert len(kinds) == 13, kinds
    assert min(kinds.values()) >= 4, kinds


def everything(c: Case, probe: Probe, value: Value) -> Patch:
    """All paths from the input to the probe."""
    stream = probe.site is Site.STREAM
    end = Step(probe.nodes, QKV, site=Site.STREAM if stream else Site.OUT, rank=probe.rank)
    alone = [Step(probe.nodes & c.graph.input)] if probe.nodes & c.graph.input and not stream else []
    return Patch(Alt((Seq((Step(c.graph.input), Star(Step(c.graph.all)), end)), *alone)), value)


@settings(max_examples=60, deadline=None)
@given(randoms)
def test_all_paths_to_a_probe_patched_is_the_other_world(rng: Random) -> None:
    c = case(rng)
    probe = Draw(rng, c.graph, c.prompts.layout, inside=True).any_probe()
    corrupt = Value(((1.0, FromWorld("corrupt")),))
    nothing = Patch(Seq((Step(0), Step(c.graph.logits_set))), corrupt, complement=True)
    for patch in (everything(c, probe, corrupt), nothing):
        dag, folded = fold(c, Cell((), (patch,)), probe)
        assert gap(read(c, dag, folded, probe)[0], base(c, probe, "corrupt")) < EPS
    whole = replace(everything(c, probe, corrupt), complement=True)
    dag, folded = fold(c, Cell((), (whole,)), probe)
    assert folded.roots == (0,)


@settings(max_examples=40, deadline=None)
@given(randoms)
def test_a_value_put_in_where_it_is_read_is_what_is_read(rng: Random) -> None:
    c = case(rng)
    probe = Draw(rng, c.graph, c.prompts.layout).any_probe()
    start = Step(probe.nodes, site=probe.site, rank=probe.rank)
    noisy = Value(((0.5, FromWorld("other")), (0.5, Itself()), (1.0, Noise(0.5, 1))))
    cell = Cell((), (Patch(start, noisy),))
    dag, folded = fold(c, cell, probe)
    (got,) = read(c, dag, folded, probe)
    mixed = (base(c, probe) + base(c, probe, "other")) / 2
    place, stored = probe_place(c.toy, probe), Stored(c.toy, c.prompts, "clean", plain_runs(c), {})
    noise = stored.replaced(place, Value(((1.0, Noise(0.5, 1)),)), torch.arange(dag.layout.n_tokens), None)
    assert (got - mixed - noise).abs().max() < EPS
    whole = replace(cell.patches[0], complement=True)
    if probe.site is Site.STREAM:
        dag, folded = fold(c, Cell((), (whole,)), probe)
        assert folded.roots == (0,)
