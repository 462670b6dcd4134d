"""Where values enter: starts put stored values in the place of what a cell computes, all of it or some tokens of it.

Which starts are active at a node, `fold` says; what a value is at run time is the executor's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from patchc.diagnostics import RULES, Diagnostic, Note
from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import Patch, Prompts, Value
from patchc.ir.graph import Node
from patchc.ir.ops import SCORES, Replaced, ReplacedNeurons, VariantId
from patchc.ir.paths import EVERYWHERE, Site, Step
from patchc.ir.tokens import Tokens
from patchc.lower.automaton import INNER_SITES, Atoms, Automaton, Start
from patchc.lower.changes import Changes, relative
from patchc.lower.live import ByRank

TWO_VALUES = RULES.add("two-values", "two patches give one start two different values")


@dataclass(frozen=True, slots=True)
class Entry:
    """A value that enters somewhere: its tokens there, its stored difference, and how much of `self` stays."""

    tokens: Tokens
    stored: VariantId
    own: float
    start: Start


class Entering:
    """The part of a fold that puts values in. `automaton`, `patches`, `stream_at`, `biting` and `faults` are the
    cell's that is being folded."""

    automaton: Automaton
    patches: tuple[Patch, ...]
    stream_at: ByRank
    biting: set[int]
    faults: list[Diagnostic]

    def __init__(
        self, dag: Dag, prompts: Prompts, run: str, masked: Callable[[Start], int] | None, any_data: bool = False
    ):
        self.dag, self.graph, self.run = dag, dag.graph, run
        self.changes = Changes(dag, prompts, run, any_data=any_data or masked is not None)
        self.masked = masked

    def _entry(self, tokens: Tokens, start: Start, stored: Callable[[Value, Tokens], VariantId]) -> Entry:
        value, own = relative(start.value, self.run)
        where = self.dag.layout.all if tokens == EVERYWHERE else tokens
        return Entry(tokens, stored(value, where), own, start)

    def _enter(self, x: VariantId, entries: list[Entry]) -> VariantId:
        """`x` with values put in its place at their tokens."""
        if not entries:
            return x
        for e in entries:
            if e.stored or (e.own != 1.0 and self.dag.changed[x] & e.tokens):
                self.biting.add(e.start.patch)
        if self.masked is not None:
            return self.dag.masked(x, tuple(self._masked_starts(x, entries)))
        left = self.dag.layout.all
        parts: list[tuple[Tokens, VariantId]] = []
        seen: list[tuple[Tokens, Entry]] = []
        for e in entries:
            tokens = self.dag.layout.all if e.tokens == EVERYWHERE else e.tokens
            for other, earlier in seen:
                if other & tokens and earlier.start.value != e.start.value:
                    self._conflict(earlier.start, e.start)
            seen.append((tokens, e))
            parts.append((tokens & left, self._mixture(x, e)))
            left &= ~tokens
        return self.dag.mix([*parts, (left, x)])

    def _masked_starts(self, x: VariantId, entries: list[Entry]) -> Iterator[tuple[int, Tokens, VariantId]]:
        """One mask enters a token once, however many steps of its path match there."""
        assert self.masked is not None
        seen: dict[int, Tokens] = {}
        for e in entries:
            mask = self.masked(e.start)
            tokens = e.tokens & self.dag.layout.all & ~seen.get(mask, 0)
            seen[mask] = seen.get(mask, 0) | tokens
            if tokens:
                yield mask, tokens, self._mixture(x, e)

    def _mixture(self, x: VariantId, entry: Entry) -> VariantId:
        return self.dag.sum([entry.stored, self.dag.scale(entry.own, x)]) if entry.own else entry.stored

    def _conflict(self, one: Start, other: Start) -> None:
        first, second = self.patches[one.patch], self.patches[other.patch]
        fault = TWO_VALUES.at(
            second.span,
            "two patches replace the same value by two different ones",
            notes=[Note("the other patch", first.span)],
            fix="patch each start once, or restrict each patch to its own positions with `@`",
        )
        if fault not in self.faults:
            self.faults.append(fault)

    def _enter_stream(self, x: VariantId, rank: int, c: Atoms) -> VariantId:
        """The stream below `rank`, set where a stream value starts."""
        atoms = c & self.stream_at[rank]
        if not atoms:
            return x

        def stored(value: Value, tokens: Tokens) -> VariantId:
            return self.changes.stream(rank, value, tokens)

        return self._enter(
            x, [self._entry(self.automaton.steps[i].tokens, self.automaton.starts[i], stored) for i in bits(atoms)]
        )

    def _enter_attn_out(self, parts: list[VariantId], index: int, c: Atoms) -> list[VariantId]:
        """A layer's whole attention output, set where such a value starts."""
        block = self.graph.blocks[index]
        members = (1 << block.size) - 1
        stored = partial(self.changes.node, index, members, Site.ATTN_OUT)
        entries = [
            self._entry(self.automaton.steps[i].tokens, self.automaton.starts[i], stored)
            for i in bits(c & self.automaton.attn_out_atoms)
            if self.automaton.steps[i].nodes & block.nodes
        ]
        return [self._enter(self.dag.sum(parts), entries)] if entries else parts

    # ---- values that enter inside a node
    def _replaced(self, members: int, step: Step, start: Start) -> tuple[Replaced, Start]:
        """A start at a head's port, scores or pattern; of entries those that the model's direction shows."""
        layout = self.dag.layout
        tokens = step.tokens & layout.all
        port, sources = INNER_SITES.index(step.site), 0
        if port >= SCORES:
            sources = step.sources & layout.all
            tokens &= self.dag.lookers(sources)
        return Replaced(port, members, self.dag.value(start.value), tokens, sources=sources), start

    def _agreed(
        self, replaced: list[tuple[Replaced, Start]], inputs: tuple[VariantId, VariantId, VariantId]
    ) -> tuple[Replaced, ...]:
        """What is set inside a head, at the tokens where that can change something; q, k and v first, then scores, then
        the pattern."""
        ordered = sorted(replaced, key=lambda item: item[0].port)
        where = self.changes.inside_head([one for one, _ in ordered], inputs)
        self._refuse_conflicts(replaced)
        out: dict[tuple[int, int, int, int, Tokens], Tokens] = {}
        for (one, start), tokens in zip(ordered, where, strict=True):
            if tokens:
                self.biting.add(start.patch)
                key = (one.port, one.heads, one.value, self._mask_number(start), one.sources)
                out[key] = out.get(key, 0) | tokens
        return tuple(Replaced(p, h, v, tokens, mask, s) for (p, h, v, mask, s), tokens in sorted(out.items()))

    def _refuse_conflicts(self, replaced: list[tuple[Replaced, Start]]) -> None:
        for i, (one, start) in enumerate(replaced if self.masked is None else ()):
            for other, earlier in replaced[:i]:
                if one.value != other.value and self._overlap(one, other):
                    self._conflict(earlier, start)

    def _overlap(self, one: Replaced, other: Replaced) -> bool:
        both = one.tokens & other.tokens
        if one.port != other.port or one.port < SCORES:
            return one.port == other.port and both != 0
        return both & self.dag.lookers(one.sources & other.sources) != 0

    def _mlp(self, index: int, x: VariantId, inner: list[tuple[Step, Start]]) -> VariantId:
        """An MLP with values in the place of its input, then of neurons."""
        rank = self.graph.blocks[index].rank
        neurons = [(step, start) for step, start in inner if step.site is Site.POST]
        inputs = [(step, start) for step, start in inner if step.site is Site.IN]
        shortcut = self.masked is None and not neurons and all(start.value.world for _, start in inputs)

        def stored(value: Value, tokens: Tokens) -> VariantId:
            """The stream that it reads, or where that is a world's own, what the MLP wrote there."""
            if shortcut:
                return self.changes.node(index, 1, Site.OUT, value, tokens)
            return self.changes.stream(rank, value, tokens, index)

        entries = [self._entry(step.tokens, start, stored) for step, start in inputs]
        if shortcut:
            return self._enter(self.dag.tokenwise(index, x), entries)
        x = self._enter(x, entries)
        sets = self._agreed_neurons(neurons, x)
        return self.dag.tokenwise(index, x, sets)

    def _inside_mlp(self, node: Node, site: Site, x: VariantId, inner: list[tuple[Step, Start]]) -> VariantId:
        """What an MLP reads, or its neurons, with values in their place."""

        def stored(value: Value, tokens: Tokens) -> VariantId:
            return self.changes.stream(node.rank, value, tokens, node.block)

        x = self._enter(x, [self._entry(step.tokens, start, stored) for step, start in inner if step.site is Site.IN])
        if site is Site.IN:
            return x
        sets = self._agreed_neurons([s for s in inner if s[0].site is Site.POST], x)
        return self.dag.neurons(node.block, x, sets)

    def _agreed_neurons(self, members: list[tuple[Step, Start]], input: VariantId) -> tuple[ReplacedNeurons, ...]:
        """An MLP's neurons that are set, at the tokens where that can change something."""
        out: dict[tuple[int, int, int], Tokens] = {}
        every = (1 << self.graph.d_mlp) - 1
        for i, (step, start) in enumerate(members):
            for other, earlier in members[:i] if self.masked is None else ():
                both = step.tokens & other.tokens & self.dag.layout.all
                if both and step.neurons & other.neurons & every and start.value != earlier.value:
                    self._conflict(earlier, start)
            here = step.tokens & self.dag.layout.all
            tokens = self.changes.inside(start.value, here, self.dag.changed[input])
            if tokens:
                self.biting.add(start.patch)
                key = (step.neurons & every, self.dag.value(start.value), self._mask_number(start))
                out[key] = out.get(key, 0) | tokens
        return tuple(ReplacedNeurons(n, value, tokens, mask) for (n, value, mask), tokens in sorted(out.items()))

    def _mask_number(self, start: Start) -> int:
        return -1 if self.masked is None else self.masked(start)
