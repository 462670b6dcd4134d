"""What each head of `ioi-tiny` does, measured with plain forward hooks.

    python examples/models/ioi_tiny_heads.py [FOLDER]

On held-out prompts, corrupt is clean with the giver's name swapped for the other one. `total` restores a
head's output from the clean run into the corrupt run and lets every later layer see it; `direct` changes
the logits' input alone. Both are shares of the logit difference between the two names: 0 is the corrupt
run, 1 the clean one. Attention is the clean run's, from the last position to the three names, and from
the giver's second place to its first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from train_ioi_tiny import NAMES, Sentence, encoded, held_out_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast

COLUMNS = ("head", "total", "direct", "end to IO", "end to S1", "end to S2", "S2 to S1")


class Run:
    """One forward pass: each head's `z`, the attention, the logits, and what the final norm reads."""

    def __init__(self, model: GPT2LMHeadModel, tokens: Tensor, restore: tuple[int, int, Tensor] | None = None):
        self.z: list[Tensor] = []
        n_heads, d_head = model.config.n_head, model.config.n_embd // model.config.n_head

        def before_projection(layer: int):
            def hook(_module: object, args: tuple[Tensor]) -> tuple[Tensor]:
                z = args[0].unflatten(-1, (n_heads, d_head)).clone()
                if restore is not None and restore[0] == layer:
                    z[..., restore[1], :] = restore[2]
                self.z.append(z)
                return (z.flatten(-2),)

            return hook

        handles = [
            block.attn.c_proj.register_forward_pre_hook(before_projection(layer))
            for layer, block in enumerate(model.transformer.h)
        ]
        keep = lambda _module, args: setattr(self, "stream", args[0])  # noqa: E731
        handles.append(model.transformer.ln_f.register_forward_pre_hook(keep))
        output = model(tokens, output_attentions=True)
        self.logits, self.patterns = output.logits, output.attentions
        for handle in handles:
            handle.remove()


@torch.no_grad()
def measure(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Sentence]
) -> list[tuple[float, ...]]:
    """A row a head, its columns those of COLUMNS; every prompt has the same length."""
    tokens = torch.stack([encoded(tokenizer, [p])[0][0, :-2] for p in prompts])
    giver = torch.tensor([tokenizer(p.subject)["input_ids"][0] for p in prompts])
    other = torch.tensor([tokenizer(p.indirect_object)["input_ids"][0] for p in prompts])
    rows = torch.arange(len(tokens))
    names = torch.tensor([tokenizer(" " + n)["input_ids"][0] for n in NAMES])
    places = torch.isin(tokens, names).nonzero()[:, 1].view(len(tokens), 3)
    second = places[:, 2]
    s1 = torch.where(tokens[rows, places[:, 0]] == giver, places[:, 0], places[:, 1])
    io = places[:, 0] + places[:, 1] - s1
    swapped = tokens.clone()
    swapped[rows, second] = other

    def difference(logits: Tensor) -> Tensor:
        return (logits[rows, -1, other] - logits[rows, -1, giver]).mean()

    clean, corrupt = Run(model, tokens), Run(model, swapped)
    high, low = difference(clean.logits), difference(corrupt.logits)
    print(f"logit difference, clean {high:+.2f}, corrupt {low:+.2f}, over {len(prompts)} prompts")
    table = []
    for layer, block in enumerate(model.transformer.h):
        for head in range(model.config.n_head):
            restored = Run(model, swapped, (layer, head, clean.z[layer][..., head, :]))
            change = clean.z[layer][..., head, :] - corrupt.z[layer][..., head, :]
            write = block.attn.c_proj.weight.unflatten(0, (model.config.n_head, -1))[head]
            direct = model.lm_head(model.transformer.ln_f(corrupt.stream + change @ write))
            pattern = clean.patterns[layer][:, head, -1]
            shares = [((difference(x) - low) / (high - low)).item() for x in (restored.logits, direct)]
            looks = [pattern[rows, place].mean().item() for place in (io, s1, second)]
            looks.append(clean.patterns[layer][rows, head, second, s1].mean().item())
            table.append((layer, head, *shares, *looks))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "ioi-tiny")
    folder = parser.parse_args().folder
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    of_one_length = [p for p in held_out_prompts(3, 8192) if len(tokenizer(p.prompt)["input_ids"]) == 14]
    table = measure(model, tokenizer, of_one_length[:512])
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for layer, head, total, direct, *looks in table:
        attention = " | ".join(f"{share:.2f}" for share in looks)
        print(f"| {layer}, {head} | {total:+.3f} | {direct:+.3f} | {attention} |")


if __name__ == "__main__":
    main()
