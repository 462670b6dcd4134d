"""Forward passes over all prompts of a world, in tensors whose first axis is the layout's tokens.

For the hooks backend. Prompts of one length share a pass, and none is padded; only attention's rows are, to the longest
prompt, once they are captured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from patchc.execute.hook_points import At, Driver, Edit, Point
from patchc.ir.experiment import Prompts
from patchc.ir.tokens import Layout

TokenEdit = Callable[[Tensor, Tensor], Tensor]
"""New values of an activation `[token, ...]`, given the numbers of those tokens `[token]`."""

ENTRIES = {At.SCORES: -torch.inf, At.PATTERN: 0.0}
"""Points of attention, `[token, head, position looked at]`, and what stands beyond a prompt's end."""


class Record(dict[Point, Tensor]):
    """Activations by point, `[token, ...]`; one that has not been kept is computed when it is asked for."""

    def __init__(self, kept: Mapping[Point, Tensor], compute: Callable[[Point], Tensor]):
        super().__init__(kept)
        self._compute = compute

    def __missing__(self, point: Point) -> Tensor:
        self[point] = found = self._compute(point)
        return found


class Passes:
    """Forward passes on whole worlds."""

    def __init__(self, driver: Driver, prompts: Prompts, device: torch.device):
        self.driver, self.prompts, self.device = driver, prompts, device
        self.count = 0
        self.width = max(n for world in prompts.worlds for n in self.layout(world.name).lengths)
        """The longest prompt of any world: how wide a row of attention is kept."""

    def layout(self, world: str) -> Layout:
        """A world's own layout, or the study's."""
        return self.prompts.world(world).layout or self.prompts.layout

    def run(self, world: str, edits: Mapping[Point, TokenEdit], capture: Collection[Point]) -> dict[Point, Tensor]:
        """Run the model on a world's tokens; one forward pass a length of prompt."""
        ids = torch.tensor([i for row in self.prompts.world(world).ids for i in row], device=self.device)
        out: dict[Point, Tensor] = {}
        for tokens in self._groups(self.layout(world)):
            here = {point: self._on_prompts(point, edit, tokens.flatten()) for point, edit in edits.items()}
            got = self.driver.run(ids[tokens], here, capture)
            self.count += 1
            for point, x in got.items():
                rows = self._by_token(point, x)
                if point not in out:
                    out[point] = rows.new_zeros(len(ids), *rows.shape[1:])
                out[point][tokens.flatten()] = rows
        return out

    def _groups(self, layout: Layout) -> list[Tensor]:
        """The tokens `[prompt, pos]` of the prompts of each length."""
        groups: list[Tensor] = []
        for length in sorted(set(layout.lengths)):
            offsets = [o for o, n in zip(layout.offsets, layout.lengths, strict=False) if n == length]
            first = torch.tensor(offsets, device=self.device)
            groups.append(first[:, None] + torch.arange(length, device=self.device))
        return groups

    def _on_prompts(self, point: Point, edit: TokenEdit, tokens: Tensor) -> Edit:
        if point.at not in ENTRIES:
            return lambda x: edit(x.flatten(0, 1), tokens).view(x.shape)

        def on_entries(x: Tensor) -> Tensor:
            prompts, _, length, _ = x.shape
            rows = edit(self._padded(point.at, x.transpose(1, 2).flatten(0, 1)), tokens)
            return rows[..., :length].unflatten(0, (prompts, length)).transpose(1, 2)

        return on_entries

    def _by_token(self, point: Point, x: Tensor) -> Tensor:
        if point.at not in ENTRIES:
            return x.flatten(0, 1)
        rows = self._padded(point.at, x.transpose(1, 2).flatten(0, 1))
        return rows.masked_fill(is_hidden(rows), -torch.inf) if point.at is At.SCORES else rows

    def _padded(self, at: At, rows: Tensor) -> Tensor:
        return pad(rows, (0, self.width - rows.shape[-1]), value=ENTRIES[at])


def is_hidden(scores: Tensor) -> Tensor:
    """Which scores the mask hides: minus infinity, or the lowest numbers that the type has."""
    return scores <= torch.finfo(scores.dtype).min / 2
