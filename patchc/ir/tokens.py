"""Which tokens: every token of every prompt has one number, and a set of them is an int (see `ir.bits`).

Prompts stand one after another, each at its own length: there is no padding. Token = offset of its prompt + position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from patchc.ir.bits import bits, bitset

Tokens = int


@dataclass(frozen=True)
class Layout:
    """The lengths of the prompts, and what follows from them."""

    lengths: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        out = [0]
        for n in self.lengths:
            out.append(out[-1] + n)
        return tuple(out)

    @property
    def n_prompts(self) -> int:
        return len(self.lengths)

    @cached_property
    def n_tokens(self) -> int:
        return self.offsets[-1]

    @cached_property
    def all(self) -> Tokens:
        """Every token of every prompt."""
        return (1 << self.n_tokens) - 1

    def prompt(self, prompt: int) -> Tokens:
        """Every token of one prompt."""
        return ((1 << self.lengths[prompt]) - 1) << self.offsets[prompt]

    def token(self, prompt: int, position: int) -> int:
        """The number of a token; a negative position counts from the prompt's end."""
        length = self.lengths[prompt]
        if not -length <= position < length:
            raise IndexError(f"position {position} is outside prompt {prompt} of {length} tokens")
        return self.offsets[prompt] + position % length

    def place(self, token: int) -> tuple[int, int]:
        """Prompt and position of a token."""
        return self._places[token]

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        return [(i, p) for i, n in enumerate(self.lengths) for p in range(n)]

    def at(self, position: int) -> Tokens:
        """That position of every prompt that has it."""
        return bitset(self.token(i, position) for i, n in enumerate(self.lengths) if -n <= position < n)

    def split(self, tokens: Tokens) -> list[tuple[int, Tokens]]:
        """(prompt, positions as a set) for each prompt that has a token in the set."""
        out: list[tuple[int, Tokens]] = []
        for i, (offset, n) in enumerate(zip(self.offsets, self.lengths, strict=False)):
            if here := tokens >> offset & ((1 << n) - 1):
                out.append((i, here))
        return out

    @cached_property
    def _upward(self) -> tuple[tuple[int, Tokens], ...]:
        """(shift, tokens whose position is at least shift): a set smeared to the right never leaves its prompt."""
        steps: list[tuple[int, Tokens]] = []
        shift = 1
        while shift < max(self.lengths, default=0):
            steps.append((shift, bitset(t for t, (_, p) in enumerate(self._places) if p >= shift)))
            shift *= 2
        return tuple(steps)

    @cached_property
    def _downward(self) -> tuple[tuple[int, Tokens], ...]:
        return tuple(
            (shift, bitset(t for t, (i, p) in enumerate(self._places) if self.lengths[i] - p > shift))
            for shift, _ in self._upward
        )

    def after(self, tokens: Tokens) -> Tokens:
        """These tokens and every later one of the same prompt: what causal attention can change."""
        return _smear_right(self, tokens)

    def upto(self, tokens: Tokens) -> Tokens:
        """These tokens and every earlier one of the same prompt: what causal attention can read."""
        return _smear_left(self, tokens)

    def whole(self, tokens: Tokens) -> Tokens:
        """Every token of every prompt that has one in the set."""
        return self.after(self.upto(tokens))

    def numbers(self, tokens: Tokens) -> list[int]:
        return list(bits(tokens))


@lru_cache(maxsize=65536)
def _smear_right(layout: Layout, tokens: Tokens) -> Tokens:
    for shift, allowed in layout._upward:  # pyright: ignore[reportPrivateUsage]
        tokens |= (tokens << shift) & allowed
    return tokens


@lru_cache(maxsize=65536)
def _smear_left(layout: Layout, tokens: Tokens) -> Tokens:
    for shift, allowed in layout._downward:  # pyright: ignore[reportPrivateUsage]
        tokens |= (tokens >> shift) & allowed
    return tokens
