"""Whatever is lowered is sound, and the verifier sees what is not."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchc.ir.dag import Dag
from patchc.ir.experiment import Value
from patchc.ir.graph import residual_graph
from patchc.ir.ops import Const, Core, Mix, Op, Out, PostNorm, Run, Sum, Tokenwise
from patchc.ir.tokens import Layout
from patchc.ir.verify import faults
from patchc.lower.fold import Fold
from tests.drawn import case

GRAPH = residual_graph("tiny", n_layers=1, n_heads=2, d_model=4, d_head=2, d_vocab=5, has_pos_embed=False)
ATTENTION, MLP = 1, 2


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False))
def test_what_is_lowered_is_sound(rng: Random) -> None:
    c = case(rng)
    dag = Dag(c.graph, c.prompts.layout)
    folded = Fold(dag, c.prompts, "clean").cell(c.cell.patches)
    assert list(faults(dag, [folded.root])) == []
    assert list(faults(dag, [dag.explicit(folded.root)])) == []


@pytest.mark.parametrize(
    ("op", "changed", "rule"),
    [
        (Sum((1, 9)), 0b11, "reads-an-earlier-variant"),
        (Sum((1, 2)), 0b11, "z-is-read-by-out-alone"),
        (Out(1, 1), 0b11, "z-is-read-by-out-alone"),
        (Tokenwise(MLP, 3), 0b11, "a-run-ends-at-the-logits"),
        (Tokenwise(MLP, 1), 0, "changes-some-token"),
        (Const(ATTENTION, 1, 0, 0b01), 0b11, "is-stored-where-it-differs"),
        (Const(ATTENTION, 0b1000, 0, 0b11), 0b11, "names-what-there-is"),
        (Core(MLP, 1, 1, 1), 0b11, "runs-a-block-of-its-kind"),
        (PostNorm(ATTENTION, 1), 0b11, "runs-a-block-of-its-kind"),
        (Out(2, 0b100), 0b11, "names-what-there-is"),
        (Sum((1,)), 0b11, "is-in-normal-form"),
        (Mix(((0b01, 1), (0b11, 4))), 0b11, "mixes-disjoint-tokens"),
        (Mix(((0b100, 1),)), 0b11, "is-in-normal-form"),
    ],
)
def test_a_broken_rule_is_seen(op: Op, changed: int, rule: str) -> None:
    dag = Dag(GRAPH, Layout((2,)))
    dag.const(ATTENTION, 1, Value(()), 0b11)
    dag.core(ATTENTION, 1, 1, 1)
    dag.make(Run(2, 1), 0b11, 2)
    dag.const(ATTENTION, 2, Value(()), 0b11)
    assert list(faults(dag, [1])) == []
    dag.ops.append(op)
    dag.changed.append(changed)
    dag.low.append(0)
    assert [f.rule for f in faults(dag, [])] == [rule]


def test_a_root_is_a_stream() -> None:
    dag = Dag(GRAPH, Layout((2,)))
    dag.const(ATTENTION, 1, Value(()), 0b11)
    core = dag.core(ATTENTION, 1, 1, 1)
    assert [f.rule for f in faults(dag, [core])] == ["root-is-a-stream"]
