"""Train `induction-2l`: two layers of attention that continue a repeated sequence of letters.

    python examples/models/train_induction_2l.py [--out FOLDER] [--seed N] [--steps N]

    "q d x m q d x"  ->  " m"

A sequence is some stray letters, then a run of other, distinct letters in random order, then perhaps more
strays, then that run again. Loss and accuracy are over the second run from its second letter on: before that
nothing can be known.
"""

from __future__ import annotations

import argparse
import json
import string
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

LETTERS = string.ascii_lowercase
# A text starts with a bare letter or, as a continuation would, with a spaced one: both are in the vocabulary.
WORDS = [" " + letter for letter in LETTERS] + list(LETTERS)
CONFIG: dict[str, Any] = {
    "d_model": 64,
    "d_head": 32,
    "n_heads": 2,
    "n_layers": 2,
    "n_ctx": 64,
    "d_vocab": len(WORDS),
    "attn_only": True,
    "normalization_type": "LN",
    "positional_embedding_type": "standard",
    "tokenizer_prepends_bos": False,
}
MAX_STRAY, SHORT_RUN, MAX_RUN = 8, 4, 20
IGNORED = -100


def batch_of(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens and targets `[sequence, pos]`, and how far apart its runs stand `[sequence]`."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    tokens = torch.zeros(n, 2 * (MAX_STRAY + MAX_RUN), dtype=torch.long)
    targets = torch.full_like(tokens, IGNORED)
    periods = torch.zeros(n, dtype=torch.long)
    for i in range(n):
        # Half the runs are of two to four letters: only the letter just before tells where such a run goes
        # on, while in a long one a head that looks further back would serve as well.
        length = draw(2, SHORT_RUN if draw(0, 1) else MAX_RUN)
        stray, gap = draw(0, MAX_STRAY), draw(0, MAX_STRAY)
        letters = torch.randperm(len(LETTERS), generator=generator)
        run, others = letters[:length], letters[length:]
        # Strays are not of the run, so that a letter of it has one continuation and not two.
        strays = others[torch.randint(len(others), (stray + gap,), generator=generator)]
        row = torch.cat([strays[:stray], run, strays[stray:], run])
        second = stray + length + gap
        targets[i, second : len(row) - 1] = row[second + 1 :]
        if draw(0, 1):
            row[0] += len(LETTERS)
        tokens[i, : len(row)] = row
        periods[i] = length + gap
    return tokens, targets, periods


def build(config: dict[str, Any], seed: int) -> native.NativeModel:
    resolved = TransformerBridgeConfig(**config)
    model = native.NativeModel(resolved)
    native.initialize_native_model(model, resolved, seed=seed)
    return model


def train(seed: int, steps: int, batch: int) -> native.NativeModel:
    generator = torch.Generator().manual_seed(seed)
    model = build(CONFIG, seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        tokens, targets, _ = batch_of(batch, generator)
        # Each sequence starts at a position of its own: first runs seldom stand late in the context, so from
        # position 0 alone the previous-token head would not be learnt there.
        offset = torch.randint(CONFIG["n_ctx"] - tokens.shape[1] + 1, (batch, 1), generator=generator)
        logits = model(tokens, position_ids=offset + torch.arange(tokens.shape[1]))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            took = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  {took:.0f} s", flush=True)
    return model.eval()


def save(model: native.NativeModel, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"format": "patchc-native", "version": 1, "config": CONFIG}
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    save_tokenizer(word_tokenizer(WORDS, CONFIG["n_ctx"]), folder)


def load(folder: Path) -> native.NativeModel:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = build(content["config"], seed=0)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def report(folder: Path) -> None:
    """Print accuracy on unseen sequences, and what each head attends to."""
    model = load(folder)
    patterns: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(model.layers):
        block.attn.register_forward_hook(lambda _m, _i, out, layer=layer: patterns.__setitem__(layer, out[1].detach()))
    tokens, targets, periods = batch_of(4096, torch.Generator().manual_seed(10**6))
    known = targets != IGNORED
    right = (model(tokens).argmax(-1) == targets)[known].float().mean().item()
    print(f"second-run accuracy {right:.4f} over {int(known.sum())} tokens of {len(tokens)} sequences")
    row, pos = known.nonzero(as_tuple=True)
    copied = pos - periods[row] + 1  # the place to copy from: one after this letter's first
    for layer, pattern in sorted(patterns.items()):
        for head in range(pattern.shape[1]):
            of = pattern[:, head]
            previous = of[row, copied, copied - 1].mean().item()
            copying = of[row, pos, copied].mean().item()
            print(
                f"head[{layer}, {head}]  first run, to the previous token {previous:.3f}"
                f"  second run, to the place to copy {copying:.3f}"
            )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("q d x m q d x", " b a c k b a", "a b c d e a b c"):
        ids = tokenizer(text)["input_ids"]
        guess = model(torch.tensor([ids]))[0, -1].argmax()
        print(f"{text!r} -> {tokenizer.decode([int(guess)])!r}")


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=here / "induction-2l")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--evaluate", action="store_true", help="measure the folder as it is; train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        save(train(args.seed, args.steps, args.batch), args.out)
    report(args.out)


if __name__ == "__main__":
    main()
