"""Train `ioi-tiny`: a four-layer GPT-2 that completes indirect-object sentences.

    python examples/models/train_ioi_tiny.py [--out FOLDER] [--seed N] [--steps N]

    "When Mary and John went to the shop, John gave a bag to"  ->  " Mary"

An eighth of the combinations of two names with an opening are kept out of training, and with them all
that have both Mary and John; accuracy is measured on those.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)
from word_tokenizer import save_tokenizer, word_tokenizer

NAMES = (
    "Mary John Tom Anna James Susan Peter Lucy Paul Emma David Laura Mark Alice Simon Kate "
    "Henry Rose Jack Grace Adam Ruth Oscar Nina Hugo Clara Felix Ella"
).split()
PLACES = "shop park school station library garden office market museum cafe river beach".split()
OBJECTS = "bag book drink ring ball letter key cake hat map coat pen lamp".split()
VERBS = "gave handed passed brought offered lent sent showed".split()
# A and B are the two names of the opening, in the order that they appear; S is whichever of them gives.
OPENINGS = (
    "When{A} and{B} went to the{P},",
    "When{A} and{B} left the{P},",
    "After{A} and{B} went to the{P},",
    "After{A} and{B} met in the{P},",
    "Then{A} and{B} went to the{P}, and",
    "Then{A} and{B} sat in the{P}, and",
    "While{A} and{B} sat in the{P},",
    "While{A} and{B} were at the{P},",
    "Then{A} and{B} had a long talk at the{P}, and",
    "Once{A} and{B} left the{P},",
    "Today{A} and{B} walked to the{P}, and",
    "One day{A} and{B} met near the{P}, and",
)
GIVING = ("{S}{V} a{O} to", "{S}{V} the{O} to", "{S} happily{V} a{O} to", "{S} then{V} the{O} to")
ANSWER_WEIGHT = 4.0
# Left to itself this model adds up both names and takes the giver's away again, which GPT-2 small does not.
# So training keeps the last layer from looking at the giver and leads these heads of it to look from the
# end at the indirect object. Once they do, it asks that their output alone, put into a run on the swapped
# prompt, carry the answer over (interchange intervention training). What tells them where to look is left
# to the model.
MOVERS = (1, 2)
LEAD_WEIGHT, CARRY_WEIGHT = 0.2, 0.4
CARRY_FROM = 0.4  # the share of the steps after which the outputs are asked for as well
N_POSITIONS = 32
UNSEEN = frozenset({"Mary", "John"})
Combination = tuple[frozenset[str], str]  # two names, and an opening
# Narrow: wide MLPs learn the names by heart, and then no head need move them.
N_INNER = 64


@dataclass(frozen=True, slots=True)
class Sentence:
    prompt: str
    indirect_object: str
    subject: str


def vocabulary() -> list[str]:
    """Every word of the templates, each as it is written there, then names, places, objects and verbs."""
    blank = dict.fromkeys("ABPSVO", "")
    templates = (t.format(**blank) for t in (*OPENINGS, *(" " + g for g in GIVING)))
    in_templates = (word for t in templates for word in re.findall(" ?[A-Za-z]+", t))
    chosen = (" " + word for word in (*NAMES, *PLACES, *OBJECTS, *VERBS))
    return list(dict.fromkeys([",", ".", *in_templates, *chosen]))


def combinations() -> tuple[list[Combination], list[Combination]]:
    """What training sees and what it does not: an eighth drawn with a seed of its own, and Mary with John."""
    pairs = [frozenset(p) for p in itertools.combinations(NAMES, 2)]
    everything = list(itertools.product(pairs, OPENINGS))
    held_out = {*random.Random(0).sample(everything, len(everything) // 8)}
    held_out |= {(UNSEEN, opening) for opening in OPENINGS}
    return [c for c in everything if c not in held_out], [c for c in everything if c in held_out]


def sentence(rng: random.Random, combination: Combination) -> Sentence:
    """One sentence; the names in either order, and either of them the one who gives (ABBA and BABA)."""
    pair, opening = combination
    a, b = rng.sample(sorted(pair), 2)
    subject, other = rng.sample([a, b], 2)
    first = opening.format(A=" " + a, B=" " + b, P=" " + rng.choice(PLACES))
    then = rng.choice(GIVING).format(S=" " + subject, V=" " + rng.choice(VERBS), O=" " + rng.choice(OBJECTS))
    return Sentence(first + then, " " + other, " " + subject)


def encoded(tokenizer: PreTrainedTokenizerFast, sentences: list[Sentence]) -> tuple[Tensor, Tensor]:
    """Tokens `[sentence, pos]` padded on the right with -1, and the position of each answer `[sentence]`."""
    rows = [tokenizer(s.prompt + s.indirect_object + ".")["input_ids"] for s in sentences]
    tokens = torch.full((len(rows), max(map(len, rows))), -1)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) - 2 for row in rows])


class LastLayer:
    """A forward pass, and the same with heads of the last layer changed, at one position a sentence."""

    def __init__(self, model: GPT2LMHeadModel, tokens: Tensor, at: Tensor):
        self.model, self.block = model, model.transformer.h[-1]
        kept: list[Tensor] = []
        handle = self.block.attn.c_proj.register_forward_pre_hook(lambda _module, args: kept.append(args[0]))
        # Padding stands on the right and attention is causal, so no attention mask is needed.
        output = model(tokens.clamp_min(0), output_attentions=True, output_hidden_states=True)
        handle.remove()
        rows = torch.arange(len(tokens))
        self.logits = output.logits
        self.pattern = output.attentions[-1][rows, :, at]
        self.stream = output.hidden_states[-2][rows, at]
        self.z = kept[0][rows, at].unflatten(-1, (model.config.n_head, -1))

    def with_heads(self, heads: tuple[int, ...], z: Tensor) -> Tensor:
        """Logits `[sentence, vocabulary]` where `heads` have the outputs that they have in `z`."""
        mixed = self.z.clone()
        mixed[:, heads] = z[:, heads]
        stream = self.stream + self.block.attn.c_proj(mixed.flatten(1)[:, None])[:, 0]
        stream = stream + self.block.mlp(self.block.ln_2(stream))
        return self.model.lm_head(self.model.transformer.ln_f(stream))


def loss_of(model: GPT2LMHeadModel, tokens: Tensor, answers: Tensor, names: Tensor, carry: bool) -> Tensor:
    """Next-token loss with weight on the answer, and what makes movers of MOVERS."""
    rows, end, places = torch.arange(len(tokens)), answers - 1, torch.arange(tokens.shape[1])
    run = LastLayer(model, tokens, end)
    targets = tokens[:, 1:]
    each = F.cross_entropy(run.logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    weight = (targets >= 0).float()
    weight[rows, end] = ANSWER_WEIGHT
    loss = (each.view_as(weight) * weight).sum() / weight.sum()

    indirect = tokens[rows, answers]
    before = places < answers[:, None]
    looked_at = ((tokens == indirect[:, None]) & before).float().argmax(-1)
    giver_at = ((torch.isin(tokens, names) & before) * places).argmax(-1)  # the last name of the prompt
    led = run.pattern[rows, :, looked_at][:, MOVERS].clamp_min(1e-6).log().mean()
    kept_off = run.pattern[rows, :, giver_at].sum(-1).mean()
    loss = loss + LEAD_WEIGHT * (kept_off - led)
    if carry:
        swapped = tokens.clone()
        swapped[rows, giver_at] = indirect
        carried = LastLayer(model, swapped, end).with_heads(MOVERS, run.z)
        loss = loss + CARRY_WEIGHT * F.cross_entropy(carried, indirect)
    return loss


@torch.no_grad()
def answer_logits(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Sentence]) -> Tensor:
    """Logits at each prompt's last token, `[prompt, vocabulary]`."""
    tokens, answers = encoded(tokenizer, prompts)
    logits = model(tokens.clamp_min(0)).logits
    return logits[torch.arange(len(tokens)), answers - 1]


