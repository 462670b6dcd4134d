"""Measures a sweep: patchc beside its peers, in turns, and whether they agree.

A side that would take longer than the limit runs part of the sweep: patchc whole layers, scaled by planned FLOPs; a
peer evenly spread cells, each of which costs it the same.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from patchc import pipeline
from patchc.bench import targets
from patchc.bench.measure import Used, n_threads, product_gflops, timed, wall_timed, with_use
from patchc.bench.peers import Coords, Peer, PeerError, Session, Task
from patchc.bench.row import PeerTime, Row, scaled
from patchc.bench.shape import Shape, Worlds, random_worlds
from patchc.bench.works import SPEC, Work
from patchc.report.labelling import labelled

if TYPE_CHECKING:
    from patchc.api import Compiled, Model
    from patchc.report.results import Result

METRIC = "diff"
SLOWER = 1.5
"""How much longer than its FLOP limit a sweep is taken to last, before it is measured."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How long measuring may take. A side that would take more than `side_s` CPU seconds runs a part: a peer for about
    `part_s`, patchc as many layers as fit in `layers_s`, or one. `turns`: how often the sides take turns in a sweep
    that is run whole. `wall`: whether to measure at all threads too. `quick`: sampled sweeps run one layer, chosen to
    be short."""

    side_s: float = 60.0
    part_s: float = 16.0
    layers_s: float = 25.0
    turns: int = 2
    wall: bool = True
    quick: bool = False


FULL = Effort()
QUICK = Effort(side_s=6.0, part_s=1.5, turns=1, wall=False, quick=True)


@dataclass
class Bench:
    """What all rows share: the model that patchc has traced, the peers, and how hard to try."""

    model: Model
    shape: Shape
    peers: Sequence[Peer]
    effort: Effort
    threads: int


@dataclass(frozen=True, slots=True)
class Part:
    """A whole sweep or some layers of it. `whole_flops` and `flops` are as planned; `fixed_flops`, in both, are the
    worlds' own runs."""

    spec: str
    layers: tuple[int, ...] | None
    flops: int
    whole_flops: int
    fixed_flops: int
    whole_cells: int
    rows_a_layer: float
    planning_s: float

    @property
    def sampled(self) -> bool:
        return self.layers is not None

    def whole(self, measured: float, fixed: float) -> float:
        """What was measured of the part, for the whole sweep; `fixed` is in both, and the rest goes with planned
        FLOPs."""
        if not self.sampled:
            return measured
        return fixed + scaled(measured - fixed, self.flops - self.fixed_flops, self.whole_flops - self.fixed_flops)


@dataclass
class Side:
    """A peer's turns: CPU seconds for so many cells."""

    peer: Peer
    session: Session
    cells: list[Coords]
    seconds: float = 0.0
    values: dict[Coords, float] = field(default_factory=dict[Coords, float])
    wall_s: float | None = None

    def take(self, cells: Sequence[Coords]) -> None:
        values, seconds = self.session.run(cells)
        self.seconds += seconds
        self.values.update(zip(cells, values, strict=True))

    def time(self, n_cells: int) -> PeerTime:
        """For all cells of the sweep."""
        done = len(self.values)
        return PeerTime(
            self.session.fixed_s + scaled(self.seconds, done, n_cells),
            done < n_cells,
            None if self.wall_s is None else scaled(self.wall_s, 1, n_cells),
        )


def measure(bench: Bench, work: Work, setting: str) -> Row:
    """A work's row in one setting."""
    worlds = random_worlds(bench.shape, setting)
    gflops = product_gflops()
    part = _part(bench, work, worlds, gflops)
    compiled, result, used = with_use(lambda: _compile(bench, part.spec, worlds), counted_run)
    values = by_cell(result)
    sides, notes = _sides(bench, Task(work, bench.shape, worlds, compiled), values, part)
    try:
        count = 1 if part.sampled else bench.effort.turns
        turns = [_turn(bench, part, worlds, sides, slice(i, None, count)) for i in range(count)]
        wall_s = _wall(bench, part, worlds, sides) if bench.effort.wall else None
    finally:
        for side in sides:
            side.session.close()
    row = _row(work, setting, part, turns, used)
    row = replace(row, wall_s=wall_s, peers={s.peer.name: s.time(part.whole_cells) for s in sides})
    row = _agreement(row, values, sides, result.baselines[METRIC]["corrupt"])
    bounds = targets.bounds(row, bench.shape, part.rows_a_layer)
    return replace(row, bounds=bounds, notes=(*_notes(part, sides), *notes))


