"""Cells by brute force: every path of the unrolled model is walked by itself, and a word at a time is
matched.

Nothing is shared between paths, no derivative is taken and no state is kept: only for models of a few nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchc.ir.experiment import FromWorld, Itself, Mean, Patch, Prompts, Source, Value
from patchc.ir.graph import Kind, Node
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens
from tests.unit.oracle_models import NodeFunctions


@dataclass(frozen=True)
class Below:
    """The whole stream below a rank, as the beginning of a path."""

    rank: int


Item = tuple[Any, int | None, Tokens]
"""A node on a path (or, at its beginning, the stream below a rank), the port (None: its only one) and the
tokens by which the path enters it from the node before."""

Word = tuple[Item, ...]
"""A path from a node to the logits. Of the first item only the node counts."""


PORT_SITES = (Site.Q, Site.K, Site.V)
WHOLE = (Site.STREAM, Site.ATTN_OUT)


def joins(step: Step, word: Word, i: int) -> bool:
    """Whether `step` may be the one at place `i` of `word`."""
    node, port, tokens = word[i]
    if isinstance(node, Below):
        return step.site is Site.STREAM and step.rank == node.rank
    if not step.nodes >> node.id & 1:
        return False
    if step.site is Site.STREAM and not node.rank < step.rank <= word[i + 1][0].rank:
        return False
    if i and (not step.tokens & tokens or (port is not None and not step.ports >> port & 1)):
        return False
    if step.via is None or i + 1 == len(word):
        return True
    reader, port, _ = word[i + 1]
    return bool(step.via.writers(reader.id, -1 if port is None else port) >> node.id & 1)


Match = tuple[int, Step | None]
"""Where a match has got to in a word, and the step at the word's own beginning if that is in it."""


def matches(path: Path, word: Word, begun: set[Match]) -> set[Match]:
    """Every way to match `path` on from one of `begun`."""
    match path:
        case Step():
            here = ((i, first) for i, first in begun if i < len(word) and joins(path, word, i))
            return {(i + 1, first or path) for i, first in here}
        case Alt(parts):
            return {end for part in parts for end in matches(part, word, begun)}
        case Seq(parts):
            for part in parts:
                begun = matches(part, word, begun)
            return begun
        case Star(part):
            ends, new = set(begun), set(begun)
            while new:
                new = matches(part, word, new) - ends
                ends |= new
            return ends


def steps_of(path: Path) -> list[Step]:
    """Every step that is written in `path`."""
    match path:
        case Step():
            return [path]
        case Star(part):
            return steps_of(part)
        case Seq(parts) | Alt(parts):
            return [step for part in parts for step in steps_of(part)]


def starts(path: Path, word: Word) -> list[Step]:
    """The steps of `path` that may be first in it where it is the whole of `word`."""
    found = (step for end, step in matches(path, word, {(0, None)}) if end == len(word) and step is not None)
    return list(dict.fromkeys(found))


def ports(node: Node) -> list[int | None]:
    return [0, 1, 2] if node.kind is Kind.HEAD else [None] if node.kind in (Kind.MLP, Kind.LOGITS) else []


