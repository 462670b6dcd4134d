"""What a plan says is what runs: the token rows planned for each block are the rows that its pieces are given."""

from __future__ import annotations

from collections import Counter
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from patchc.execute.stored import Stored
from patchc.execute.walk import Walk
from patchc.ir.dag import Dag
from patchc.ir.experiment import Patch
from patchc.ir.paths import Seq, Star, Step
from patchc.lower.fold import Fold
from patchc.optimise.course import Courses
from patchc.optimise.demand import demand
from patchc.optimise.rows import Rows, reachable
from tests.drawn import VALUES, Case, case
from tests.property.test_unrolling import plain_runs
from tests.toy import Toy


class Counting(Toy):
    """A network that counts the rows its MLPs are given, by layer."""

    rows: Counter[int]

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        self.rows[layer] += len(x)
        return super().mlp(layer, x)


def run_rows(c: Case, dag: Dag, root: int, measured: int) -> Counter[int]:
    toy = Counting(c.graph, c.toy.seed)
    toy.rows = Counter()
    stored = Stored(toy, c.prompts, "clean", plain_runs(c), {})
    Walk(dag, toy, toy.tables(c.prompts.layout), stored, measured).streams([root])
    return toy.rows


def node_patch(rng: Random, c: Case) -> Patch:
    node = Step(1 << rng.randrange(len(c.graph.nodes) - 1))
    return Patch(Seq((node, Star(Step(c.graph.all)), Step(c.graph.logits_set))), VALUES[1])


@settings(max_examples=80, deadline=None)
@given(st.randoms(use_true_random=False))
def test_planned_rows_are_the_rows_that_run(rng: Random) -> None:
    c = case(rng)
    dag = Dag(c.graph, c.prompts.layout)
    patches = c.cell.patches if rng.random() < 0.4 else (node_patch(rng, c),)  # which end in a run of the plain model
    folded = Fold(dag, c.prompts, "clean").cell(patches)
    measured = rng.getrandbits(c.prompts.layout.n_tokens) & dag.changed[folded.root]
    if folded.faults or not measured:
        return
    rows, needs = [0] * len(c.graph.blocks), demand(dag, [(folded.root, measured)])
    Rows(Courses(dag)).add(rows, needs, reachable(dag, needs, folded.roots, set()))
    planned = {b.layer: rows[i] for i, b in enumerate(c.graph.blocks) if b.kind == "mlp" and rows[i]}
    assert planned == dict(run_rows(c, dag, folded.root, measured))
