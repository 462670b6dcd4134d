"""Attention scores and patterns of plain runs, row by row: only the rows that some variant reads are ever computed.

A row is what one token's query makes of every position of its prompt, `[position]`; values at rows are combined here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from patchc.execute.averages import Average
from patchc.execute.base import PlainRun, token_numbers
from patchc.execute.noise import entry_noise
from patchc.execute.stored import Stored
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Source, Value
from patchc.ir.ops import PATTERN, SCORES
from patchc.ir.paths import Site
from patchc.ir.tokens import Layout
from patchc.model.pieces import Tables

HIDDEN = float("-inf")
SITES = {SCORES: Site.SCORES, PATTERN: Site.PATTERN}


def pattern_of(scores: Tensor) -> Tensor:
    """The softmax over the last axis; zero in rows of which nothing is visible."""
    dead = (scores == HIDDEN).all(-1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0)


def _stretches(prompts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Each prompt of an ordered list, where it begins there and how often it stands."""
    first = 0
    for prompt, same in groupby(prompts):
        n = len(list(same))
        yield prompt, first, n
        first += n


@dataclass(frozen=True)
class PlainRows:
    """Rows of one head of one attention block in the plain runs."""

    stored: Stored
    tables: Tables
    block: int
    layer: int
    head: int

    def scores(self, run: PlainRun, tokens: Tensor, width: int) -> Tensor:
        """Scores of queries at `tokens` `[n]` -> `[n, width]`: minus infinity where hidden, and beyond a prompt.

        Token numbers are looked at one by one: like all of this class they are wanted on the CPU."""
        return self._scores(run, self.stored.layout, self.tables, tokens, width)

    def _scores(self, run: PlainRun, layout: Layout, tables: Tables, tokens: Tensor, width: int) -> Tensor:
        chosen, back = torch.unique(tokens.cpu(), return_inverse=True)
        out = self._hidden(len(chosen), width)
        prompts = [layout.place(t)[0] for t in chosen.tolist()]
        for prompt, first, n in _stretches(prompts):  # tokens are in order, so each prompt's are together
            mine = slice(first, first + n)
            shown = self._of_prompt(run, layout, tables, prompt, chosen[mine])[:, :width]
            out[mine, : shown.shape[1]] = shown
        return out[back.to(out.device)]

    def _hidden(self, n: int, width: int) -> Tensor:
        return torch.full((n, width), HIDDEN, device=self.stored.pieces.device, dtype=self.stored.pieces.dtype)

    def _of_prompt(self, run: PlainRun, layout: Layout, tables: Tables, prompt: int, tokens: Tensor) -> Tensor:
        pieces = self.stored.pieces
        q, k, _ = run.attention[self.block].ready
        keys, tokens = token_numbers(layout, [prompt], pieces.device), tokens.to(pieces.device)
        positions = (tokens - layout.offsets[prompt])[None]
        asked, looked_at = q[tokens][None, :, [self.head]], k[keys][:, :, [pieces.kv_head(self.head)]]
        length = layout.lengths[prompt]
        return pieces.scores(self.layer, asked, looked_at, positions, length, tables, [self.head])[0, 0]

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
                return self.of_world(port, world, tokens, width)
            case Mean():
                return self._mean(port, source, tokens, width)
            case Moved(of, places):
                moved = torch.tensor(places, device=tokens.device)[tokens]
                return self._source(port, of, moved, width)
            case Blocked():
                return self._hidden(len(tokens), width)
            case Noise():
                return self._noise(port, source, tokens, width)
            case Given():
                return self.stored.given(source, tokens.to(self.stored.pieces.device))[:, :width]
            case Itself():
                raise AssertionError(f"no value of attention scores or patterns: {source}")

    def of_world(self, port: int, world: str, tokens: Tensor, width: int) -> Tensor:
        """Rows of a world at tokens of its own layout."""
        layout = self.stored.prompts.world(world).layout
        tables = self.tables if layout is None else self.stored.pieces.tables(layout)
        layout = layout or self.stored.layout
        # A token of a longer prompt looks at more than this many positions: its softmax is over all of them.
        longest = max(width, *layout.lengths)
        scores = self._scores(self.stored.runs[world], layout, tables, tokens, longest)
        return (scores if port == SCORES else pattern_of(scores))[:, :width]

    def _noise(self, port: int, noise: Noise, tokens: Tensor, width: int) -> Tensor:
        """Noise has rows of the prompt's length."""
        graph, prompts = self.stored.pieces.graph, self.stored.prompts
        name = f"{graph.nodes[graph.blocks[self.block].first + self.head].name}.{SITES[port]}"
        out = torch.zeros(len(tokens), width, dtype=torch.float64)
        for i, token in enumerate(tokens.tolist()):
            row, position = prompts.layout.place(token)
            length = prompts.layout.lengths[row]
            numbers = torch.from_numpy(entry_noise(noise, name, row % prompts.n, position, length))
            out[i, :length] = numbers[:width] * noise.std
        return out.to(self.stored.pieces.device, self.stored.pieces.dtype)

    def _mean(self, port: int, mean: Mean, tokens: Tensor, width: int) -> Tensor:
        """The mean of rows, entry by entry: of patterns what is hidden counts as zero, of scores it does not count."""
        how = self.stored.average(mean)
        key = (self.block, self.head, port, mean)
        if key not in self.stored.row_means:
            self.stored.row_means[key] = self._means(port, mean, how)
        classes = torch.tensor(how.of)[tokens.cpu()].to(self.stored.pieces.device)
        return self.stored.row_means[key][classes, :width]

    def _means(self, port: int, mean: Mean, how: Average) -> Tensor:
        """The mean of every class of tokens, `[class, position]`, as wide as the longest prompt."""
        layout = self.stored.prompts.world(mean.world).layout or self.stored.layout
        rows = self.of_world(port, mean.world, torch.arange(layout.n_tokens), max(self.stored.layout.lengths))
        shown = rows != HIDDEN
        total = how.sums(rows.masked_fill(~shown, 0))
        count = how.sums((shown if port == SCORES else torch.ones_like(shown)).to(rows.dtype))
        return (total / count.clamp_min(1)).masked_fill(count == 0, HIDDEN)