class DisagreeError(Exception):
    """Two patches start at one place with different values."""


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
        self.all = self.prompts.layout.all
        self.classes = [self.all]  # Disjoint; the tokens of every step are some of them together.
        for named in {step.tokens for patch in self.patches for step in steps_of(patch.path)}:
            self.classes = [part for c in self.classes for part in (c & named, c & ~named) if part]
        self.plain = {w.name: Plain(self.functions, w.ids) for w in self.prompts.worlds}

    def logits(self) -> Tensor:
        active = tuple(range(len(self.patches)))
        return self.functions.unembed(self.read(((self.graph.logits, None, self.all),), None, active))

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
            x = self.entered(x, whole, lambda plain, r=rank: plain.stream(r))
            for block in self.graph.blocks:
                if block.rank == rank < reader.rank:
                    members = self.graph.members(block.nodes)
                    out = sum(self.variant(((node, None, 0), *word), active) for node in members)
                    whole = self.entering(((members[0], None, 0), *word), active, Site.ATTN_OUT)
                    x = x + self.entered(out, whole, lambda plain, m=members: sum(plain.out[n] for n in m))
        return x

    def entering(self, word: Word, active: tuple[int, ...], site: Site) -> list[tuple[Site, Tokens, Value]]:
        """The values of ordinary patches that enter at a whole stream, or at a layer's attention output."""
        ordinary = (self.patches[i] for i in active if not self.patches[i].complement)
        found = ((step, patch) for patch in ordinary for step in starts(patch.path, word) if step.site is site)
        return [(site, step.tokens & self.all, patch.value) for step, patch in found]

    def is_member_at(self, patch: int, word: Word, port: int | None, tokens: Tokens) -> bool:
        """Whether a path of a complement's set starts at this port: what it reads stays as it is."""
        if not self.patches[patch].complement or port is None:
            return False
        first = starts(self.patches[patch].path, word)
        return any(step.site is PORT_SITES[port] and step.tokens & tokens for step in first)

    def variant(self, word: Word, active: tuple[int, ...]) -> Tensor:
        """What the first node of `word` writes, on that way to the logits, `[token, d_model]`."""
        node = word[0][0]
        if node.kind is Kind.ATTN_BIAS:
            return self.functions.attn_bias(node)
        entering: list[tuple[Site, Tokens, Value]] = []
        groups: list[tuple[Tokens, tuple[int, ...]]] = [(self.all, active)]
        for i in active:
            patch = self.patches[i]
            first = starts(patch.path, word)
            if not patch.complement:
                own = (step for step in first if step.site not in WHOLE)
                entering += [(step.site, step.tokens & self.all, patch.value) for step in own]
                continue
            inside = 0
            for step in first:
                inside |= 0 if step.site in PORT_SITES else step.tokens & self.all
            dead = not any(step.site in PORT_SITES for step in first)
            dead = dead and not any(self.can_extend(i, longer) for longer in self.extensions(word))
            if dead:
                entering.append((Site.OUT, self.all & ~inside, patch.value))
            groups = [
                (part, tuple(j for j in some if j != i) if dead or part & inside else some)
                for tokens, some in groups
                for part in (tokens & inside, tokens & ~inside)
                if part
            ]
        out = torch.zeros_like(self.plain[self.run].out[node])
        inner = [e for e in entering if e[0] in PORT_SITES]
        outer = [e for e in entering if e[0] not in PORT_SITES]
        for tokens, some in groups:
            out = torch.where(self.mask(tokens), self.computed(word, some, inner), out)
        return self.entered(out, outer, lambda plain: plain.out[node])

    def computed(self, word: Word, active: tuple[int, ...], inner: list) -> Tensor:
        node, f = word[0][0], self.functions
        if node.kind is Kind.MLP:
            return f.mlp(node, self.read(word, None, active))
        if node.kind is not Kind.HEAD:
            return self.plain[self.run].out[node]
        qkv: list[Tensor] = []
        for port, site in enumerate(PORT_SITES):
            x = f.project(node, port, self.read(word, port, active))
            here = [e for e in inner if e[0] is site]
            qkv.append(self.entered(x, here, lambda plain, p=port: plain.qkv[node][p]))
        return f.write(node, f.z(node, *qkv))

    def entered(self, x: Tensor, entering: list, take) -> Tensor:
        """`x` with values put in; `take` finds the site in a plain run."""
        for n, (_, tokens, value) in enumerate(entering):
            if any(value != other and tokens & also for _, also, other in entering[:n]):
                raise DisagreeError
        result = x
        for _, tokens, value in entering:
            new = sum((c * self.source(s, x, take) for c, s in value.terms), torch.zeros_like(x))
            result = torch.where(self.mask(tokens), new, result)
        return result

    def source(self, source: Source, x: Tensor, take) -> Tensor:
        match source:
            case FromWorld(world):
                return take(self.plain[world])
            case Itself():
                return x
            case Mean(world, over_positions):
                value, positions = take(self.plain[world]), self.functions.positions
                if over_positions:
                    return value.mean(0).expand_as(value)
                return torch.stack([value[positions == p].mean(0) for p in positions])
            case _:
                raise NotImplementedError

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
            numbers = [tokens >> t & 1 for t in range(self.prompts.layout.n_tokens)]
            self.masks[tokens] = torch.tensor(numbers, dtype=torch.bool)[:, None]
        return self.masks[tokens]


class Plain:
    """A world's run: every node's output, and every head's q, k and v."""

    def __init__(self, functions: NodeFunctions, ids: tuple[tuple[int, ...], ...]):
        f, flat = functions, torch.tensor([i for row in ids for i in row])
        self.out: dict[Node, Tensor] = {}
        self.qkv: dict[Node, list[Tensor]] = {}
        for node in f.graph.nodes[:-1]:
            below = [x for n, x in self.out.items() if n.rank < node.rank]
            match node.kind:
                case Kind.EMBED | Kind.POS_EMBED:
                    self.out[node] = f.embedding(node, flat)
                case Kind.ATTN_BIAS:
                    self.out[node] = f.attn_bias(node)
                case Kind.MLP:
                    self.out[node] = f.mlp(node, sum(below))
                case _:
                    self.qkv[node] = [f.project(node, port, sum(below)) for port in range(3)]
                    self.out[node] = f.write(node, f.z(node, *self.qkv[node]))
        self.logits = f.unembed(self.stream(f.graph.top))

    def stream(self, rank: int) -> Tensor:
        """The stream below a rank."""
        below = [x for node, x in self.out.items() if node.rank < rank]
        return sum(below, torch.zeros_like(next(iter(self.out.values()))))
