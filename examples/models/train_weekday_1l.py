"""Train `weekday-1l`: one layer, two heads and an MLP, that counts days.

    python examples/models/train_weekday_1l.py [--out FOLDER] [--seed N] [--steps N]

    "On Friday it rained, today is Tuesday so tomorrow is"  ->  " Wednesday"

The day of the answer is the second one, moved by the word before `is`: yesterday, today or tomorrow. The first day only
distracts. Loss and accuracy are at the last position. An eighth of all (first day, second day, word) are kept out of
training and measured.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformer_lens.model_bridge.sources.native as native
from safetensors.torch import load_file, save_file
from transformer_lens.config import TransformerBridgeConfig
from transformers import AutoTokenizer
from word_tokenizer import save_tokenizer, word_tokenizer

DAYS = [" Monday", " Tuesday", " Wednesday", " Thursday", " Friday", " Saturday", " Sunday"]
WEATHER = [" rained", " snowed", " hailed", " froze"]
SHIFTS = {" yesterday": -1, " today": 0, " tomorrow": 1}
WORDS = ["On", *DAYS, " it", *WEATHER, ",", " is", " so", *SHIFTS]
CONFIG: dict[str, Any] = {
    "d_model": 64,
    "d_head": 32,
    "n_heads": 2,
    "n_layers": 1,
    "n_ctx": 16,
    "d_vocab": len(WORDS),
    "d_mlp": 64,
    "act_fn": "gelu",
    "normalization_type": "LN",
    "positional_embedding_type": "standard",
    "tokenizer_prepends_bos": False,
}
PLACES = "On, the first day, it, the weather, the comma, today, is, the second day, so, the word, is".split(", ")
Case = tuple[int, int, str, str]


def cases(seed: int) -> tuple[list[Case], list[Case]]:
    """(first day, second day, weather, shift) of training, and those kept out."""
    triples = [(a, b, s) for a, b, s in itertools.product(range(7), range(7), SHIFTS) if a != b]
    random.Random(seed).shuffle(triples)
    out = set(triples[: len(triples) // 8])
    every = [(a, b, w, s) for a, b, s in triples for w in WEATHER]
    return [c for c in every if (c[0], c[1], c[3]) not in out], [c for c in every if (c[0], c[1], c[3]) in out]


def text(case: Case) -> str:
    first, second, weather, shift = case
    return f"On{DAYS[first]} it{weather}, today is{DAYS[second]} so{shift} is"


def answer(case: Case) -> str:
    return DAYS[(case[1] + SHIFTS[case[3]]) % 7]


def tensors(chosen: list[Case], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `[case, pos]` and answers `[case]`."""
    tokens = torch.tensor([tokenizer(text(c))["input_ids"] for c in chosen])
    return tokens, torch.tensor([WORDS.index(answer(c)) for c in chosen])


def train(seed: int, steps: int) -> native.NativeModel:
    resolved = TransformerBridgeConfig(**CONFIG)
    model = native.NativeModel(resolved)
    native.initialize_native_model(model, resolved, seed=seed)
    tokens, answers = tensors(cases(seed)[0], word_tokenizer(WORDS, CONFIG["n_ctx"]))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        loss = F.cross_entropy(model(tokens)[:, -1], answers)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    return model.eval()


def save(model: native.NativeModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "patchc-native", "version": 1, "config": CONFIG}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    save_tokenizer(word_tokenizer(WORDS, CONFIG["n_ctx"]), folder)


@torch.no_grad()
def report(folder: Path, seed: int) -> None:
    """Print accuracy on what was kept out, and where each head looks from the last position."""
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = native.NativeModel(TransformerBridgeConfig(**content["config"]))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    patterns: list[torch.Tensor] = []
    model.layers[0].attn.register_forward_hook(lambda _m, _i, out: patterns.append(out[1].detach()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for name, chosen in zip(("trained", "kept out"), cases(seed), strict=True):
        tokens, answers = tensors(chosen, tokenizer)
        right = (model(tokens)[:, -1].argmax(-1) == answers).float().mean().item()
        print(f"{name}: accuracy {right:.4f} on {len(chosen)} texts")
    mean = patterns[-1][:, :, -1].mean(0)
    for head, row in enumerate(mean):
        looks = ", ".join(f"{name} {row[i]:.2f}" for i, name in enumerate(PLACES) if row[i] > 0.05)
        print(f"head[0, {head}] from the last position: {looks}")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=here / "weekday-1l")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--evaluate", action="store_true", help="measure the folder as it is; train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        save(train(args.seed, args.steps), args.out)
    report(args.out, args.seed)


if __name__ == "__main__":
    main()
