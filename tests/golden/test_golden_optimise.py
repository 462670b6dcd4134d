"""What each pass of the optimiser does: tests/golden/optimise/*.test, a file a pass.

[before] is the program as it comes to the pass, [after] what it gives, `unchanged` where that reads the same, and
[remark] what a plan says of it in the end. For passes that rewrite DAGs these are the DAGs, and `lower` has kept every
law but the pass's own; for others what is computed of [dag], and in which passes. The model and the data are those of
`test_golden_lower`; a pass of cells may hold 4,600 bytes, of which a plain run takes 3,072.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Case, Golden, cases
from test_golden_lower import GRAPH, tokenizer

from patchc.diagnostics import Source
from patchc.ir.bits import bits
from patchc.ir.dag_text import dag_text, positions
from patchc.ir.laws import ALL_LAWS
from patchc.ir.ops import Const, Core, Mix, Op, Scale, Stream, Sum
from patchc.ir.program import Program
from patchc.lower import lower
from patchc.optimise import naive, optimise, reads
from patchc.optimise.contract import OptimiserPass
from patchc.optimise.demand import demand
from patchc.optimise.passes import PASSES, remarks
from patchc.parse import parse
from patchc.resolve import resolve

BUDGET = 4600
SPEC = """
model "tiny"
data { clean "The cat sat on" corrupt "The dog sat on" other "The dog cat on" answer " mat" at noun 1 at end -1 }
experiment e {
  LINES
}
"""


@pytest.mark.parametrize("case", cases("optimise"), ids=str)
def test_pass(case: Case, golden: Golden) -> None:
    (chosen,) = (p for p in PASSES if p.name.replace(" ", "_") == case.file.stem)
    golden(case, applied(chosen, case.input))


def test_every_pass_has_cases() -> None:
    assert {case.file.stem for case in cases("optimise")} == {p.name.replace(" ", "_") for p in PASSES}


def applied(chosen: OptimiserPass, lines: str) -> dict[str, str]:
    source = Source("a.patch", SPEC.replace("LINES", lines.strip().replace("\n", "\n  ")))
    study = resolve(parse(source), source, GRAPH, tokenizer, base=Path()).study
    (experiment,) = study.experiments
    ends = reads.ends(experiment.metrics, study.prompts)
    lowered = lower(experiment, study.prompts, GRAPH, ends, laws=ALL_LAWS & ~chosen.law)
    program = naive(experiment, study.prompts, lowered, ends, BUDGET, 4)
    for p in PASSES[: PASSES.index(chosen)]:
        program = p.apply(program)
    after = chosen.apply(program)
    text = dags if chosen.law else computed
    (remark,) = (r for r in remarks(whole(program)) if r.optimisation == chosen.name)
    return {
        **({} if chosen.law else {"dag": dags(program)}),
        "before": text(program),
        "after": "unchanged" if text(after) == text(program) else text(after),
        "remark": f"{'used' if remark.used else 'not used'}: {remark.text}",
    }


def whole(program: Program) -> Program:
    """The same experiment by all passes."""
    lowered = lower(program.experiment, program.prompts, GRAPH, program.ends)
    return optimise(program.experiment, program.prompts, lowered, program.ends, BUDGET, 4)


def dags(program: Program) -> str:
    return dag_text(program.dag, [root for roots in program.roots for root in roots])


def computed(program: Program) -> str:
    """What is computed of the DAG, in products of how many rows, what is unembedded, and which cells run together."""
    lines = [*variants(program)]
    lines.append(f"products of {program.schedule.rows} rows" if program.schedule.rows else "a product a variant")
    if program.measured:
        columns = "every column" if program.columns is None else f"columns {', '.join(map(str, program.columns))}"
        lines.append(f"unembed {columns} @ {positions(program.dag, program.measured)}")
    for work in program.passes:
        rows = f", rows by block {work.rows[1:]}" if any(work.rows) else ""
        lines.append(f"pass of cells {', '.join(map(str, work.cells))}{rows}")
    if program.no_effect:
        lines.append(f"without effect {', '.join(map(str, program.no_effect))}")
    return "\n".join(lines)


def variants(program: Program) -> Iterator[str]:
    schedule, dag = program.schedule, program.dag
    needs = demand(dag, program.reads(program.live), schedule)
    for i, op in enumerate(dag.ops):
        if needs.tokens[i] and not isinstance(op, Const | Stream | Sum | Mix | Scale):
            heads = f" heads {', '.join(map(str, bits(needs.heads[i])))}" if isinstance(op, Core) else ""
            taken = " from the base run" if schedule.deltas and is_plain(op) else ""
            yield f"compute v{i}{heads}{taken} @ {positions(dag, needs.tokens[i])}"


def is_plain(op: Op) -> bool:
    return isinstance(op, Core) and op.is_base(0, 1, 2)
