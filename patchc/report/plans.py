"""A plan as a tree of the stages, for people; with measured numbers beside the planned ones where it has been run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchc.execute.analyse import Analysis
    from patchc.optimise.plan import Plan

Branch = tuple[str, list[str]]


def plan_text(plan: Plan, measured: Analysis | None = None) -> str:
    """The tree; a line a leaf."""
    branches = [_resolved(plan), _lowered(plan), _optimised(plan), _executed(plan, measured), _cost(plan, measured)]
    cells = _counted(plan.n_cells, "cell")
    return "\n".join([f"experiment {plan.experiment}: {cells} in {_counted(plan.n_passes, 'pass')}", *_tree(branches)])


def _tree(branches: Sequence[Branch]) -> Iterator[str]:
    for i, (head, leaves) in enumerate(branches):
        last = i == len(branches) - 1
        yield f"{'└─' if last else '├─'} {head}"
        for j, leaf in enumerate(leaves):
            yield f"{'   ' if last else '│  '}{'└─' if j == len(leaves) - 1 else '├─'} {leaf}"


def _resolved(plan: Plan) -> Branch:
    along = " x ".join(f"{name} {size}" for name, size in plan.dims) or "no dims"
    return f"resolve   run {plan.run}; {along}; measures {', '.join(plan.metrics)}", []


def _lowered(plan: Plan) -> Branch:
    total = sum(plan.variants.values())
    return f"lower     {_counted(total, 'variant')}", [f"{n:>8,}  {name}" for name, n in plan.variants.items()]


def _optimised(plan: Plan) -> Branch:
    width = max(len(r.optimisation) for r in plan.remarks)
    leaves = [f"{'used    ' if r.used else 'not used'}  {r.optimisation.ljust(width)}  {r.text}" for r in plan.remarks]
    return "optimise", leaves


def _executed(plan: Plan, measured: Analysis | None) -> Branch:
    worlds = f"{_counted(len(plan.worlds), 'plain run')} ({', '.join(plan.worlds)})"
    most = plan.n_cells * plan.plain_rows
    leaves = [f"{n:>10,} token rows in {block}" for block, n in plan.rows.items()]
    columns = "the whole vocabulary" if plan.columns is None else f"{plan.columns} answer columns"
    if plan.measured_tokens:
        leaves.append(f"{columns} unembedded at {plan.measured_tokens} tokens a cell")
    leaves += [f"{place} read at {n} tokens a cell" for place, n in plan.read_inside.items()]
    head = f"execute   {worlds}, {_counted(plan.n_passes, 'pass')}; a pass a cell: {most:,} token rows in every block"
    if measured is not None:
        head += f"; took {measured.seconds:.3g} s, {measured.cpu_seconds:.3g} CPU s"
    return head, leaves


def _cost(plan: Plan, measured: Analysis | None) -> Branch:
    cost = plan.cost
    times = f": {cost.unfused / cost.flops:,.1f} times that" if cost.flops else ""
    leaves = [
        f"{_flops(cost.flops)}: {_flops(cost.passes)} in passes, {_flops(cost.plain_runs)} in plain runs,"
        f" {_flops(cost.unembedding)} in the unembedding" + _beside(measured and _flops(measured.flops)),
        f"{_flops(cost.unfused)} with a lean forward pass a cell{times}",
        f"{_bytes(cost.bytes)} at most beside the model" + _beside(measured and _bytes(measured.bytes)),
        f"{_bytes(cost.copied)} of weights copied" if cost.copied else "no weights are copied: parts are views of them",
    ]
    return "cost", leaves


def _beside(measured: str | None) -> str:
    return f" (measured: {measured})" if measured else ""


def plan_json(plan: Plan, measured: Analysis | None = None) -> dict[str, Any]:
    """The plan as plain data, with `measured` where it has been run."""
    from dataclasses import asdict

    out: dict[str, Any] = {**asdict(plan), "cost": {**asdict(plan.cost), "flops": plan.cost.flops}}
    return out if measured is None else {**out, "measured": asdict(measured)}


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 'es' if what.endswith('s') else 's'}"


def _flops(n: int) -> str:
    for unit, size in (("TFLOP", 10**12), ("GFLOP", 10**9), ("MFLOP", 10**6)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n / 1000:.3g} kFLOP"


def _bytes(n: int) -> str:
    return f"{n / 2**30:.3g} GiB" if n >= 2**30 else f"{n / 2**20:.3g} MiB"
