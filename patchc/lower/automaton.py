"""All patches of a cell as one automaton that reads paths from the logits back.

Every occurrence of a step in a patch's path is an *atom*, a bit. `before[i]` holds the atoms that may match the node
upstream of one matched by atom i (the position automaton of Glushkov 1961, reversed). A set of atoms is a state.
A complement patch has one more bit, its *watch*: it matches every node, and a node where the watch stands alone is on
no path of the patch's set any more, so the value enters there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from patchc.ir.bits import bits, bitset
from patchc.ir.experiment import Patch, Value
from patchc.ir.graph import QKV, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens

PORT_SITES = (Site.Q, Site.K, Site.V)
INNER_SITES = (*PORT_SITES, Site.SCORES, Site.PATTERN)
"""What can be set inside a head, by its number in `dag.Replaced`."""
ENTERS: dict[Site, tuple[int | None, ...]] = {
    Site.Q: (0,), Site.K: (1,), Site.V: (2,), Site.SCORES: (0, 1), Site.PATTERN: (0, 1), Site.IN: (None,)
}  # fmt: skip
"""The ports of a node whose paths all go through a site."""

Atoms = int
"""A set of atoms: a state of the automaton."""


@dataclass(frozen=True, slots=True)
class Start:
    """An atom at which a value enters: `patch` is the patch's place in the cell."""

    patch: int
    value: Value


