"""One experiment's numbers with their labels, and those of a whole spec. Drawing is for others.

A metric's array has the experiment's dims as its shape, and NaN where the sweep has no cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from patchc.diagnostics import RULES, Report, Span
from patchc.ir.check import Check
from patchc.ir.experiment import Dim, Experiment, PromptDim
from patchc.report import files, markup
from patchc.report.cells import cell_name

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

NON_FINITE = RULES.add("non-finite", "a metric of a run came out infinite or not a number", exit=3)

FORMAT_VERSION = 1

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Result:
    """The numbers of one experiment.

    values, stderr: a metric's `[*dims]`, mean over prompts and its standard error; NaN: no cell (or no error to tell).
    low, high: the ends of the interval of a metric that has one. n: how many prompts each number is a mean of.
    baselines: a metric's value in each unpatched world. passes: walks over the layers that it took;
    unfused_passes: what a forward pass a cell would have taken. no_effect: cells that provably change nothing.
    prompts: the dim over prompts, where there is one; values are then a prompt's own, and `own_baselines` are the
    metric's in the unpatched run, `[prompt]`.
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
    low: Mapping[str, Array] = field(default_factory=dict[str, Array])
    high: Mapping[str, Array] = field(default_factory=dict[str, Array])
    prompts: PromptDim | None = None
    own_baselines: Mapping[str, Array] = field(default_factory=dict[str, Array])

    def __post_init__(self) -> None:
        """Bring the arrays to float64 with NaN outside the cells; `non-finite` where a cell has no number."""
        cells = self._cells()
        for name in ("values", "stderr", "low", "high"):
            given = getattr(self, name)
            arrays = {m: np.array(a, dtype=np.float64).reshape(cells.shape) for m, a in given.items()}
            for array in arrays.values():
                array[~cells] = np.nan
            object.__setattr__(self, name, arrays)
        self._refuse_non_finite(cells)

    def _cells(self) -> npt.NDArray[np.bool_]:
        """`[*dims]`: where the sweep has a cell."""
        cells = np.zeros(self.experiment.shape, dtype=np.bool_)
        for cell in self.experiment.cells:
            cells[cell.index] = True
        if self.prompts is None:
            return cells
        return np.repeat(np.expand_dims(cells, self.prompts.axis), len(self.prompts.prompts), self.prompts.axis)

    def _refuse_non_finite(self, cells: npt.NDArray[np.bool_]) -> None:
        report = Report()
        for metric in self.experiment.metrics:
            bad = np.argwhere(cells & ~np.isfinite(self.values[metric.name]))
            if len(bad):
                where = cell_name(self.dims, tuple(int(i) for i in bad[0]))
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

    @cached_property
    def dims(self) -> tuple[Dim, ...]:
        """The experiment's dims, and that over prompts at its place."""
        dims = self.experiment.dims
        if self.prompts is None:
            return dims
        own = Dim(self.prompts.name, self.prompts.prompts)
        return (*dims[: self.prompts.axis], own, *dims[self.prompts.axis :])

    @cached_property
    def indices(self) -> list[tuple[int, ...]]:
        """The index of every cell along the dims, row by row."""
        return [tuple(int(i) for i in index) for index in np.argwhere(self._cells())]

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
        """`[*dims]`: value minus baseline, each prompt's minus its own where there is a dim over prompts."""
        own = self.own_baselines.get(metric)
        if self.prompts is None or own is None:
            return self.values[metric] - self.baseline(metric)
        shape = [-1 if axis == self.prompts.axis else 1 for axis in range(len(self.dims))]
        return self.values[metric] - own[list(self.prompts.prompts)].reshape(shape)

    def expected(self, metric: str) -> Array:
        """What `expect` speaks of: the values, or their means where it was not the spec that asked for a dim over
        prompts."""
        if self.prompts is None or self.experiment.by_prompt is not None:
            return self.values[metric]
        return self.values[metric].mean(self.prompts.axis)

    def columns(self) -> dict[str, str]:
        """The name of each metric's column: its own, unless a dim, `n` or what belongs to another metric has it."""
        ends = ("_stderr", "_low", "_high")
        taken = {d.name for d in self.dims} | {"n"} | {f"{m}{end}" for m in self.metrics for end in ends}
        return {m: f"{m}_value" if m in taken else m for m in self.metrics}

    def _arrays(self) -> Iterator[tuple[str, Array]]:
        """Every array under the name of its column, a metric's together."""
        for metric, column in self.columns().items():
            yield column, self.values[metric]
            yield f"{column}_stderr", self.stderr[metric]
            if metric in self.low:
                yield f"{column}_low", self.low[metric]
                yield f"{column}_high", self.high[metric]

    # ---- other forms

    def to_xarray(self) -> xr.Dataset:
        """A variable a metric, `METRIC_stderr`, and `METRIC_low` and `METRIC_high` where it has an interval; dims and
        coords are the experiment's, labels too."""
        import xarray as xr

        names = tuple(d.name for d in self.dims)
        coords: dict[str, Any] = {d.name: _one_type(d.coords) for d in self.dims}
        coords |= {f"{d.name}_label": (d.name, list(d.labels)) for d in self.dims if d.labels is not None}
        variables = {column: (names, array) for column, array in self._arrays()}
        baselines = {m: dict(b) for m, b in self.baselines.items()}
        return xr.Dataset(variables, coords, {"n": self.n, "baselines": baselines, "passes": self.passes})

    def __getitem__(self, metric: str) -> xr.DataArray:
        if metric not in self.values:
            raise KeyError(f"no metric {metric!r}: this experiment measured {', '.join(self.metrics)}")
        return self.to_xarray()[self.columns()[metric]]

    def to_pandas(self) -> pd.DataFrame:
        """A row a cell: a column for each dim, each array of `to_xarray`, and `n`."""
        import pandas as pd

        frame: dict[str, Any] = {}
        for axis, dim in enumerate(self.dims):
            coords = _one_type(dim.coords)
            frame[dim.name] = [coords[index[axis]] for index in self.indices]
        for column, array in self._arrays():
            frame[column] = [float(array[index]) for index in self.indices]
        return pd.DataFrame({**frame, "n": [self.n] * len(self.indices)})

    def to_json(self) -> dict[str, Any]:
        """Plain data: nested lists by dim, None where there is no cell, a bare number for no dims. `intervals` is there
        where a metric has one: its level, and the low and high ends in the shape of `metrics`."""
        levels = {m.name: m.interval.level for m in self.experiment.metrics if m.interval is not None}
        intervals = {
            m: {"level": levels[m], "low": _nested(self.low[m]), "high": _nested(self.high[m])} for m in self.low
        }
        return {
            "dims": [d.name for d in self.dims],
            "coords": {d.name: list(d.coords) for d in self.dims},
            "metrics": {m: _nested(a) for m, a in self.values.items()},
            "stderr": {m: _nested(a) for m, a in self.stderr.items()},
            **({"intervals": intervals} if intervals else {}),
            "n": self.n,
            "baselines": {m: dict(b) for m, b in self.baselines.items()},
            "passes": self.passes,
            "check": None if self.check is None else self.check.to_json(),
        }

    def plot(self, metric: str | None = None, kind: str = "heatmap") -> Figure:
        """One metric, or every one, as a `heatmap` (bars where there is one dim or none), `bar` or `line`."""
        from patchc.report.pictures import draw

        return draw(self, self.metrics if metric is None else (metric,), kind)

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
