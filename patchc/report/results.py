"""One experiment's numbers with their labels, and those of a whole spec. Drawing is for others.

A metric's array has the experiment's dims as its shape, and NaN where the sweep has no cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patchc.diagnostics import RULES, Report, Span
from patchc.ir.experiment import Dim, Experiment
from patchc.report import files, markup
from patchc.report.cells import cell_name

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

NON_FINITE = RULES.add("non-finite", "a metric of a run came out infinite or not a number", exit=3)

FORMAT_VERSION = 1

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Check:
    """How a check against the hooks backend came out. Differences are in the metrics' own units."""

    cells: int
    max_abs_diff: float
    tolerance: float
    largest_effect: float


@dataclass(frozen=True, eq=False)
class Result:
    """The numbers of one experiment.

    values, stderr: a metric's `[*dims]`, mean over prompts and its standard error; NaN: no cell.
    baselines: a metric's value in each unpatched world. passes: walks over the layers that it took;
    unfused_passes: what a forward pass a cell would have taken.
    no_effect: cells that provably change nothing.
    """

    experiment: Experiment
    values: Mapping[str, Array]
    stderr: Mapping[str, Array]
    n: int
    baselines: Mapping[str, Mapping[str, float]]
    passes: int = 0
    unfused_passes: int = 0
    no_effect: int = 0
    check: Check | None = None
    files: list[Path] = field(default_factory=list[Path])

    def __post_init__(self) -> None:
        """Bring the arrays to float64 with NaN outside the cells; `non-finite` where a cell has no number."""
        shape, cells = self.experiment.shape, self._cells()
        for name in ("values", "stderr"):
            given = getattr(self, name)
            arrays = {m: np.array(a, dtype=np.float64).reshape(shape) for m, a in given.items()}
            for array in arrays.values():
                array[~cells] = np.nan
            object.__setattr__(self, name, arrays)
        self._refuse_non_finite(cells)

    def _cells(self) -> npt.NDArray[np.bool_]:
        """`[*dims]`: where the sweep has a cell."""
        cells = np.zeros(self.experiment.shape, dtype=np.bool_)
        for cell in self.experiment.cells:
            cells[cell.index] = True
        return cells

    def _refuse_non_finite(self, cells: npt.NDArray[np.bool_]) -> None:
        report = Report()
        for metric in self.experiment.metrics:
            bad = np.argwhere(cells & ~np.isfinite(self.values[metric.name]))
            if len(bad):
                where = cell_name(self.experiment, tuple(int(i) for i in bad[0]))
                more = f", and in {len(bad) - 1} more of {int(cells.sum())} cells" if len(bad) > 1 else ""
                value = self.values[metric.name][tuple(bad[0])]
                message = f"`{metric.name}` of `{self.name}` is {value}{where and f' at {where}'}{more}"
                report.add(NON_FINITE.at(metric.span, message))
            for world, value in self.baselines.get(metric.name, {}).items():
                if not np.isfinite(value):
                    message = f"`{metric.name}` of `{self.name}` is {value} in the run of `{world}`, unpatched"
                    report.add(NON_FINITE.at(metric.span, message))
        report.raise_errors()

    # ---- parts

    @property
    def name(self) -> str:
        return self.experiment.name

    @property
    def dims(self) -> tuple[Dim, ...]:
        return self.experiment.dims

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def metric(self) -> str:
        """The first metric."""
        return next(iter(self.values))

    def baseline(self, metric: str) -> float:
        """The metric in the unpatched run that the experiment patches; 0 where it is not known."""
        return self.baselines.get(metric, {}).get(self.experiment.run, 0.0)

    def effects(self, metric: str) -> Array:
        """`[*dims]`: value minus baseline."""
        return self.values[metric] - self.baseline(metric)

    def columns(self) -> dict[str, str]:
        """The name of each metric's column: its own, unless a dim or `n` has it."""
        taken = {d.name for d in self.dims} | {"n"}
        return {m: f"{m}_value" if m in taken else m for m in self.metrics}

    # ---- other forms

    def to_xarray(self) -> xr.Dataset:
        """A variable a metric, and `METRIC_stderr`; dims and coords are the experiment's, labels too."""
        import xarray as xr

        names = tuple(d.name for d in self.dims)
        coords: dict[str, Any] = {d.name: _one_type(d.coords) for d in self.dims}
        coords |= {f"{d.name}_label": (d.name, list(d.labels)) for d in self.dims if d.labels is not None}
        columns = self.columns()
        variables = {columns[m]: (names, a) for m, a in self.values.items()}
        variables |= {f"{columns[m]}_stderr": (names, a) for m, a in self.stderr.items()}
        baselines = {m: dict(b) for m, b in self.baselines.items()}
        return xr.Dataset(variables, coords, {"n": self.n, "baselines": baselines, "passes": self.passes})

    def __getitem__(self, metric: str) -> xr.DataArray:
        if metric not in self.values:
            raise KeyError(f"no metric {metric!r}: this experiment measured {', '.join(self.metrics)}")
        return self.to_xarray()[self.columns()[metric]]

    def to_pandas(self) -> pd.DataFrame:
        """A row a cell: a column for each dim, each metric and its `_stderr`, and `n`."""
        import pandas as pd

        indices = sorted({cell.index for cell in self.experiment.cells})
        frame: dict[str, Any] = {}
        for axis, dim in enumerate(self.dims):
            coords = _one_type(dim.coords)
            frame[dim.name] = [coords[index[axis]] for index in indices]
        for metric, column in self.columns().items():
            frame[column] = [float(self.values[metric][index]) for index in indices]
            frame[f"{column}_stderr"] = [float(self.stderr[metric][index]) for index in indices]
        return pd.DataFrame({**frame, "n": [self.n] * len(indices)})

    def to_json(self) -> dict[str, Any]:
        """Plain data: nested lists by dim, None where there is no cell, a bare number for no dims."""
        check = self.check
        return {
            "dims": [d.name for d in self.dims],
            "coords": {d.name: list(d.coords) for d in self.dims},
            "metrics": {m: _nested(a) for m, a in self.values.items()},
            "stderr": {m: _nested(a) for m, a in self.stderr.items()},
            "n": self.n,
            "baselines": {m: dict(b) for m, b in self.baselines.items()},
            "passes": self.passes,
            "check": None if check is None else {"cells": check.cells, "max_abs_diff": check.max_abs_diff},
        }

    def plot(self, metric: str | None = None) -> Figure:
        """A heatmap of one metric, or of every one; bars where there is one dim or none."""
        from patchc.report.heatmap import draw

        return draw(self, self.metrics if metric is None else (metric,))

    def save(self, path: str | Path, *, span: Span | None = None) -> Path:
        """Write to a `.json`, `.csv` or `.parquet` file, whole or not at all.

        A `.json` file has the form of `Results.to_json`, without the record.
        Errors: `unknown-format`, `no-such-directory`, `cannot-write`.
        """
        return files.save_result(self, Path(path), span)

    def _repr_html_(self) -> str:
        return markup.result_html(self)


