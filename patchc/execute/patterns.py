"""Attention scores and patterns of plain runs, row by row: only the rows that some variant reads are ever computed.

A row is what one token's query makes of every position of its prompt, `[position]`; values at rows are combined here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from patchc.execute.base import PlainRun, token_numbers
from patchc.execute.stored import Stored
from patchc.ir.dag import SCORES
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Source, Value
from patchc.model.pieces import Tables

HIDDEN = float("-inf")


def pattern_of(scores: Tensor) -> Tensor:
    """The softmax over the last axis; zero in rows of which nothing is visible."""
    dead = (scores == HIDDEN).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


@dataclass(frozen=True)
class PlainRows:
    """Rows of one head of one attention block in the plain runs."""

    stored: Stored
    tables: Tables
    block: int
    layer: int
    head: int

    def scores(self, run: PlainRun, tokens: Tensor, width: int) -> Tensor:
        """Scores of queries at `tokens` `[n]` -> `[n, width]`: minus infinity where hidden, and beyond a prompt."""
        chosen, back = torch.unique(tokens, return_inverse=True)
        layout = self.stored.layout
        out = torch.full((len(chosen), width), HIDDEN, device=tokens.device, dtype=self.stored.pieces.dtype)
        prompts = [layout.place(t)[0] for t in chosen.tolist()]
        for prompt in sorted(set(prompts)):
            mine = torch.tensor([i for i, p in enumerate(prompts) if p == prompt], device=tokens.device)
            length = layout.lengths[prompt]
            shown = self._of_prompt(run, prompt, chosen[mine])[:, :width]
            out[mine[:, None], torch.arange(min(length, width), device=tokens.device)] = shown
        return out[back]

    def _of_prompt(self, run: PlainRun, prompt: int, tokens: Tensor) -> Tensor:
        pieces, layout = self.stored.pieces, self.stored.layout
        q, k, _ = run.attention[self.block].ready
        keys = token_numbers(layout, [prompt], tokens.device)
        positions = (tokens - layout.offsets[prompt])[None]
        asked, looked_at = q[tokens][None, :, [self.head]], k[keys][:, :, [pieces.kv_head(self.head)]]
        length = layout.lengths[prompt]
        return pieces.scores(self.layer, asked, looked_at, positions, length, self.tables, [self.head])[0, 0]

    def value(self, port: int, value: Value, tokens: Tensor, own: Tensor) -> Tensor:
        """Rows of scores or patterns under `value` at `tokens`; `own` `[n, width]` is what the run itself has there."""
        out = torch.zeros_like(own)
        for factor, source in value.terms:
            row = own if isinstance(source, Itself) else self._source(port, source, tokens, own.shape[1])
            out = out + factor * row
        return out

    def _source(self, port: int, source: Source, tokens: Tensor, width: int) -> Tensor:
        match source:
            case FromWorld(world):
                # A token of a longer prompt looks at more than this many positions: its softmax is over all of them.
                longest = max(width, max(self.stored.layout.lengths))
                scores = self.scores(self.stored.runs[world], tokens, longest)
                return (scores if port == SCORES else pattern_of(scores))[:, :width]
            case Mean():
                return self._mean(port, source, tokens, width)
            case Moved(of, places):
                moved = torch.tensor(places, device=tokens.device)[tokens]
                return self._source(port, of, moved, width)
            case Blocked():
                return torch.full((len(tokens), width), HIDDEN, device=tokens.device, dtype=self.stored.pieces.dtype)
            case Noise() | Given() | Itself():
                raise AssertionError(f"no value of attention scores or patterns: {source}")

    def _mean(self, port: int, mean: Mean, tokens: Tensor, width: int) -> Tensor:
        """The mean of rows, entry by entry: of patterns what is hidden counts as zero, of scores it does not count."""
        out: list[Tensor] = []
        for token in tokens.tolist():
            rows = self._source(port, FromWorld(mean.world), self._averaged(mean, token, tokens.device), width)
            shown = rows != HIDDEN
            total = rows.masked_fill(~shown, 0).sum(0)
            count = shown.sum(0) if port == SCORES else torch.full_like(total, len(rows))
            out.append((total / count.clamp_min(1)).masked_fill(count == 0, HIDDEN))
        return torch.stack(out)

    def _averaged(self, mean: Mean, token: int, device: torch.device) -> Tensor:
        """The tokens over which a mean at `token` is taken."""
        layout = self.stored.layout
        if mean.over_positions:
            return torch.arange(layout.n_tokens, device=device)
        position = layout.place(token)[1]
        return torch.tensor([layout.offsets[p] + position for p, n in enumerate(layout.lengths) if n > position])