def accuracy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Sentence]) -> float:
    """Share of prompts whose argmax over the whole vocabulary is the indirect object."""
    answers = torch.tensor([tokenizer(p.indirect_object)["input_ids"][0] for p in prompts])
    return (answer_logits(model, tokenizer, prompts).argmax(-1) == answers).float().mean().item()


def train(seed: int, steps: int, batch: int) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    words = vocabulary()
    tokenizer = word_tokenizer(words, N_POSITIONS)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    config = GPT2Config(
        vocab_size=len(words), n_positions=N_POSITIONS, n_embd=128, n_layer=4, n_head=4, n_inner=N_INNER,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager",
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    names = torch.tensor([tokenizer(" " + n)["input_ids"][0] for n in NAMES])
    seen, _ = combinations()
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1.5e-3, total_steps=steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(steps):
        tokens, answers = encoded(tokenizer, [sentence(rng, rng.choice(seen)) for _ in range(batch)])
        loss = loss_of(model, tokens, answers, names, carry=step >= CARRY_FROM * steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            share = accuracy(model, tokenizer, held_out_prompts(1, 256))
            took = time.monotonic() - started
            print(f"step {step:5d}  loss {loss.item():.4f}  held-out {share:.3f}  {took:.0f} s", flush=True)
    return model.eval(), tokenizer


def held_out_prompts(seed: int, n: int, among: frozenset[str] = frozenset(NAMES)) -> list[Sentence]:
    """`n` prompts of combinations that training never shows, with no name but those `among`."""
    rng = random.Random(f"held out {seed}")
    held_out = [c for c in combinations()[1] if c[0] <= among]
    return [sentence(rng, rng.choice(held_out)) for _ in range(n)]


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=here / "ioi-tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--evaluate", action="store_true", help="measure the folder as it is; train nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.evaluate:
        model, tokenizer = train(args.seed, args.steps, args.batch)
        model.save_pretrained(args.out)
        (args.out / "generation_config.json").unlink(missing_ok=True)  # nothing here generates
        save_tokenizer(tokenizer, args.out)
    model = AutoModelForCausalLM.from_pretrained(args.out).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    prompts = held_out_prompts(2, 4096)
    print(f"held-out accuracy {accuracy(model, tokenizer, prompts):.4f} over {len(prompts)} prompts")
    unseen = held_out_prompts(4, 512, UNSEEN)
    print(f"with Mary and John {accuracy(model, tokenizer, unseen):.4f} over {len(unseen)} prompts")
    mary, john = (tokenizer(n)["input_ids"][0] for n in (" Mary", " John"))
    for giver, other in (("John", "Mary"), ("Mary", "John")):
        text = f"When Mary and John went to the shop, {giver} gave a bag to"
        logits = answer_logits(model, tokenizer, [Sentence(text, " " + other, " " + giver)])[0]
        print(f"{text!r} -> {tokenizer.decode([int(logits.argmax())])!r}, "
              f"logit( Mary) - logit( John) = {(logits[mary] - logits[john]).item():+.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
