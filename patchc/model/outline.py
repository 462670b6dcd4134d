"""A model without its weights: the names, numbers and costs of its nodes, and its tokenizer. Enough to plan specs.

From `config.json` and the tokenizer's files alone. What has been traced before is read from the disk, without torch;
`load` gives the model itself, and proves what it gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from patchc.ir.experiment import ModelChoice
from patchc.ir.graph import ResidualGraph
from patchc.ir.program import Rates
from patchc.model.folders import model_folder, read_config, shared_tokenizer
from patchc.model.outline_cache import Facts, cache_key, keep_facts, read_facts


@dataclass(frozen=True)
class Outline:
    """What `LoadedModel` says of a model as far as no weights are needed. The tokenizer is shared: not to be changed.

    `element`: the bytes of a number in its dtype; `bos`: whether texts get a beginning-of-sequence token, None where
    the tokenizer decides.
    """

    name: str
    graph: ResidualGraph
    rates: Rates
    element: int
    tokenizer: Any | None
    bos: bool | None = None

    def with_tokenizer(self, tokenizer: Any) -> Outline:
        """The same model with another tokenizer."""
        return replace(self, tokenizer=tokenizer)


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

    The graph is the one that `load` gives, but that nothing was run to prove it; see `blank.blank_facts`. Raises
    `PatchcError`: `model-not-found`, `model-config`, `model-option`, `model-not-understood`.
    """
    folder = model_folder(model, base or Path(), revision, weights=False)
    config = read_config(folder)
    facts = _facts(folder, config, dtype, attention)
    graph = replace(facts.graph, model=str(model))
    return Outline(str(model), graph, facts.rates, facts.element, shared_tokenizer(folder), bos)


def chosen_outline(choice: ModelChoice, base: Path) -> Outline:
    """The outline of the model that a spec asks for, errors without a place. The option `device` is the run's: a spec
    may be checked and planned where there is none of its kind."""
    options: dict[str, Any] = {name: value for name, value in choice.options if name != "device"}
    return outline(choice.name, base=base, **options)


def _facts(folder: Path, config: dict[str, Any], dtype: str | None, attention: str | None) -> Facts:
    key = cache_key(config, dtype, attention)
    facts = read_facts(key)
    if facts is None:
        from patchc.model.blank import blank_facts  # torch is not needed where they are known

        facts = blank_facts(folder, config, dtype, attention)
        keep_facts(key, facts)
    return facts
