"""Tiny random bridges, with a clean and a corrupted run each: what tests of `patchc.transformer_lens` sweep."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge.sources import build_bridge_from_module

from tests.models import gpt2, llama

KINDS = {"gpt2": (gpt2, "GPT2LMHeadModel"), "llama": (llama, "LlamaForCausalLM")}
BATCH, POS = 3, 5


@dataclass(frozen=True)
class Setting:
    """A bridge, both runs' ids `[batch, pos]` and caches."""

    bridge: Any
    corrupted: Tensor
    clean: Tensor
    clean_cache: Any
    corrupted_cache: Any


def bridge(kind: str, compatible: bool = False, **config: Any) -> Any:
    """A bridge around a random module of its own."""
    make, architecture = KINDS[kind]
    module: Any = make("eager", **config)
    out: Any = build_bridge_from_module(module, architecture, hf_config=module.config)
    if compatible:
        out.enable_compatibility_mode()
    return out.eval()


@cache
def setting(kind: str, compatible: bool = False) -> Setting:
    """Prompts that differ at position 2."""
    made = bridge(kind, compatible)
    ids = torch.randint(0, 50, (BATCH, POS), generator=torch.Generator().manual_seed(1))
    clean = ids.clone()
    clean[:, 2] = (ids[:, 2] + 7) % 50
    with torch.no_grad():
        caches = [made.run_with_cache(x)[1] for x in (clean, ids)]
    return Setting(made, ids, clean, *caches)


def per_prompt(logits: Tensor) -> Tensor:
    """A difference of two logits at the last position, `[batch]`."""
    return logits[:, -1, 3] - logits[:, -1, 11]


def metric(logits: Tensor) -> Tensor:
    """The same as a scalar."""
    return per_prompt(logits).mean()
