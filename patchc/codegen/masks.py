"""The masks of a compiled graph as graph nodes: one number, a table of many, and what stands at some tokens only."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from patchc.codegen.sources import ONE_LENGTH
from patchc.codegen.worlds import Worlds, aten
from patchc.ir.bits import bits
from patchc.ir.tokens import Layout, Tokens

Start = tuple[int, Tokens]
"""The number of a mask, and the tokens at which it acts."""


class Masks:
    """Writes masks into the graph of `worlds`. s = pos."""

    def __init__(self, worlds: Worlds, layout: Layout):
        self.worlds, self.call, self.layout = worlds, worlds.call, layout
        self.flat = self.call(aten.reshape.default, worlds.argument("masks"), [-1])
        self._numbers: dict[int, fx.Node] = {}
        self._padded: fx.Node | None = None

    def of(self, number: int) -> fx.Node:
        """One mask."""
        if number not in self._numbers:
            self._numbers[number] = self.call(operator.getitem, self.flat, number, name=f"mask_{number}")
        return self._numbers[number]

    def table(self, slots: Sequence[Sequence[Start]]) -> fx.Node | None:
        """The masks of slots, `[slot]`, or `[s, slot]` where some act at some positions only, 0 where there is none.
        None where positions differ from prompt to prompt or two masks meet in one slot."""
        everywhere = all(tokens & self.layout.all == self.layout.all for slot in slots for _, tokens in slot)
        if everywhere:
            if any(len(slot) > 1 for slot in slots):
                return None
            return self._picked([slot[0][0] if slot else -1 for slot in slots], ())
        n = self.length()
        index = [[-1] * len(slots) for _ in range(n)]
        for column, slot in enumerate(slots):
            for mask, tokens in slot:
                rows = self.rows(tokens)
                if rows is not None and rows.shape[0] > 1:
                    return None
                for position in range(n) if rows is None else rows[0].nonzero()[:, 0].tolist():
                    if index[position][column] >= 0:
                        return None
                    index[position][column] = mask
        return self._picked([mask for row in index for mask in row], (n,))

    def _picked(self, numbers: list[int], axes: tuple[int, ...]) -> fx.Node:
        """These masks, `[*axes, -1]`: a slice where they are numbered in order."""
        if numbers[0] >= 0 and numbers == list(range(numbers[0], numbers[0] + len(numbers))):
            first, name = numbers[0], f"masks_from_{numbers[0]}"
            picked = self.call(aten.narrow.default, self.flat, 0, first, len(numbers), name=name)
        else:
            shift = -1 in numbers
            flat = self._with_zero() if shift else self.flat
            index = torch.tensor(numbers, device=self.worlds.pieces.device) + shift
            picked = self.call(aten.index_select.default, flat, 0, self.worlds.buffer("masks_of", index))
        return self.call(aten.reshape.default, picked, [*axes, -1]) if axes else picked

    def _with_zero(self) -> fx.Node:
        """The masks, after a zero for whatever has none."""
        if self._padded is None:
            zero = self.call(aten.new_zeros.default, self.flat, [1])
            self._padded = self.call(aten.cat.default, [zero, self.flat], 0)
        return self._padded

    # ---- tokens
    def at(self, tokens: Tokens, x: fx.Node, extra_axes: int = 1) -> fx.Node:
        """`x` at these tokens, zero elsewhere."""
        rows = self.rows(tokens)
        if rows is None:
            return x
        place = self.worlds.buffer("at", rows.view(*rows.shape, *[1] * extra_axes))
        return self.call(operator.mul, x, place)

    def rows(self, tokens: Tokens) -> Tensor | None:
        """One at these tokens and zero elsewhere, `[prompt or 1, s]`; None for every token."""
        layout = self.layout
        tokens &= layout.all
        if tokens == layout.all:
            return None
        rows = torch.zeros(layout.n_prompts, self.length())
        for t in bits(tokens):
            rows[layout.place(t)] = 1
        rows = rows[:1] if bool((rows == rows[:1]).all()) else rows
        return rows.to(self.worlds.pieces.device, self.worlds.pieces.dtype)

    def length(self) -> int:
        """The one length of the study's prompts."""
        lengths = set(self.layout.lengths)
        if len(lengths) > 1:
            raise ONE_LENGTH.error("a compiled graph with named positions needs prompts of one length")
        return lengths.pop()
