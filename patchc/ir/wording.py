"""How the parts of a printed study are written down: names, numbers, lists and tokens, whole or for a quick look.

What a study consists of is for the files that print it; `reader` reads the whole form back.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from patchc.ir.tokens import Layout

CELLS = 3
"""How many cells of a sweep are printed for a look."""
ITEMS = 12
"""How many coordinates, prompts and edges of one list are."""

RESERVED = frozenset(
    (
        "all at blocked by cell cells copies dim dot every except expect experiment False follows from groups in "
        "includes inf interval kl mean measure model nan neurons no noise none not of or over patch path per ports "
        "positions prompt prompts rank reads resamples run save seed self show sigma site sources std tensor to "
        "tokens top True turn unit unpatched via what with within world zero"
    ).split()
)
"""Names that are written in quotes, because the printed form has them as words."""

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class Wording:
    """Writes for a study of this layout: with `whole` nothing is left out and numbers are exact; otherwise lists are
    cut and what is the same in every prompt is told once."""

    layout: Layout
    whole: bool = False

    def name(self, name: str) -> str:
        """A name, in the whole form quoted where it could be taken for something else."""
        bare = not self.whole or (_BARE.fullmatch(name) and name not in RESERVED)
        return name if bare else repr(name)

    def number(self, number: float) -> str:
        return repr(number) if self.whole else f"{number:g}"

    def listed(self, items: Sequence[str]) -> str:
        shown = items if self.whole else items[:ITEMS]
        rest = len(items) - len(shown)
        return ", ".join(shown) + (f", and {rest} more" if rest else "")

    def distinct(self, items: Iterable[str]) -> list[str]:
        """All of them; for a look each once."""
        return list(items if self.whole else dict.fromkeys(items))

    def first(self, items: Sequence[str], most: int) -> Iterator[str]:
        """Lines, the first few for a look."""
        yield from items if self.whole else items[:most]
        if not self.whole and len(items) > most:
            yield f"  and {len(items) - most} more"

    # ---- tokens

    def place(self, token: int) -> str:
        """`3`, or `1:3` (prompt:position) where there are several prompts."""
        prompt, position = self.layout.place(token)
        return str(position) if self.layout.n_prompts == 1 else f"{prompt}:{position}"

    def spots(self, tokens: Iterable[int]) -> str:
        """`{0, 3}` or `{0:3, 1:4}`."""
        return "{" + self.listed([self.place(t) for t in tokens]) + "}"

    def read_at(self, tokens: Iterable[int]) -> str:
        """A token a prompt; for a look the positions, each once."""
        if self.whole:
            return ", ".join(map(self.place, tokens))
        return ", ".join(dict.fromkeys(str(self.layout.place(t)[1]) for t in tokens))

    def ranges(self, numbers: Sequence[int]) -> str:
        """`3`, or `{1, 5..9}`, of ascending numbers."""
        runs: list[list[int]] = []
        for n in numbers:
            if runs and runs[-1][-1] == n - 1:
                runs[-1].append(n)
            else:
                runs.append([n])
        shown = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs]
        return shown[0] if len(shown) == 1 else "{" + self.listed(shown) + "}"