class Automaton:
    """Built once a cell; everything in it is a number or a set of atoms."""

    def __init__(self, patches: tuple[Patch, ...], graph: ResidualGraph):
        self.graph = graph
        self.steps: list[Step] = []
        self.before: list[Atoms] = []
        self.starts: dict[int, Start] = {}
        """Atoms of ordinary patches at which their value enters."""
        self.accepts: Atoms = 0
        """Atoms of complement patches at which a path is wholly in the set."""
        self.watches: dict[int, tuple[Atoms, Start]] = {}
        """For each watch: the atoms that it watches, and the value that enters where none of them matches."""
        self.partial: list[int] = []
        """Complement patches whose own paths begin at a part of a pattern or of an MLP's neurons."""
        self.last: list[tuple[int, Step]] = []
        """The atoms at which paths end, with the steps as they are written."""
        for number, patch in enumerate(patches):
            self._add_patch(number, patch)
        self.start_atoms = bitset(self.starts)
        self.watch_atoms = bitset(self.watches)
        self._sort_atoms()

    def _sort_atoms(self) -> None:
        """Atoms by what their steps say."""
        self.plain = self.via = self.stream_atoms = self.attn_out_atoms = self.read_later = 0
        for i, step in enumerate(self.steps):
            atom = 1 << i
            self.read_later |= self.before[i] & -(2 << i)
            if step.via is not None:
                self.via |= atom
            if step.site is Site.OUT:
                self.plain |= atom if step.ports == QKV and step.tokens == EVERYWHERE else 0
            elif step.site is Site.STREAM:
                self.stream_atoms |= atom & self.start_atoms
            elif step.site is Site.ATTN_OUT:
                self.attn_out_atoms |= atom & self.start_atoms

    def _add_patch(self, number: int, patch: Patch) -> None:
        first_atom = len(self.steps)
        _, first, last = self._add(patch.path)
        start = Start(number, patch.value)
        self.last += [(i, self.steps[i]) for i in bits(last)]
        if patch.complement:
            for i in bits(first):
                if not self._is_whole(self.steps[i]):
                    self.partial.append(number)
                self._accept(i)
        else:
            self.starts.update(dict.fromkeys(bits(first), start))
        if not patch.complement:
            return
        own = ((1 << len(self.steps)) - 1) & ~((1 << first_atom) - 1)
        watch = len(self.steps)
        self.steps.append(Step(self.graph.all))
        self.before.append(1 << watch)
        self.watches[watch] = (own, start)

    def _is_whole(self, step: Step) -> bool:
        """Whether a step is not some entries of a pattern or some neurons, to whose complement no edges belong."""
        if step.site in (Site.SCORES, Site.PATTERN):
            return step.tokens == step.sources == EVERYWHERE
        every = (1 << self.graph.d_mlp) - 1
        return step.site is not Site.POST or step.neurons & every == every

    def _accept(self, atom: int) -> None:
        """In a complement's set the first step only ends the reading; nothing is stored there."""
        step = self.steps[atom]
        self.accepts |= 1 << atom
        if step.site is Site.STREAM:
            readers = (
                (r.node.id, -1 if r.port is None else r.port) for r in self.graph.readers if r.node.rank >= step.rank
            )
            self.steps[atom] = replace(step, site=Site.OUT, via=Edges(tuple((r, self.graph.all) for r in readers)))
        elif step.site in (Site.ATTN_OUT, Site.Z, Site.POST):
            self.steps[atom] = replace(step, site=Site.OUT)

    def _add(self, path: Path) -> tuple[bool, Atoms, Atoms]:
        """Adds a path's atoms; gives (may be empty, atoms that can be first, atoms that can be last)."""
        match path:
            case Step():
                atom = 1 << len(self.steps)
                self.steps.append(path)
                self.before.append(0)
                return False, atom, atom
            case Star(part):
                _, first, last = self._add(part)
                self._join(last, first)
                return True, first, last
            case Alt(parts):
                empty, first, last = False, 0, 0
                for e, f, n in map(self._add, parts):
                    empty, first, last = empty or e, first | f, last | n
                return empty, first, last
            case Seq(parts):
                empty, first, last = True, 0, 0
                for e, f, n in map(self._add, parts):
                    self._join(last, f)
                    first |= f if empty else 0
                    last = n | last if e else n
                    empty = empty and e
                return empty, first, last

    def _join(self, upstream: Atoms, downstream: Atoms) -> None:
        for i in bits(downstream):
            self.before[i] |= upstream

    # ---- where paths end
    def at_logits(self) -> list[tuple[Tokens, Atoms]]:
        """What the logits read: (tokens, atoms that may match the last writer)."""
        ends = [i for i, step in self.last if step.nodes & self.graph.logits_set]
        return [part for i in ends for part in self.reading(self.steps[i].tokens, self.before[i])] + self._watched()

    def at_stream(self, rank: int) -> list[tuple[Tokens, Atoms]]:
        """The same of a metric that reads the stream below `rank`; a value that is put in there itself is read."""
        ends = [(i, step) for i, step in self.last if step.site is Site.STREAM and step.rank == rank]
        out = [part for i, step in ends for part in self.reading(step.tokens, self.before[i])]
        out += [(EVERYWHERE, 1 << i) for i, _ in ends if i in self.starts]
        for w, (watched, _) in self.watches.items():
            whole = 0  # where the stream alone is a path of a complement's set
            for i, step in ends:
                whole |= step.tokens if (self.accepts & watched) >> i & 1 else 0
            out = [(t & ~whole if a & watched else t, a) for t, a in out] + [(~whole, 1 << w)]
        return [(t, a) for t, a in out if t and a]

    def at_nodes(self, nodes: Nodes) -> list[tuple[Tokens, Atoms]]:
        """(tokens, atoms that match) of a metric that reads some of these nodes."""
        ends = [i for i, step in self.last if step.nodes & nodes and step.site is not Site.STREAM]
        return [part for i in ends for part in self.reading(EVERYWHERE, 1 << i)] + self._watched()

    def _watched(self) -> list[tuple[Tokens, Atoms]]:
        return [(EVERYWHERE, 1 << w) for w in self.watches]

    def upstream(self, atoms: Atoms) -> Atoms:
        """The atoms that may match a node just above these, position and port aside."""
        out = 0
        for i in bits(atoms):
            out |= self.before[i]
        return out

    def active_starts(self, matched: Atoms) -> Iterator[tuple[Step, Start]]:
        """The values that enter at a node matched by these atoms, with the step that says where."""
        for i in bits(matched & self.start_atoms):
            yield self.steps[i], self.starts[i]
        for w in bits(matched & self.watch_atoms):
            watched, start = self.watches[w]
            if not matched & watched:
                yield self.steps[w], start

    def settled(self, matched: Atoms) -> Atoms:
        """A node's atoms without those that no longer matter: of a complement whose path is complete, or has left the
        set."""
        for w in bits(matched & self.watch_atoms):
            watched, _ = self.watches[w]
            own = matched & watched
            if not own or self._accepts_whole(own):
                matched &= ~(watched | 1 << w)
        return matched

    def _accepts_whole(self, own: Atoms) -> bool:
        return any(self.steps[i].site is Site.OUT for i in bits(own & self.accepts))

    def into_port(self, matched: Atoms, port: int | None) -> list[tuple[Tokens, Atoms]]:
        """(tokens, atoms) that a port of a node so matched goes on reading with."""
        done: dict[int, Tokens] = {}  # where a complement's path is complete once this port is entered
        for i in bits(matched & self.accepts):
            if port in ENTERS.get(self.steps[i].site, ()):
                for w in bits(matched & self.watch_atoms):
                    watched, _ = self.watches[w]
                    if watched >> i & 1:
                        own = self.steps[i].tokens
                        for j in bits(watched | 1 << w):
                            done[j] = done.get(j, 0) | own
        out: list[tuple[Tokens, Atoms]] = []
        for i in bits(matched):
            step = self.steps[i]
            if self.before[i] and (port is None or step.ports >> port & 1):
                out += self.reading(step.tokens & ~done.get(i, 0), self.before[i])
        return out

    def reading(self, tokens: Tokens, atoms: Atoms) -> list[tuple[Tokens, Atoms]]:
        """Reading on with `atoms` at `tokens`; a complement's first step holds only at its own."""
        if not atoms & self.accepts:
            return [(tokens, atoms)] if tokens and atoms else []
        out: list[tuple[Tokens, Atoms]] = []
        for i in bits(atoms & self.accepts):
            if self.steps[i].site is Site.OUT and self.steps[i].tokens != EVERYWHERE:
                atoms &= ~(1 << i)
                out.append((tokens & self.steps[i].tokens, 1 << i))
        return [(t, a) for t, a in ((tokens, atoms), *out) if t and a]
