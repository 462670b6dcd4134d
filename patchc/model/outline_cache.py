"""What outlines say, kept on disk, so that a model whose config was seen before is not traced again.

A residual graph and what the model's parts cost; never weights. Where and how it is kept is `cache`'s matter.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from patchc.ir.graph import ResidualGraph
from patchc.ir.graph_json import graph_from_json, graph_to_json
from patchc.ir.program import Rates
from patchc.model.cache import keep_entry, makers, read_entry

FORMAT = 4
KIND = "outlines"


@dataclass(frozen=True, slots=True)
class Facts:
    """What can be said of a model without its weights. `element`: the bytes of a number in its dtype."""

    graph: ResidualGraph
    rates: Rates
    element: int


def cache_key(config: dict[str, Any], dtype: str | None, attention: str | None) -> dict[str, Any]:
    """All that a model's residual graph and its costs follow from."""
    return {"format": FORMAT, "config": config, "dtype": dtype, "attention": attention, **makers()}


def read_facts(key: dict[str, Any]) -> Facts | None:
    """What was kept under a key, None where there is nothing or it is damaged."""
    found = read_entry(KIND, key)
    try:
        return None if found is None else _facts(found[0])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def keep_facts(key: dict[str, Any], facts: Facts) -> None:
    """Keep facts under a key, where they can be kept."""
    rates = [list(facts.rates.mlp.items()), *astuple(facts.rates)[1:]]
    keep_entry(KIND, key, {"graph": graph_to_json(facts.graph), "rates": rates, "element": facts.element})


def _facts(content: dict[str, Any]) -> Facts:
    mlp, *others, prepared = content["rates"]
    rates = Rates({int(b): int(n) for b, n in mlp}, *map(int, others), prepared=bool(prepared))
    return Facts(graph_from_json(content["graph"]), rates, int(content["element"]))
