"""Cells by brute force: every path of the unrolled model is walked by itself, and a word at a time is matched.

Nothing is shared between paths and no state is kept: only for models of a few nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from patchc.execute.noise import entry_noise, prompt_noise
from patchc.ir.experiment import (
    Blocked,
    FromWorld,
    Itself,
    Mean,
    Moved,
    Noise,
    Patch,
    Probe,
    Prompts,
    Source,
    Value,
)
from patchc.ir.graph import Kind, Node
from patchc.ir.paths import Site, Step
from patchc.ir.tokens import Layout, Tokens
from tests.unit.oracle_models import NodeFunctions
from tests.unit.oracle_words import ENTRIES, INNER, MIDDLE, PORT_SITES, Below, StreamEnd, Word, ports, starts, steps_of

Entering = list[tuple[Step, Value]]
"""Values that enter at the places that steps name."""


class UndefinedError(Exception):
    """A cell that means nothing."""


class DisagreeError(UndefinedError):
    """Two patches start at one place with different values."""


@dataclass(frozen=True)
class Spot:
    """Where a value enters: its name, and how it is found in a plain run."""

    name: str
    take: Callable[[Plain], Tensor]
    site: Site


@dataclass
class Unrolled:
    """One cell, run on world `run`."""

    functions: NodeFunctions
    prompts: Prompts
    run: str
    patches: tuple[Patch, ...]
    possible: dict[tuple[int, Word], bool] = field(default_factory=dict)
    masks: dict[Tokens, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.functions.graph
        self.layout = self.prompts.layout
        self.all = self.layout.all
        self.places = [self.layout.place(t) for t in range(self.layout.n_tokens)]
        self.classes = [self.all]  # Disjoint; the tokens of every step are some of them together.
        for named in {step.tokens for patch in self.patches for step in steps_of(patch.path)}:
            self.classes = [part for c in self.classes for part in (c & named, c & ~named) if part]
        self.active = tuple(range(len(self.patches)))
        self.plain = {
            w.name: Plain(replace(self.functions, layout=w.layout or self.layout), w.ids) for w in self.prompts.worlds
        }

    # ---- where paths end
    def logits(self) -> Tensor:
        return self.functions.unembed(self.read(((self.graph.logits, None, self.all),), None, self.active))

    def probed(self, probe: Probe) -> Tensor:
        """What stands at a probe, `[token, width]`; of attention `[token, token]`."""
        if probe.site is Site.STREAM:
            word: Word = ((StreamEnd(probe.rank), None, 0),)
            whole = self.entering(word, self.active, Site.STREAM)
            return self.entered(self.read(word, None, self.active), whole, self.stream_spot(probe.rank))
        members = self.graph.members(probe.nodes)
        word = ((members[0], None, 0),)
        if probe.site is Site.ATTN_OUT:
            out = self.functions.added(members, [self.variant(((node, None, 0),), self.active) for node in members])
            return self.entered(out, self.entering(word, self.active, probe.site), self.attn_out_spot(members))
        return self.variant(word, self.active, probe.site)

    # ---- streams
    def read(self, word: Word, port: int | None, active: tuple[int, ...]) -> Tensor:
        """What the first node of `word` reads by `port`."""
        reader = word[0][0]
        total = torch.zeros_like(self.plain[self.run].out[self.graph.nodes[0]])
        for tokens in self.classes:
            entered = ((reader, port, tokens), *word[1:])
            some = tuple(i for i in active if not self.is_member_at(i, word, port, tokens))
            total = torch.where(self.mask(tokens), self.summed(entered, some), total)
        return total

    def summed(self, word: Word, active: tuple[int, ...]) -> Tensor:
        """The stream that the first node of `word` reads by the port and at the tokens that `word` names."""
        reader = word[0][0]
        x = torch.zeros_like(self.plain[self.run].out[self.graph.nodes[0]])
        for rank in range(reader.rank + 1):
            whole = self.entering(((Below(rank), None, 0), *word), active, Site.STREAM)
            x = self.entered(x, whole, self.stream_spot(rank))
            for block in self.graph.blocks:
                if block.rank == rank < reader.rank:
                    members = self.graph.members(block.nodes)
                    out = self.functions.added(
                        members, [self.variant(((node, None, 0), *word), active) for node in members]
                    )
                    whole = self.entering(((members[0], None, 0), *word), active, Site.ATTN_OUT)
                    x = x + self.entered(out, whole, self.attn_out_spot(members))
        return x

    def stream_spot(self, rank: int) -> Spot:
        return Spot(f"stream[{rank}]", lambda plain: plain.stream(rank), Site.STREAM)

    def attn_out_spot(self, members: list[Node]) -> Spot:
        return Spot(f"attn_out[{members[0].layer}]", lambda plain: plain.added(members), Site.ATTN_OUT)

    def entering(self, word: Word, active: tuple[int, ...], site: Site) -> Entering:
        """The values of ordinary patches that enter at one kind of place at the beginning of `word`."""
        ordinary = (self.patches[i] for i in active if not self.patches[i].complement)
        return [(step, patch.value) for patch in ordinary for step in starts(patch.path, word) if step.site is site]

    def is_member_at(self, patch: int, word: Word, port: int | None, tokens: Tokens) -> bool:
        """Whether a path of a complement's set starts at this port: what it reads stays as it is."""
        node = word[0][0]
        if not self.patches[patch].complement or (node is not None and node == self.graph.logits):
            return False
        site = Site.STREAM if isinstance(node, StreamEnd) else Site.IN if port is None else PORT_SITES[port]
        return any(step.site is site and step.tokens & tokens for step in starts(self.patches[patch].path, word))

    # ---- nodes
    def variant(self, word: Word, active: tuple[int, ...], site: Site = Site.OUT) -> Tensor:
        """What the first node of `word` writes, on that way to where it is read, `[token, d_model]`; or what it has at
        `site` inside, which what enters at its output comes too late to change."""
        node = word[0][0]
        if node.kind is Kind.ATTN_BIAS:
            return self.functions.attn_bias(node)
        outer: Entering = []
        groups: list[tuple[Tokens, tuple[int, ...]]] = [(self.all, active)]
        for i in active:
            patch = self.patches[i]
            first = starts(patch.path, word)
            if not patch.complement:
                late = {Site.OUT: (Site.OUT, Site.Z), Site.Z: (Site.Z,)}.get(site, ())
                outer += [(step, patch.value) for step in first if step.site in late]
                continue
            inside = 0
            for step in first:
                inside |= 0 if step.site in INNER else step.tokens & self.all
            dead = not any(step.site in INNER for step in first)
            dead = dead and not any(self.can_extend(i, longer) for longer in self.extensions(word))
            if dead:
                outer.append((Step(1 << node.id, tokens=self.all & ~inside), patch.value))
            groups = [
                (part, tuple(j for j in some if j != i) if dead or part & inside else some)
                for tokens, some in groups
                for part in (tokens & inside, tokens & ~inside)
                if part
            ]
        computed = [(tokens, self.computed(word, some)[site]) for tokens, some in groups]
        out = torch.zeros_like(computed[0][1])
        for tokens, x in computed:
            out = torch.where(self.mask(tokens), x, out)
        if site is not Site.OUT:
            spot = Spot(f"{node.name}.{site}", lambda plain: plain.inside[node][site], site)
            return self.entered(out, [(replace(step, site=site), value) for step, value in outer], spot)
        return self.entered(out, outer, Spot(node.name, lambda plain: plain.out[node], Site.OUT), node)

    def z_spot(self, node: Node) -> Spot:
        return Spot(f"{node.name}.z", lambda plain: plain.inside[node][Site.Z], Site.Z)

    def computed(self, word: Word, active: tuple[int, ...]) -> dict[Site, Tensor]:
        """Everything inside the first node of `word`, and its output without values that enter there."""
        node, f = word[0][0], self.functions
        if node.kind not in (Kind.HEAD, Kind.MLP):
            return {Site.OUT: self.plain[self.run].out[node]}
        got: dict[Site, Tensor] = {}

        def put(site: Site, x: Tensor) -> None:
            for i in active:
                if self.patches[i].complement and site in MIDDLE:
                    for step in (s for s in starts(self.patches[i].path, word) if s.site is site):
                        without = self.computed(word, tuple(j for j in active if j != i))[site]
                        x = torch.where(self.where(step, x), without, x)
            spot = Spot(f"{node.name}.{site}", lambda plain: plain.inside[node][site], site)
            got[site] = self.entered(x, self.entering(word, active, site), spot)

        if node.kind is Kind.MLP:
            put(Site.IN, self.read(word, None, active))
            put(Site.POST, f.neurons(node, got[Site.IN]))
            got[Site.OUT] = f.from_neurons(node, got[Site.POST])
            return got
        for port, site in enumerate(PORT_SITES):
            put(site, f.project(node, port, self.read(word, port, active)))
        put(Site.SCORES, f.scores(node, got[Site.Q], got[Site.K]))
        put(Site.PATTERN, f.pattern(got[Site.SCORES]))
        got[Site.Z] = got[Site.PATTERN] @ got[Site.V]
        got[Site.OUT] = f.write(node, got[Site.Z])
        return got

    # ---- values
    def where(self, step: Step, x: Tensor) -> Tensor:
        """What a step's value replaces of `x`, as a mask that broadcasts to it."""
        mask = self.mask(step.tokens & self.all)
        if step.site in ENTRIES:
            return mask & self.mask(step.sources & self.all).T & self.functions.seen
        if step.site is Site.POST:
            return mask & torch.tensor([step.neurons < 0 or bool(step.neurons >> i & 1) for i in range(x.shape[1])])
        return mask

    def must_agree(self, entering: Entering) -> None:
        x = torch.zeros(self.layout.n_tokens, 4096)
        for n, (step, value) in enumerate(entering):
            for other, also in entering[:n]:
                if value != also and bool((self.where(step, x) & self.where(other, x)).any()):
                    raise DisagreeError

    def entered(self, x: Tensor, entering: Entering, spot: Spot, node: Node | None = None) -> Tensor:
        """`x` with values put in. At a node's output a step may name its z, which differs for noise alone."""
        self.must_agree(entering)
        result = x
        for step, value in entering:
            at_z = step.site is Site.Z and node is not None
            new = torch.zeros_like(x)
            for c, s in value.terms:
                term = self.source(s, x, self.z_spot(node) if at_z else spot)
                new = new + c * (self.functions.write(node, term) if at_z and not isinstance(s, Itself) else term)
            result = torch.where(self.where(step, x), new, result)
        return result

    def source(self, source: Source, x: Tensor, spot: Spot) -> Tensor:
        match source:
            case FromWorld(world):
                return spot.take(self.plain[world])
            case Itself():
                return x
            case Mean():
                return self.mean(source, spot)
            case Moved(inner, tokens):
                return self.moved(self.source(inner, x, spot), tokens, spot)
            case Noise():
                return self.noise(source, spot)
            case Blocked():
                return torch.full_like(x, -torch.inf)
            case _:
                raise NotImplementedError

    def moved(self, x: Tensor, tokens: tuple[int, ...], spot: Spot) -> Tensor:
        if spot.site not in ENTRIES:
            return x[list(tokens)]
        out = torch.full_like(x, -torch.inf if spot.site is Site.SCORES else 0.0)
        for t, (row, _) in enumerate(self.places):
            for position in range(self.layout.lengths[row]):
                other = self.layout.place(tokens[t])[0]
                if position < self.layout.lengths[other]:
                    looked_at = x[tokens[t], self.layout.token(other, position)]
                    out[t, self.layout.token(row, position)] = looked_at
        return out

    def noise(self, noise: Noise, spot: Spot) -> Tensor:
        own = spot.take(self.plain[self.run])
        rows: list[Tensor] = []
        for row, n in enumerate(self.layout.lengths):
            prompt = row % self.prompts.n
            if spot.site in ENTRIES:
                entries = [entry_noise(noise, spot.name, prompt, position, n) for position in range(n)]
                rows.append(torch.from_numpy(np.stack(entries)))
            else:
                rows.append(torch.from_numpy(prompt_noise(noise, spot.name, prompt, n, own.shape[1])))
        numbers = torch.block_diag(*rows) if spot.site in ENTRIES else torch.cat(rows)
        counted = [t for t, (row, p) in enumerate(self.places) if row < self.prompts.n and p < self.own(row)]
        measure = own[counted].double().var(correction=0).sqrt() if noise.relative else 1.0
        return (noise.std * measure * numbers).to(own.dtype)

    def own(self, row: int) -> int:
        return self.prompts.own_lengths[row]

    def mean(self, mean: Mean, spot: Spot) -> Tensor:
        """Token by token: the mean over the tokens that it counts among."""
        world = self.prompts.world(mean.world)
        layout, x = world.layout or self.layout, spot.take(self.plain[mean.world])
        rows: list[Tensor] = []
        for here in self.places:
            among = [u for u in range(layout.n_tokens) if self.counts(mean, world.layout, layout.place(u), here)]
            if spot.site not in ENTRIES:
                rows.append(x[among].mean(0))
                continue
            row = torch.full((self.layout.n_tokens,), -torch.inf if spot.site is Site.SCORES else 0.0, dtype=x.dtype)
            for position in range(self.layout.lengths[here[0]]):
                entries = [
                    x[u, layout.token(layout.place(u)[0], position)]
                    for u in among
                    if position < layout.lengths[layout.place(u)[0]]
                ]
                shown = [e for e in entries if e > -torch.inf]
                if shown:
                    row[self.layout.token(here[0], position)] = sum(shown) / len(shown)
            rows.append(row)
        return torch.stack(rows)

    def counts(self, mean: Mean, other_data: Layout | None, there: tuple[int, int], here: tuple[int, int]) -> bool:
        """Whether the token at `there` counts in the mean for the one at `here`."""
        if other_data is not None:
            return mean.over_positions or there[1] == here[1]
        copies = [row // self.prompts.n for row, _ in (there, here)]
        if copies[0] != copies[1] or (mean.groups and mean.groups[there[0]] != mean.groups[here[0]]):
            return False
        to_end = [position - self.own(row) for row, position in (there, here)]
        if mean.over_positions:
            return to_end[0] < 0
        if to_end[0] >= 0 or to_end[1] >= 0:
            return to_end[0] == to_end[1]
        return there[1] == here[1]

    # ---- words
    def extensions(self, word: Word) -> Iterator[Word]:
        node = word[0][0]
        for port in ports(node):
            for tokens in self.classes:
                for writer in self.graph.nodes[:-1]:
                    if writer.rank < node.rank:
                        yield ((writer, None, 0), (node, port, tokens), *word[1:])

    def can_extend(self, patch: int, word: Word) -> bool:
        """Whether `word`, or some longer path that ends with it, is in the patch's set."""
        key = (patch, word)
        if key not in self.possible:
            path = self.patches[patch].path
            self.possible[key] = bool(starts(path, word)) or any(
                self.can_extend(patch, longer) for longer in self.extensions(word)
            )
        return self.possible[key]

    def mask(self, tokens: Tokens) -> Tensor:
        if tokens not in self.masks:
            numbers = [tokens >> t & 1 for t in range(self.layout.n_tokens)]
            self.masks[tokens] = torch.tensor(numbers, dtype=torch.bool)[:, None]
        return self.masks[tokens]


class Plain:
    """A world's run: every node's output, and all that is inside it."""

    def __init__(self, functions: NodeFunctions, ids: tuple[tuple[int, ...], ...]):
        self.functions = f = functions
        flat = torch.tensor([i for row in ids for i in row])
        self.out: dict[Node, Tensor] = {}
        self.qkv: dict[Node, list[Tensor]] = {}
        self.inside: dict[Node, dict[Site, Tensor]] = {}
        for node in f.graph.nodes[:-1]:
            below = self.stream(node.rank)
            match node.kind:
                case Kind.EMBED | Kind.POS_EMBED:
                    self.out[node] = f.embedding(node, flat)
                case Kind.ATTN_BIAS:
                    self.out[node] = f.attn_bias(node)
                case Kind.MLP:
                    self.inside[node] = {Site.IN: below, Site.POST: f.neurons(node, below)}
                    self.out[node] = f.from_neurons(node, self.inside[node][Site.POST])
                case _:
                    q, k, v = self.qkv[node] = [f.project(node, port, below) for port in range(3)]
                    scores = f.scores(node, q, k)
                    pattern = f.pattern(scores)
                    self.inside[node] = {
                        Site.Q: q, Site.K: k, Site.V: v, Site.SCORES: scores, Site.PATTERN: pattern, Site.Z: pattern @ v
                    }  # fmt: skip
                    self.out[node] = f.write(node, pattern @ v)
        self.logits = f.unembed(self.stream(f.graph.top))

    def stream(self, rank: int) -> Tensor:
        """The stream below a rank."""
        g, f = self.functions.graph, self.functions
        nothing = torch.zeros(f.layout.n_tokens, g.d_model, dtype=next(f.model.parameters()).dtype)
        return sum((self.added(g.members(block.nodes)) for block in g.blocks if block.rank < rank), nothing)

    def added(self, members: list[Node]) -> Tensor:
        """What the nodes of a block add to the stream."""
        return self.functions.added(members, [self.out[node] for node in members])
