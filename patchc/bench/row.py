"""A row of the table: what was measured of one work, and how it stands to its targets."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Bound:
    """A target: what was measured, in `unit`, against its limit."""

    unit: str
    measured: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit


@dataclass(frozen=True, slots=True)
class PeerTime:
    """A peer's CPU seconds at one thread, for all cells; `extrapolated` where it ran only some. `wall_s`: seconds at
    all threads."""

    cpu_s: float
    extrapolated: bool
    wall_s: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One work in one setting.

    cpu_s: CPU seconds at one thread, planning included; planning_s: those of planning. wall_s: seconds at all threads.
    flops: counted, without worlds_flops, those of the worlds' own runs; planned_flops: foretold, of both together.
    limit_ratio: CPU seconds over those that all counted FLOPs take at `gflops`, the speed in GFLOP/s of a matrix
    product measured beside. extra_bytes: the most memory beyond the loaded
    model. max_abs_diff: of the cells that peers computed too, `compared` of them; largest_effect: theirs.
    notes: how it was measured, where that is not plain.
    """

    work: str
    setting: str
    cells: int
    cpu_s: float
    part: str = ""
    extrapolated: bool = False
    peers: dict[str, PeerTime] = field(default_factory=dict[str, PeerTime])
    flops: int | None = None
    limit_ratio: float | None = None
    extra_bytes: int | None = None
    max_abs_diff: float | None = None
    largest_effect: float | None = None
    planning_s: float | None = None
    wall_s: float | None = None
    planned_flops: int | None = None
    worlds_flops: int = 0
    gflops: float | None = None
    compared: int = 0
    bounds: tuple[Bound, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> dict[str, float]:
        """How many times patchc's CPU seconds each peer takes."""
        return {name: peer.cpu_s / self.cpu_s for name, peer in self.peers.items()}

    @property
    def title(self) -> str:
        return f"{self.work}: {self.part}" if self.part else self.work


def scaled(seconds: float, part: float, whole: float) -> float:
    """What took `seconds` for `part` of a work (cells, or FLOPs), for the whole of it."""
    return seconds * whole / part
