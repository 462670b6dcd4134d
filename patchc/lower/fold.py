"""The fold: from path sets to the variant DAG. A state of the automaton lives on a *stream*, not on a node.

`stream(rank, c)` is the sum of all writers below a rank as continuation `c` sees them, `c` being the atoms that may
match the next writer. It is memoised under the atoms that can still make a difference below that rank, so streams
that see the same thing are one value. Where a port's positions are restricted, streams are mixed by token; positions
are no part of a state. Where, from a rank up, every node reads on in one plain state, the rest of the model is one
`Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from patchc.diagnostics import RULES, Diagnostic
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import Patch, Probe, Prompts
from patchc.ir.graph import Block, BlockKind, Node, Reader
from patchc.ir.laws import Law
from patchc.ir.ops import EQUAL_TO_BASE, SCORES, VariantId
from patchc.ir.paths import EVERYWHERE, Site, Step
from patchc.ir.tokens import Tokens
from patchc.lower.automaton import ENTERS, INNER_SITES, PORT_SITES, Atoms, Automaton, Start
from patchc.lower.entering import Entering, Entry
from patchc.lower.live import Live

NOWHERE = -1
"""The number of a reader that is no node: no relation of edges names it."""

PART_OF_A_NODE = RULES.add(
    "complement-of-a-part", "a complement leaves out a part of a node that has no edges of its own"
)

INSIDE = (*INNER_SITES, Site.IN, Site.POST)
"""Sites of starts after which the node is still computed."""


@dataclass(frozen=True, slots=True)
class Folded:
    """What is read of a cell, the patches that bite in it, and what is wrong with it."""

    roots: tuple[VariantId, ...]
    biting: frozenset[int]
    faults: tuple[Diagnostic, ...] = ()

    @property
    def root(self) -> VariantId:
        """The final stream, where the logits are read."""
        return self.roots[0]


class Fold(Entering):
    """Folds one cell at a time into a shared Dag. With `masked`, every ordinary start is multiplied by the mask of that
    number (see `Masked`) instead of replacing outright; such a DAG holds for any data of the same shape, so that, as
    with `any_data`, no two worlds are taken to be equal anywhere."""

    def __init__(
        self,
        dag: Dag,
        prompts: Prompts,
        run: str,
        masked: Callable[[Start], int] | None = None,
        any_data: bool = False,
    ):
        super().__init__(dag, prompts, run, masked, any_data)
        self.blocks_at = [
            [(i, b) for i, b in enumerate(self.graph.blocks) if b.rank == r] for r in range(self.graph.top)
        ]
        self.first_at = [min(b.first for _, b in blocks) for blocks in self.blocks_at]
        self._ranks_of: dict[int, int] = {}
        self._shares = Law.STREAMS in dag.laws
        self._leaves: dict[tuple[int, Step, Start], tuple[VariantId, bool]] = {}
        """Streams that hold one start alone, and whether it bites: at most one for each start of the cells."""

    def cell(self, patches: tuple[Patch, ...], ends: Sequence[Probe | None] = (None,)) -> Folded:
        """A cell with these patches, read at each of `ends`; None is the logits."""
        self.automaton = Automaton(patches, self.graph)
        self.patches = patches
        self.streams: dict[tuple[int, Atoms], VariantId] = {}
        self.nodes: dict[tuple[int, Atoms, int], list[VariantId]] = {}
        self.biting: set[int] = set()
        self.faults: list[Diagnostic] = [
            PART_OF_A_NODE.at(
                patches[i].span,
                "all paths but those from some entries of a pattern or from some neurons cannot be patched",
                fix="leave out the whole head, its `.q`, `.k` or `.v`, or the whole MLP",
            )
            for i in self.automaton.partial
        ]
        self.live = Live(self.automaton, self._ranks)
        self.at, self.under, self.stream_at = self.live.at, self.live.under, self.live.stream_at
        roots = tuple(self._end(probe) for probe in ends)
        return Folded(roots, frozenset(self.biting), tuple(self.faults))

    # ---- where paths end
    def _end(self, probe: Probe | None) -> VariantId:
        """What is read there: a difference in the place's own space."""
        logits = self.graph.logits
        if probe is None:
            return self._by_token(self.automaton.at_logits(), partial(self._read, Reader(logits)))
        if probe.site is Site.STREAM:
            reader = Reader(replace(logits, id=NOWHERE, rank=probe.rank))
            return self._by_token(self.automaton.at_stream(probe.rank), partial(self._read, reader))
        parts = self.automaton.at_nodes(probe.nodes)
        if probe.site in (Site.OUT, Site.ATTN_OUT):
            return self._by_token(parts, partial(self._written, probe))
        return self._by_token(parts, partial(self._inside, self.graph.members(probe.nodes)[0], probe.site))

    def _written(self, probe: Probe, c: Atoms) -> VariantId:
        """What a node, or a whole attention block, writes as `c` matches it."""
        node = self.graph.members(probe.nodes)[0]
        block, mine = self.graph.blocks[node.block], probe.nodes >> self.graph.blocks[node.block].first
        c &= self.at[block.rank]
        groups = {m: members & mine for m, members in self._groups(block, c).items() if members & mine}
        if probe.site is Site.OUT:
            return self.dag.sum(self._raw(node.block, groups))
        return self.dag.sum(self._block(node.block, groups, c))

    def _inside(self, node: Node, site: Site, c: Atoms) -> VariantId:
        """What is inside a head or an MLP as `c` matches it."""
        matched = c & ~self.automaton.attn_out_atoms
        member = node.id - self.graph.blocks[node.block].first
        starts = [
            (replace(step, site=site) if self.patches[start.patch].complement else step, start)
            for step, start in self.automaton.active_starts(matched)
        ]
        inner = [s for s in starts if s[0].site in INSIDE]
        settled = self.automaton.settled(matched)
        if site is Site.Z:
            z = self.dag.head_z(self._core(node.block, settled, node, 1 << member, inner), member)
            stored = partial(self.changes.z, node.block, member)
            return self._enter(
                z, [self._entry(step.tokens, start, stored) for step, start in starts if step.site is site]
            )
        if site is Site.IN or site is Site.POST:
            return self._inside_mlp(node, site, self._input(settled, Reader(node)), inner)
        ports = [port for port in ENTERS[site] if port is not None]
        read = {site, *(PORT_SITES[p] for p in ports), *((Site.SCORES,) if site is Site.PATTERN else ())}
        q, k, v = (self._input(settled, Reader(node, port)) if port in ports else EQUAL_TO_BASE for port in range(3))
        sets = self._agreed([self._replaced(1 << member, *s) for s in inner if s[0].site in read], (q, k, v))
        projected = [
            self.dag.projected(node.block, port, member, (q, k, v)[port], tuple(r for r in sets if r.port == port))
            for port in ports
        ]
        if site in PORT_SITES:
            return projected[0]
        entries = tuple(r for r in sets if r.port >= SCORES)
        return self.dag.entries(node.block, member, INNER_SITES.index(site), projected[0], projected[1], entries)

    # ---- streams
    def _ranks(self, nodes: int) -> int:
        found = self._ranks_of.get(nodes)
        if found is None:
            found = self._ranks_of[nodes] = sum(
                1 << r for r, blocks in enumerate(self.blocks_at) if any(nodes & b.nodes for _, b in blocks)
            )
        return found

    def _read(self, reader: Reader, c: Atoms) -> VariantId:
        return self._private_stream(reader, c) if c & self.automaton.via else self._stream(reader.node.rank, c)

    def _stream(self, rank: int, c: Atoms) -> VariantId:
        c &= self.under[rank]
        if not c:
            return EQUAL_TO_BASE
        if not self._shares:
            return self._flat_stream(rank, c)
        ranks = self.live.ranks(c) & (1 << rank) - 1
        top = ranks.bit_length()  # above, nothing more is written before `rank`
        found = self.streams.get((top, c))
        if found is None:
            found = self.streams[top, c] = self._leaf(rank, top, c) if self._is_leaf(c) else self._added(rank, ranks, c)
        return found

    def _is_leaf(self, c: Atoms) -> bool:
        """Whether this is one start alone, with nothing upstream: cells share what it puts into the stream."""
        if c & (c - 1) or not c & self.automaton.start_atoms:
            return False
        return not self.automaton.before[c.bit_length() - 1] and self.masked is None and Law.EQUAL in self.dag.laws

    def _leaf(self, rank: int, top: int, c: Atoms) -> VariantId:
        i = c.bit_length() - 1
        start = self.automaton.starts[i]
        key = (top, self.automaton.steps[i], start)
        found = self._leaves.get(key)
        if found is None:
            known = start.patch in self.biting
            x = self._added(rank, self.live.ranks(c) & (1 << rank) - 1, c)
            if known:
                return x  # whether this start bites as well does not show
            found = self._leaves[key] = x, start.patch in self.biting
        x, bites = found
        if bites:
            self.biting.add(start.patch)
        return x

    def _added(self, rank: int, ranks: int, c: Atoms) -> VariantId:
        """What is written at `ranks` as `c` sees it, from the lowest up."""
        x = self._enter_stream(EQUAL_TO_BASE, 0, c)
        first = (ranks & -ranks).bit_length() - 1
        for r in bits(ranks):
            if (rank == self.graph.top if x else r > first) and self._is_plain_from(r, c):
                x = self.dag.run(r, x)  # where what entered changes nothing, neither does what is above
                break
            key = (r + 1, c & self.under[r + 1])
            above = self.streams.get(key)
            if above is None:
                if c & self.at[r]:
                    x = self.dag.sum([x, *self._written_at(r, c)])
                above = self.streams[key] = self._enter_stream(x, r + 1, c)
            x = above
        return x

    def _flat_stream(self, rank: int, c: Atoms) -> VariantId:
        """The same as one sum of all that is written below, which this reader shares with no other."""
        parts = [self._enter_stream(EQUAL_TO_BASE, 0, c)]
        for r in range(rank):
            if any(parts) and rank == self.graph.top and self._is_plain_from(r, c):
                return self.dag.run(r, self.dag.sum(parts))
            if c & self.at[r]:
                parts += self._written_at(r, c)
            if c & self.stream_at[r + 1]:
                parts = [self._enter_stream(self.dag.sum(parts), r + 1, c)]
        return self.dag.sum(parts)

    def _private_stream(self, reader: Reader, c: Atoms) -> VariantId:
        """The stream of one reader alone: relations of edges decide writer by writer. One flat sum."""
        port = -1 if reader.port is None else reader.port
        parts: list[VariantId] = []
        for r in range(reader.node.rank):
            if c & self.stream_at[r]:
                parts = [self._enter_stream(self.dag.sum(parts), r, c)]
            for index, block in self.blocks_at[r]:
                groups: dict[Atoms, int] = {}
                for member in range(self._members(block)):
                    m = self._matching(c & self.at[r], block.first + member, reader.node.id, port)
                    groups[m] = groups.get(m, 0) | 1 << member
                parts += self._block(index, groups, c)
        return self._enter_stream(self.dag.sum(parts), reader.node.rank, c)

    def _matching(self, atoms: Atoms, node: int, reader: int, port: int) -> Atoms:
        out = 0
        for i in bits(atoms & ~self.automaton.attn_out_atoms):
            step = self.automaton.steps[i]
            nodes = step.nodes if step.via is None else step.nodes & step.via.writers(reader, port)
            out |= (nodes >> node & 1) << i
        return out

    def _is_plain_from(self, rank: int, c: Atoms) -> bool:
        """From this rank up every node reads the stream of `c` again: there the model runs as it is."""
        automaton = self.automaton
        special = automaton.via | automaton.watch_atoms | automaton.start_atoms
        first = self.first_at[rank]
        above = self.graph.all >> first
        upstream = 0
        for i in bits(c):
            nodes = automaton.steps[i].nodes >> first
            if automaton.stream_atoms >> i & 1:
                if automaton.steps[i].rank > rank:
                    return False
            elif nodes:
                if above & ~nodes or special >> i & 1 or not automaton.plain >> i & 1:
                    return False
                upstream |= automaton.before[i]
        return upstream & self.under[self.graph.top] == c

    def _written_at(self, rank: int, c: Atoms) -> list[VariantId]:
        """What the nodes of a rank write, as `c` sees them: the parts of a sum."""
        out: list[VariantId] = []
        for index, block in self.blocks_at[rank]:
            out += self._block(index, self._groups(block, c & self.at[rank]), c)
        return out

    def _block(self, index: int, groups: dict[Atoms, int], c: Atoms) -> list[VariantId]:
        """What a block adds to the stream: what its members write, through its norm where it has one, and a value for
        the whole where one starts."""
        parts = self._raw(index, groups)
        if self.graph.blocks[index].post_norm:
            parts = [self.dag.post_norm(index, self.dag.sum(parts))]
        return self._enter_attn_out(parts, index, c) if c & self.automaton.attn_out_atoms else parts

    def _raw(self, index: int, groups: dict[Atoms, int]) -> list[VariantId]:
        """What the members of a block write, by the atoms that match them."""
        parts: list[VariantId] = []
        for m, members in groups.items():
            if m:
                parts += self._variants(index, m, members)
        return parts

    def _groups(self, block: Block, c: Atoms) -> dict[Atoms, int]:
        """The members of a block by the atoms of `c` that match them."""
        groups = {0: (1 << self._members(block)) - 1}
        for i in bits(c & ~self.automaton.attn_out_atoms):
            nodes = self.automaton.steps[i].nodes >> block.first
            new: dict[Atoms, int] = {}
            for m, members in groups.items():
                if members & nodes:
                    new[m | 1 << i] = new.get(m | 1 << i, 0) | members & nodes
                if members & ~nodes:
                    new[m] = new.get(m, 0) | members & ~nodes
            groups = new
        return groups

    def _members(self, block: Block) -> int:
        """How many nodes of a block compute something: all but the bias."""
        return self.graph.n_heads if block.kind is BlockKind.ATTENTION else block.size

    # ---- nodes
    def _variants(self, index: int, m: Atoms, members: int) -> list[VariantId]:
        """The members of a block in state `m`; one by one where a relation of edges tells their readers apart."""
        key = (index, m, members)
        found = self.nodes.get(key)
        if found is None:
            split = (
                self.graph.blocks[index].kind is BlockKind.ATTENTION and self.automaton.upstream(m) & self.automaton.via
            )
            parts = [1 << i for i in bits(members)] if split else [members]
            found = self.nodes[key] = [v for p in parts if (v := self._variant(index, m, p))]
        return found

    def _variant(self, index: int, m: Atoms, members: int) -> VariantId:
        automaton = self.automaton
        entries: list[Entry] = []
        inner: list[tuple[Step, Start]] = []
        for step, start in automaton.active_starts(m):
            if step.site in INSIDE:
                inner.append((step, start))
            else:
                entries.append(self._entry(step.tokens, start, partial(self.changes.node, index, members, step.site)))
        # A value that takes the node's place everywhere leaves nothing to compute; one that equals the base run's still
        # bites where it undoes another patch, so there the node is looked at.
        everywhere = any(e.tokens == EVERYWHERE and not e.own and e.stored for e in entries) and self.masked is None
        computed = EQUAL_TO_BASE if everywhere else self._computed(index, automaton.settled(m), members, inner)
        return self._enter(computed, entries)

    def _computed(self, index: int, m: Atoms, members: int, inner: list[tuple[Step, Start]]) -> VariantId:
        """The members run again on what their ports read, with what is set inside them."""
        block = self.graph.blocks[index]
        node = self.graph.nodes[block.first + members.bit_length() - 1]
        match block.kind:
            case BlockKind.EMBED:
                return EQUAL_TO_BASE
            case BlockKind.MLP:
                return self._mlp(index, self._input(m, Reader(node)), inner)
            case BlockKind.ATTENTION:
                return self.dag.out(self._core(index, m, node, members, inner), members)

    def _core(self, index: int, m: Atoms, head: Node, members: int, inner: list[tuple[Step, Start]]) -> VariantId:
        """Attention of members of a block, of which one is `head`, on what their ports read."""
        if not m & ~self.automaton.plain:
            q = k = v = self._input(m, Reader(head, 0))
            if self.automaton.upstream(m) & self.automaton.via:
                k, v = self._input(m, Reader(head, 1)), self._input(m, Reader(head, 2))
        else:
            q, k, v = (self._input(m, Reader(head, p)) for p in range(3))
        sets = self._agreed([self._replaced(members, *s) for s in inner], (q, k, v))
        return self.dag.core(index, q, k, v, sets)

    def _input(self, m: Atoms, reader: Reader) -> VariantId:
        if not m:
            return EQUAL_TO_BASE
        return self._by_token(self.automaton.into_port(m, reader.port), partial(self._read, reader))

    def _by_token(self, parts: list[tuple[Tokens, Atoms]], read: Callable[[Atoms], VariantId]) -> VariantId:
        """What a port reads: one stream, or a mix of streams by token where steps name positions."""
        if not parts:
            return EQUAL_TO_BASE
        if all(tokens == EVERYWHERE for tokens, _ in parts):
            c = 0
            for _, atoms in parts:
                c |= atoms
            return read(c) if c else EQUAL_TO_BASE
        classes = {0: self.dag.layout.all}
        for tokens, atoms in parts:
            new: dict[Atoms, Tokens] = {}
            for c, here in classes.items():
                for joined, some in ((c | atoms, here & tokens), (c, here & ~tokens)):
                    if some:
                        new[joined] = new.get(joined, 0) | some
            classes = new
        return self.dag.mix((tokens, read(c)) for c, tokens in classes.items() if c)
