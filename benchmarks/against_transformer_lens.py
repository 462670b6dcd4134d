"""patchc beside TransformerLens' own `patching` functions: the same sweeps, CPU seconds at one thread.

    python benchmarks/against_transformer_lens.py

GPT-2-small shape with random weights (nothing is downloaded), 4 prompts of 15 tokens whose worlds share their first 9
tokens (`ioi-like`) or none (`all-different`); the metric is the difference of two logits at the last position.
TransformerLens runs one hooked forward pass a cell. Every cell of both is compared.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import patchc

SHARED = {"ioi-like": 9, "all-different": 0}
LENGTH, PROMPTS = 15, 4
SWEEPS = {
    "head out, all positions": ("for h in head", "patch node h with clean", "get_act_patch_attn_head_out_all_pos"),
    "resid_pre [layer, pos]": (
        "for l in layers, p in positions",
        "patch node resid_pre[l] @ p with clean",
        "get_act_patch_resid_pre",
    ),
}
SPEC = "metric diff = logit(answer) - logit(wrong)\nexperiment e {{ {loop} run corrupt {patch} measure diff }}"


def model() -> Any:
    """GPT-2 small with random weights, scaled up so that patches have effects that show."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    module = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2.0 if p.dim() > 1 else 1.0)
    return module


def data(shared: int) -> dict[str, Any]:
    """Token ids of both worlds and of the two answers."""
    g = torch.Generator().manual_seed(1)
    clean, corrupt = (torch.randint(0, 50257, (PROMPTS, LENGTH), generator=g) for _ in range(2))
    corrupt[:, :shared] = clean[:, :shared]
    answers = torch.randint(0, 50257, (2, PROMPTS), generator=g).tolist()
    return {"clean": clean, "corrupt": corrupt, "answer": answers[0], "wrong": answers[1]}


def cpu_seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    return work(), time.process_time() - start


def with_patchc(m: patchc.Model, d: dict[str, Any], loop: str, patch: str) -> Tensor:
    spec = SPEC.format(loop=loop, patch=patch)
    results = m.compile(spec, data=d).run(progress=False)
    return torch.from_numpy(results["e"].values["diff"])


def with_transformer_lens(bridge: Any, d: dict[str, Any], function: str) -> Tensor:
    from transformer_lens import patching

    rows = torch.arange(PROMPTS)
    _, cache = bridge.run_with_cache(d["clean"])

    def metric(logits: Tensor) -> Tensor:
        return (logits[rows, -1, d["answer"]] - logits[rows, -1, d["wrong"]]).mean()

    return getattr(patching, function)(bridge, d["corrupt"], cache, metric)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    module = model()
    m = patchc.load(module)
    bridge = build_bridge_from_module(model(), "GPT2LMHeadModel", hf_config=module.config)
    head = f"{'sweep':<28}{'worlds':<16}{'cells':>6}{'patchc':>9}{'TL':>9}{'ratio':>8}"
    print(f"{head}{'largest effect':>16}{'difference':>12}")
    for name, (loop, patch, function) in SWEEPS.items():
        for worlds, shared in SHARED.items():
            d = data(shared)
            mine, seconds = cpu_seconds(lambda d=d, loop=loop, patch=patch: with_patchc(m, d, loop, patch))
            theirs, tl_seconds = cpu_seconds(lambda d=d, function=function: with_transformer_lens(bridge, d, function))
            gap, effect = float((mine - theirs).abs().max()), float((mine - mine.flatten()[-1]).abs().max())
            print(
                f"{name:<28}{worlds:<16}{mine.numel():>6}{seconds:>8.1f}s{tl_seconds:>8.1f}s"
                f"{tl_seconds / seconds:>7.1f}x{effect:>16.2g}{gap:>12.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
