"""A model without its weights: the names and numbers of its nodes, and its tokenizer. Enough to resolve specs.

From `config.json` and the tokenizer's files alone. What has been traced before is read from the disk, without torch;
`load` gives the model itself, and proves what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchc.ir.graph import ResidualGraph
from patchc.model.folders import model_folder, read_config, shared_tokenizer
from patchc.model.outline_cache import cache_key, keep_graph, read_graph


@dataclass(frozen=True)
class Outline:
    """What `LoadedModel` says of a model as far as no weights are needed. The tokenizer is shared: not to be changed.

    `bos`: whether texts get a beginning-of-sequence token, None where the tokenizer decides.
    """

    name: str
    graph: ResidualGraph
    tokenizer: Any | None
    bos: bool | None = None


def outline(
    model: str | Path,
    *,
    dtype: str | None = None,
    attention: str | None = None,
    revision: str | None = None,
    bos: bool | None = None,
    base: Path | None = None,
) -> Outline:
    """The outline of a built-in model, a model directory (relative to `base`) or a hub id; weights are never read, and
    of a hub model only the small files are fetched.

    The graph is the one that `load` gives, but that nothing was run to prove it; see `blank.blank_graph`. Raises
    `PatchcError`: `model-not-found`, `model-config`, `model-option`, `model-not-understood`.
    """
    folder = model_folder(model, base or Path(), revision, weights=False)
    config = read_config(folder)
    graph = _graph(folder, config, dtype, attention)
    return Outline(str(model), replace(graph, model=str(model)), shared_tokenizer(folder), bos)


def _graph(folder: Path, config: dict[str, Any], dtype: str | None, attention: str | None) -> ResidualGraph:
    key = cache_key(config, dtype, attention)
    graph = read_graph(key)
    if graph is None:
        from patchc.model.blank import blank_graph  # torch is not needed where the graph is known

        graph = blank_graph(folder, config, dtype, attention)
        keep_graph(key, graph)
    return graph
