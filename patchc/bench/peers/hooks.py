"""The naive peer: patchc's own hooks backend, a hooked forward pass or more a cell."""

from __future__ import annotations

from collections.abc import Sequence

from patchc.bench.measure import timed
from patchc.bench.peers import Coords, Session, Task
from patchc.bench.works import Work
from patchc.execute.hooks import Oracle


class Hooks:
    """patchc's hooks backend, which shares nothing with its compiler but the description of the experiment."""

    name = "hooks"

    def missing(self) -> None:
        return None

    def does(self, work: Work) -> bool:
        return True

    def open(self, task: Task) -> Session:
        return HooksSession(task)


class HooksSession:
    """The worlds' own runs are recorded with the first cell."""

    def __init__(self, task: Task):
        loaded, study = task.compiled.model.loaded, task.compiled.study
        (self._experiment,) = study.experiments
        dims = self._experiment.dims
        self._cells = {
            tuple(d.coords[i] for d, i in zip(dims, cell.index, strict=True)): cell for cell in self._experiment.cells
        }
        self._oracle = Oracle(loaded.eager, loaded.graph, study.prompts)
        first = [self._experiment.cells[0]]
        _, both = timed(lambda: self._oracle.measure(self._experiment, first))
        _, second = timed(lambda: self._oracle.measure(self._experiment, first))
        self.fixed_s = max(0.0, both - second)

    def run(self, cells: Sequence[Coords]) -> tuple[list[float], float]:
        chosen = [self._cells[c] for c in cells]
        found, seconds = timed(lambda: self._oracle.measure(self._experiment, chosen))
        return found["diff"].mean(1).tolist(), seconds

    def close(self) -> None:
        pass
