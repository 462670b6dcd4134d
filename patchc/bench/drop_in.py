"""`patchc.transformer_lens` beside the functions that it stands in for: the same call on the same bridge and cache.

The first call traces the bridge, which is measured apart; TransformerLens runs evenly spread rows of the index where
all of them would take too long.
"""

from __future__ import annotations

from contextlib import redirect_stderr
from importlib import import_module
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from patchc.bench.measure import timed
from patchc.bench.peers.transformer_lens import TransformerLens
from patchc.bench.row import PeerTime, Row, scaled
from patchc.bench.shape import IOI_LIKE, random_model, random_worlds
from patchc.bench.works import HEAD_BY_POSITION, HEAD_OUT, RESID_PRE

if TYPE_CHECKING:
    from patchc.bench.sweeps import Bench

FUNCTIONS = tuple(work.transformer_lens for work in (RESID_PRE, HEAD_OUT, HEAD_BY_POSITION))


def drop_in(bench: Bench, name: str) -> Row:
    """One function of both, called as a user of TransformerLens calls it."""
    ours, theirs = (getattr(import_module(m), name) for m in ("patchc.transformer_lens", "transformer_lens.patching"))
    peer, worlds = TransformerLens(lambda: random_model(bench.shape)), random_worlds(bench.shape, IOI_LIKE)
    with torch.no_grad():
        _, cache = peer.bridge.run_with_cache(worlds.clean)
        given = (peer.bridge, worlds.corrupt, cache, worlds.difference)
        _, first_s = timed(lambda: ours(*given))
        (found, index), cpu_s = timed(lambda: ours(*given, return_index_df=True))
        rows = _some(index, bench.effort.side_s, timed(lambda: _rows(theirs, given, index[:1]))[1])
        sampled, their_s = timed(lambda: _rows(theirs, given, rows))
        base = float(worlds.difference(peer.bridge(worlds.corrupt)))
    cells, apart = len(index), (found.flatten()[rows.index.tolist()] - sampled).abs().max()
    return Row(
        f"patchc.transformer_lens.{name}",
        IOI_LIKE,
        cells,
        cpu_s,
        peers={peer.name: PeerTime(scaled(their_s, len(rows), cells), len(rows) < cells)},
        max_abs_diff=float(apart),
        largest_effect=float((sampled - base).abs().max()),
        compared=len(rows),
        notes=(f"the first call takes {first_s:.3g} s: it traces the bridge",),
    )


def _some(index: Any, side_s: float, row_s: float) -> Any:
    """All rows of an index, or as many, evenly spread, as fit in the time."""
    count = max(2, int(side_s / max(row_s, 1e-6)))
    step = max(1, -(-len(index) // count))
    return index[step // 2 :: step]


def _rows(function: Any, given: tuple[Any, ...], rows: Any) -> Tensor:
    """TransformerLens' numbers of some rows of the index."""
    settings = {**function.keywords, "index_axis_names": None, "index_df": rows.reset_index(drop=True)}
    with redirect_stderr(StringIO()):  # its progress bar
        return function.func(*given, **settings)
