"""Cells by brute force: every path of the unrolled model is walked by itself, and a word at a time is matched.

Nothing is shared between paths, no derivative is taken and no state is kept: only for models of a few nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchc.ir.experiment import FromWorld, Itself, Mean, Patch, Prompts, Source, Value
from patchc.ir.graph import Kind, Node
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens
from tests.unit.oracle_models import NodeFunctions

Item = tuple[Node, int | None, Tokens]
"""A node on a path, the port (None: its only one) and the tokens by which the path enters it from the node before."""

Word = tuple[Item, ...]
"""A path from a node to the logits. Of the first item only the node counts."""


PORT_SITES = (Site.Q, Site.K, Site.V)


def joins(step: Step, word: Word, i: int) -> bool:
    """Whether `step` may be the one at place `i` of `word`."""
    node, port, tokens = word[i]
    if not step.nodes >> node.id & 1:
        return False
    if i and (not step.tokens & tokens or (port is not None and not step.ports >> port & 1)):
        return False
    if step.via is None or i + 1 == len(word):
        return True
    reader, port, _ = word[i + 1]
    return bool(step.via.writers(reader.id, -1 if port is None else port) >> node.id & 1)


def matches(path: Path, word: Word, i: int) -> Iterator[tuple[int, Step | None]]:
    """Where a match that begins at place `i` may end, and the step at the word's own beginning if that is in it."""
    match path:
        case Step():
            if i < len(word) and joins(path, word, i):
                yield i + 1, path if i == 0 else None
        case Alt(parts):
            for part in parts:
                yield from matches(part, word, i)
        case Seq(parts):
            if not parts:
                yield i, None
                return
            for j, first in matches(parts[0], word, i):
                for k, later in matches(Seq(parts[1:]), word, j):
                    yield k, first or later
        case Star(part):
            yield i, None
            for j, first in matches(part, word, i):
                if j > i:
                    for k, later in matches(path, word, j):
                        yield k, first or later


def starts(path: Path, word: Word) -> list[Step]:
    """The steps of `path` that may be first in it where it is the whole of `word`."""
    found = (step for end, step in matches(path, word, 0) if end == len(word) and step is not None)
    return list(dict.fromkeys(found))


def ports(node: Node) -> list[int | None]:
    return [0, 1, 2] if node.kind is Kind.HEAD else [None] if node.kind in (Kind.MLP, Kind.LOGITS) else []


class Disagree(Exception):
    """Two patches start at one place with different values."""


@dataclass
class Unrolled:
    """One cell. `classes` are disjoint sets of tokens such that every step's `tokens` is a union of them."""

    functions: NodeFunctions
    prompts: Prompts
    run: str
    patches: tuple[Patch, ...]
    classes: tuple[Tokens, ...]
    possible: dict[tuple[int, Word], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.graph = self.functions.graph
        self.all = self.prompts.layout.all
        self.plain = {w.name: Plain(self.functions, w.ids) for w in self.prompts.worlds}

    def logits(self) -> Tensor:
        active = tuple(range(len(self.patches)))
        return self.functions.unembed(self.read(((self.graph.logits, None, self.all),), None, active))

    def read(self, word: Word, port: int | None, active: tuple[int, ...]) -> Tensor:
        """What the first node of `word` reads by `port`."""
        reader = word[0][0]
        total = torch.zeros(self.prompts.layout.n_tokens, self.graph.d_model)
        for tokens in self.classes:
            entered = ((reader, port, tokens), *word[1:])
            some = tuple(i for i in active if not self.is_member_at(i, word, port, tokens))
            for writer in self.graph.nodes[:-1]:
                if writer.rank < reader.rank:
                    out = self.variant(((writer, None, 0), *entered), some)
                    total += torch.where(self.mask(tokens), out, 0.0)
        return total

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
                entering += [(step.site, step.tokens & self.all, patch.value) for step in first]
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
        out = torch.zeros(self.prompts.layout.n_tokens, self.graph.d_model)
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
                raise Disagree
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
        return torch.tensor([tokens >> t & 1 for t in range(self.prompts.layout.n_tokens)], dtype=torch.bool)[:, None]


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
        self.logits = f.unembed(sum(self.out.values()))