# ---- patchc's side


def _compile(bench: Bench, spec: str, worlds: Worlds) -> Compiled:
    return bench.model.compile(spec, data=worlds.columns())


def counted_run(compiled: Compiled) -> Result:
    """The run without the checks around it: they refuse a model on which torch counts FLOPs."""
    (program,) = compiled.programs
    return labelled(program, pipeline.execute(program, compiled.model.loaded, compiled.given, {}), per_prompt=False)


def _result(compiled: Compiled) -> Result:
    return compiled.run(progress=False, write=False)["sweep"]


NO_SWEEP = SPEC.format(loops="", patch="edge input -> logits")
"""Next to nothing but what every run has, the worlds' own runs above all."""


def _nearly_nothing(bench: Bench, part: Part, worlds: Worlds) -> Compiled | None:
    """A run of only what is not scaled, where something is."""
    return _compile(bench, NO_SWEEP, worlds) if part.sampled else None


def _part(bench: Bench, work: Work, worlds: Worlds, gflops: float) -> Part:
    """The whole sweep where that is short enough, else as many of its layers as are."""
    spec = work.spec(bench.shape)
    compiled, planning_s = timed(lambda: _compile(bench, spec, worlds))
    (plan,) = compiled.plan()
    flops, rows = plan.cost.flops, sum(plan.rows.values()) / bench.model.graph.n_layers
    whole = Part(spec, None, flops, flops, plan.cost.plain_runs, plan.n_cells, rows, planning_s)
    foreseen_s = SLOWER * flops / gflops / 1e9
    if foreseen_s <= bench.effort.side_s:
        return whole
    layers = _layers(bench, work, bench.effort.layers_s / foreseen_s)
    spec = work.spec(bench.shape, layers)
    (plan,) = _compile(bench, spec, worlds).plan()
    return replace(whole, spec=spec, layers=layers, flops=plan.cost.flops)


def _layers(bench: Bench, work: Work, fits: float) -> tuple[int, ...]:
    """Evenly spread layers, as many as fit in the time, which is `fits` times that of the whole sweep."""
    if bench.effort.quick:
        return work.quick_layer(bench.shape)
    return work.some_layers(bench.shape, max(1, math.floor(fits * work.depth(bench.shape))))


def by_cell(result: Result) -> dict[Coords, float]:
    """The metric by the cells' coordinates."""
    dims, values = result.experiment.dims, result.values[METRIC]
    return {
        tuple(d.coords[i] for d, i in zip(dims, cell.index, strict=True)): float(values[cell.index])
        for cell in result.experiment.cells
    }


# ---- peers


def _sides(bench: Bench, task: Task, values: dict[Coords, float], part: Part) -> tuple[list[Side], list[str]]:
    """The peers that do the work, made ready; and notes of those that failed."""
    sides: list[Side] = []
    notes: list[str] = []
    for peer in (p for p in bench.peers if p.does(task.work)):
        try:
            sides.append(_opened(bench, peer, task, values, part))
        except PeerError as error:
            notes.append(f"without {peer.name}: {error}")
    return sides, notes


def _opened(bench: Bench, peer: Peer, task: Task, values: dict[Coords, float], part: Part) -> Side:
    """A peer made ready, and the cells that it will run: all, or as many as there is time for."""
    session, everywhere = peer.open(task), list(values)
    try:
        session.run(everywhere[:1])
        _, cell_s = session.run(everywhere[:1])
    except PeerError:
        session.close()
        raise
    if not part.sampled and session.fixed_s + cell_s * len(everywhere) <= bench.effort.side_s:
        return Side(peer, session, everywhere)
    count = max(2, round(bench.effort.part_s / max(cell_s, 1e-6)))
    return Side(peer, session, spread(everywhere, count, strongest(values)))


def strongest(values: dict[Coords, float]) -> Coords:
    """The cell whose number is farthest from the median."""
    middle = statistics.median(values.values())
    return max(values, key=lambda cell: abs(values[cell] - middle))


