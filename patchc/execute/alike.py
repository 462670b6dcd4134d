"""How attention of whole suffixes looks at its prompts: index tensors by which prompts of one form are computed
together. What they index is `suffix`'s matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from patchc.ir.bits import bits
from patchc.ir.program import GATHERED
from patchc.ir.tokens import Layout, Tokens


@dataclass(frozen=True, slots=True)
class Alike:
    """Prompts on which a kind of run looks the same: their length, the queries' positions, how many keys they read;
    where their changed tokens stand among those that come in, at which positions; where their queries stand among
    those that go out, and which of them have changed themselves."""

    length: int
    n_keys: int
    tokens: Tensor
    """`[prompt, key]`, numbers of tokens."""
    queries: Tensor
    """`[query]`, positions."""
    changed: Tensor
    """`[changed key]`, positions."""
    incoming: Tensor | None
    """`[prompt, changed key]`, rows among those that come in; None where they are all of them, in order."""
    outgoing: Tensor | None
    """`[prompt, query]`, rows among those that go out, likewise."""
    asking: Tensor | None
    """`[prompt, changed query]`, rows among those that are projected to queries, likewise."""
    asking_at: Tensor
    """`[changed query]`, places among the queries."""

    def pick(self, x: Tensor, places: Tensor | None) -> Tensor:
        """Rows `[run, row, ...]` as `[run, prompt, token, ...]`."""
        return x.unflatten(1, (len(self.tokens), -1)) if places is None else x[:, places]


@lru_cache(maxsize=256)
def alike(layout: Layout, causal: bool, incoming: Tokens, outgoing: Tokens, device: torch.device) -> tuple[Alike, ...]:
    """How attention reads `incoming` changed tokens to compute `outgoing` ones, prompts of one form together."""
    forms: dict[tuple[int, Tokens, Tokens], list[int]] = {}
    for prompt, asked in layout.split(outgoing):
        length = layout.lengths[prompt]
        mine = incoming >> layout.offsets[prompt] & ((1 << length) - 1)
        n_keys = asked.bit_length() if causal else length
        forms.setdefault((length, mine & ((1 << n_keys) - 1), asked), []).append(prompt)
    out: list[Alike] = []
    both = incoming & outgoing
    for (length, mine, asked), prompts in _divided(forms, causal):
        n_keys = asked.bit_length() if causal else length
        queries, changed = list(bits(asked)), list(bits(mine))
        at = [layout.offsets[p] for p in prompts]
        twice = [q for q in queries if mine >> q & 1]
        out.append(
            Alike(
                length,
                n_keys,
                torch.tensor([list(range(o, o + n_keys)) for o in at], device=device),
                torch.tensor(queries, device=device),
                torch.tensor(changed, dtype=torch.long, device=device),
                _places(incoming, [[o + p for p in changed] for o in at], device),
                _places(outgoing, [[o + p for p in queries] for o in at], device),
                _places(both, [[o + p for p in twice] for o in at], device),
                torch.tensor([queries.index(q) for q in twice], dtype=torch.long, device=device),
            )
        )
    return tuple(out)


def _divided(
    forms: Mapping[tuple[int, Tokens, Tokens], Sequence[int]], causal: bool
) -> Iterator[tuple[tuple[int, Tokens, Tokens], Sequence[int]]]:
    """The prompts of each form, as many at a time as one attention call may gather."""
    for form, prompts in forms.items():
        length, _, asked = form
        rows = asked.bit_count() + 2 * (asked.bit_length() if causal else length)
        step = max(1, GATHERED // rows)
        yield from ((form, prompts[i : i + step]) for i in range(0, len(prompts), step))


def _places(have: Tokens, tokens: list[list[int]], device: torch.device) -> Tensor | None:
    """Where tokens stand among the rows of a set; None where they are all of it, in order."""
    places = [[(have & ((1 << t) - 1)).bit_count() for t in row] for row in tokens]
    flat = [place for row in places for place in row]
    whole = bool(flat) and flat == list(range(have.bit_count()))
    return None if whole else torch.tensor(places, dtype=torch.long, device=device)
