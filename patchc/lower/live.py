"""Which atoms of a cell's automaton can make a difference, and at which ranks: those that can match there and still
lead down to a start. Worked out rank by rank as the fold asks, since most cells ask at few ranks.
"""

from __future__ import annotations

from collections.abc import Callable

from patchc.ir.bits import bits, bitset
from patchc.ir.dag import NEVER
from patchc.ir.graph import Nodes
from patchc.lower.automaton import Atoms, Automaton

Ranks = int
"""A set of ranks (see `ir.bits`)."""


class ByRank(dict[int, Atoms]):
    """Sets of atoms by rank, each worked out when it is first asked for."""

    def __init__(self, find: Callable[[int], Atoms]):
        self._find = find

    def __missing__(self, rank: int) -> Atoms:
        found = self[rank] = self._find(rank)
        return found


class Live:
    """`at[r]`: atoms that can match a node of rank r and still lead to a start; `stream_at[r]`: those of streams that
    start below rank r; `under[r]`: all of them below r. `ranks_of` gives the ranks that some nodes have."""

    def __init__(self, automaton: Automaton, ranks_of: Callable[[Nodes], Ranks]):
        self._automaton = automaton
        self._nodes = [ranks_of(step.nodes) for step in automaton.steps]
        self._entry = self._entries()
        self._ranks = [
            ranks >> entry << entry if entry < NEVER else 0
            for ranks, entry in zip(self._nodes, self._entry, strict=True)
        ]
        self.stream_at = ByRank(lambda _: 0)
        for i in bits(automaton.stream_atoms):
            rank = automaton.steps[i].rank
            self.stream_at[rank] |= 1 << i
            self._ranks[i] = 1 << rank - 1 if rank else 0
        # These refer to the lists and not to `self`: a circle of objects a cell would be garbage that stays.
        ranks, entry, streams = self._ranks, self._entry, automaton.stream_atoms
        self.at = ByRank(lambda rank: bitset(i for i, here in enumerate(ranks) if here >> rank & 1) & ~streams)
        self.under = ByRank(lambda rank: bitset(i for i, lowest in enumerate(entry) if lowest < rank))

    def ranks(self, c: Atoms) -> Ranks:
        """The ranks at which some of these atoms can match, or put a value into the stream just above."""
        out = 0
        for i in bits(c):
            out |= self._ranks[i]
        return out

    def _entries(self) -> list[int]:
        """The lowest rank at which each atom can match and a start (or a complement's end) can still be reached."""
        automaton = self._automaton
        ends = automaton.start_atoms | automaton.accepts | automaton.watch_atoms
        entry = [NEVER] * len(self._nodes)
        for i in bits(automaton.stream_atoms):
            entry[i] = automaton.steps[i].rank - 1
        moved = True
        while moved:
            moved = False
            for i, before in enumerate(automaton.before):
                lowest = 0 if ends >> i & 1 else 1 + min([entry[j] for j in bits(before)], default=NEVER)
                ranks = self._nodes[i] >> lowest if lowest < NEVER else 0
                first = lowest + (ranks & -ranks).bit_length() - 1 if ranks else NEVER
                if first < entry[i]:
                    entry[i] = first
                    moved = moved or bool(automaton.read_later >> i & 1)
        return entry