def spread(cells: Sequence[Coords], count: int, always: Coords) -> list[Coords]:
    """About `count` cells, evenly spread over all, and one that is always there."""
    count = min(count, len(cells))
    chosen = {cells[int((i + 0.5) * len(cells) / count)] for i in range(count)}
    return [c for c in cells if c in chosen or c == always]


# ---- turns


@dataclass(frozen=True, slots=True)
class Turn:
    """One run of patchc: CPU seconds of planning and of running, and the speed of matrix products around it."""

    planning_s: float
    running_s: float
    gflops: float


def _turn(bench: Bench, part: Part, worlds: Worlds, sides: Sequence[Side], share: slice) -> Turn:
    before = product_gflops()
    compiled, planning_s = timed(lambda: _compile(bench, part.spec, worlds))
    _, running_s = timed(lambda: _result(compiled))
    after = product_gflops()
    for side in sides:
        side.take(side.cells[share])
    planned = part.planning_s if part.sampled else planning_s
    fixed = _nearly_nothing(bench, part, worlds)
    fixed_s = timed(lambda: _result(fixed))[1] if fixed else 0.0
    return Turn(planned, part.whole(running_s, fixed_s), (before + after) / 2)


def _wall(bench: Bench, part: Part, worlds: Worlds, sides: Sequence[Side]) -> float:
    """Seconds at all threads, for the whole sweep; of peers, those of a cell."""
    compiled, planning_s = wall_timed(lambda: _compile(bench, part.spec, worlds), bench.threads)
    _, running_s = wall_timed(lambda: _result(compiled), bench.threads)
    for side in sides:
        few = side.cells[:3]
        with n_threads(bench.threads):
            side.session.run(few[:1])  # threads start
        _, seconds = wall_timed(lambda s=side, c=few: s.session.run(c), bench.threads)
        side.wall_s = seconds / len(few)
    fixed = _nearly_nothing(bench, part, worlds)
    fixed_s = wall_timed(lambda: _result(fixed), bench.threads)[1] if fixed else 0.0
    return max(planning_s, part.planning_s if part.sampled else 0.0) + part.whole(running_s, fixed_s)


# ---- the row


def _row(work: Work, setting: str, part: Part, turns: Sequence[Turn], used: Used) -> Row:
    flops = round(part.whole(used.flops, part.fixed_flops))
    cpu = [t.planning_s + t.running_s for t in turns]
    return Row(
        work.name,
        setting,
        part.whole_cells,
        statistics.mean(cpu),
        part=work.part,
        extrapolated=part.sampled,
        flops=flops - part.fixed_flops,
        worlds_flops=part.fixed_flops,
        limit_ratio=statistics.mean(s * t.gflops * 1e9 / flops for s, t in zip(cpu, turns, strict=True)),
        extra_bytes=used.bytes,
        planning_s=statistics.mean(t.planning_s for t in turns),
        planned_flops=part.whole_flops,
        gflops=statistics.mean(t.gflops for t in turns),
    )


def _agreement(row: Row, values: dict[Coords, float], sides: Sequence[Side], base: float) -> Row:
    """The row with how far patchc and its peers are apart, in every cell that both computed."""
    pairs = [(values[cell], theirs) for side in sides for cell, theirs in side.values.items()]
    if not pairs:
        return row
    return replace(
        row,
        max_abs_diff=worst(ours - theirs for ours, theirs in pairs),
        largest_effect=max(abs(theirs - base) for _, theirs in pairs),
        compared=len({cell for side in sides for cell in side.values}),
    )


def worst(differences: Iterable[float]) -> float:
    """The largest, by size; infinite where one is no number."""
    return max((abs(d) if math.isfinite(d) else math.inf for d in differences), default=0.0)


def _notes(part: Part, sides: Sequence[Side]) -> list[str]:
    notes: list[str] = []
    if part.layers is not None:
        share = part.flops / part.whole_flops
        layers = ", ".join(map(str, part.layers))
        notes.append(f"patchc ran the cells of layer {layers}, {share:.1%} of the FLOPs; memory is theirs")
    for side in sides:
        if len(side.values) < part.whole_cells:
            notes.append(f"{side.peer.name} ran {len(side.values)} cells")
    return notes