class Results(Mapping[str, Result]):
    """The results of a spec by experiment, and the record of the run."""

    def __init__(self, results: Mapping[str, Result], record: Mapping[str, Any]) -> None:
        self._results = dict(results)
        self.record = dict(record)

    def __getitem__(self, name: str) -> Result:
        if name not in self._results:
            raise KeyError(f"no experiment {name!r}: this run has {', '.join(self._results)}")
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"Results({', '.join(self._results)})"

    def to_json(self) -> dict[str, Any]:
        """The success object of `--format json`."""
        experiments = {name: result.to_json() for name, result in self.items()}
        return {"format_version": FORMAT_VERSION, "experiments": experiments, "record": self.record}

    def _repr_html_(self) -> str:
        return "".join(markup.result_html(result) for result in self.values())


def _one_type(coords: tuple[str | int | float, ...]) -> list[Any]:
    """Coordinates as a column of one type: as they are, or as texts where numbers and texts are mixed."""
    mixed = len({isinstance(c, str) for c in coords}) > 1
    return [str(c) for c in coords] if mixed else list(coords)


def _nested(array: Array) -> Any:
    """Lists in lists; None for what is no number."""

    def plain(item: Any) -> Any:
        if isinstance(item, list):
            return [plain(x) for x in item]
        return float(item) if np.isfinite(item) else None

    return plain(array.tolist())
