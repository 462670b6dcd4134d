"""The definition, word for word and as slow as it reads: every path of the unrolled graph is a leaf of its own.

Nothing is shared, no automaton is built: a copy of a node is known by all the steps from it to the logits, each with
the port and the token at which it is taken, and those are matched against the path expression as a word.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchc.ir.experiment import Cell, FromWorld, Itself, Patch, Probe, Prompts, Value
from patchc.ir.graph import Block, BlockKind, Node
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from tests.toy import Toy

Letter = tuple[int, int, int]
"""A step of a path as it is taken: node, port (-1 where there is one), token."""
Word = tuple[Letter, ...]

STREAM_END = -2
"""Less a rank: where a metric reads the stream below it, as the last letter of a word."""

PORT_SITE = (Site.Q, Site.K, Site.V)


def fits(step: Step, word: Word, i: int, site: Site, number: int) -> bool:
    node, port, token = word[i]
    if not step.tokens >> token & 1:
        return False
    if 0 < i == len(word) - 1:  # the logits, or where a metric reads
        if node <= STREAM_END:
            return step.site is Site.STREAM and step.rank == STREAM_END - node
        return step.site is not Site.STREAM and enters(step, node, port)
    if site is Site.STREAM and i == 0:
        return step.site is site and step.rank == number
    if step.via is not None and i + 1 < len(word) and not step.via.writers(word[i + 1][0], word[i + 1][1]) >> node & 1:
        return False
    if i == 0:
        mine = Site.OUT if step.site is Site.Z and site is Site.OUT else step.site
        part = step.sources if site in (Site.SCORES, Site.PATTERN) else step.neurons if site is Site.POST else -1
        return mine is site and bool(step.nodes >> node & 1) and bool(part >> max(number, 0) & 1)
    return enters(step, node, port)


def enters(step: Step, node: int, port: int) -> bool:
    return bool(step.nodes >> node & 1) and (port < 0 or bool(step.ports >> port & 1))


def ends(path: Path, word: Word, i: int, site: Site, number: int) -> set[int]:
    """Where a match of `path` that begins at letter i can end. `number`: of a stream its rank, of an entry of a pattern
    the token looked at, of the neurons one."""
    match path:
        case Step():
            return {i + 1} if i < len(word) and fits(path, word, i, site, number) else set()
        case Seq(parts):
            at = {i}
            for part in parts:
                at = {j for k in at for j in ends(part, word, k, site, number)}
            return at
        case Alt(parts):
            return {j for part in parts for j in ends(part, word, i, site, number)}
        case Star(part):
            seen, todo = {i}, [i]
            while todo:
                for j in ends(part, word, todo.pop(), site, number) - seen:
                    seen.add(j)
                    todo.append(j)
            return seen


def accepts(patch: Patch, word: Word, site: Site, number: int = -1) -> bool:
    return len(word) in ends(patch.path, word, 0, site, number)


@dataclass
class Unrolled:
    """One prompt of one cell on a toy network, run on world `run`."""

    toy: Toy
    prompts: Prompts
    run: str
    prompt: int

    def __post_init__(self) -> None:
        layout = self.prompts.layout
        self.graph, self.first, self.length = self.toy.graph, layout.offsets[self.prompt], layout.lengths[self.prompt]
        self.plain = {w.name: self._plain(torch.tensor([w.ids[self.prompt]])) for w in self.prompts.worlds}

    def _plain(self, ids: Tensor) -> dict[object, Tensor]:
        """Outputs by node, q/k/v by (node, port), streams by rank: `[pos, ...]`."""
        out: dict[object, Tensor] = dict(enumerate(self.toy.embed(ids)[:, 0]))
        streams = {0: torch.zeros_like(out[0]), 1: sum(out[i] for i in range(self.graph.blocks[0].size))}
        for block in self.graph.blocks[1:]:
            streams.setdefault(block.rank, torch.zeros(0))
            x = streams[block.rank] = self._sum(out, block.rank)
            for node in self.graph.members(block.nodes):
                if block.kind is BlockKind.MLP:
                    out[node.id] = self.toy.mlp(block.layer, x)
                elif node.head is None:
                    out[node.id] = self.toy.attn_bias(block.layer).expand_as(x)
                else:
                    y = self.toy.norm(block.layer, 0, x)
                    for p in range(3):
                        out[node.id, p] = self.toy.project(block.layer, p, y, [node.head])[:, 0]
                    out[node.id, "z"] = torch.stack(
                        [self._z(node, t, *(out[node.id, p] for p in range(3))) for t in range(self.length)]
                    )
                    out[node.id] = self.toy.write(block.layer, out[node.id, "z"][:, None], [node.head])
        streams[self.graph.top] = self._sum(out, self.graph.top)
        return {**out, **{("stream", r): x for r, x in streams.items()}}

    def _sum(self, out: dict[object, Tensor], rank: int) -> Tensor:
        return sum(self._whole(out, block) for block in self.graph.blocks if block.rank < rank)

    def _whole(self, out: dict[object, Tensor], block: Block) -> Tensor:
        """What a block adds to the stream of a plain run."""
        return self._normed(block, sum(out[n.id] for n in self.graph.members(block.nodes)))

    def _normed(self, block: Block, x: Tensor) -> Tensor:
        return self.toy.post_norm(block.layer, x) if block.post_norm else x

    def _z(self, node: Node, t: int, q: Tensor, k: Tensor, v: Tensor, suffix: Word | None = None) -> Tensor:
        """A head's z at position t from its whole q, k and v `[pos, d_head]`; with a suffix that of this copy."""
        pattern = self._attention(node, t, q, k, suffix)[1]
        ready = self.toy.prepare(node.layer, 2, v[:, None], self._tokens(), self.prompts.layout)
        return pattern @ ready[:, 0]

    def _attention(self, node: Node, t: int, q: Tensor, k: Tensor, suffix: Word | None) -> tuple[Tensor, Tensor]:
        """Scores and pattern of the token at position t, `[pos]` each."""
        scores = self._scores(node, t, q, k)
        if suffix is None:
            return scores, scores.softmax(-1)
        plain = {w: self._scores(node, t, x[node.id, 0], x[node.id, 1]) for w, x in self.plain.items()}
        scores = self._entries(node, t, suffix, Site.SCORES, plain, scores, scores)
        patterns = {w: x.softmax(-1) for w, x in plain.items()}
        return scores, self._entries(node, t, suffix, Site.PATTERN, patterns, scores.softmax(-1), scores)

    def _scores(self, node: Node, t: int, q: Tensor, k: Tensor) -> Tensor:
        layout = self.prompts.layout
        ready = [
            self.toy.prepare(node.layer, p, x[:, None], self._tokens(), layout)[None] for p, x in enumerate((q, k))
        ]
        row, places = ready[0][:, t : t + 1], torch.tensor([[t]])
        return self.toy.scores(node.layer, row, ready[1], places, self.length, layout)[0, 0, 0]

    def _tokens(self) -> Tensor:
        return torch.arange(self.first, self.first + self.length)

    def _entries(self, node: Node, t: int, suffix: Word, site: Site, worlds, own: Tensor, scores: Tensor) -> Tensor:
        """A row of scores or of a pattern with the values that start there, entry by entry."""
        out = own.clone()
        for s in range(self.length):
            for patch in self._starting(((node.id, -1, self.first + t), *suffix), site, self.first + s):
                if scores[s] > float("-inf"):
                    out[s] = self._mix(patch.value, {w: x[s] for w, x in worlds.items()}, own[s])
        return out

    # ---- a cell
    def read(self, cell: Cell, probe: Probe) -> Tensor:
        """What a metric reads at a place, `[pos, width]`."""
        self.patches = cell.patches
        live = frozenset(i for i, p in enumerate(cell.patches) if p.complement)
        return torch.stack([self._read(probe, t, live) for t in range(self.length)])

    def _read(self, probe: Probe, t: int, live: frozenset[int]) -> Tensor:
        if probe.site is Site.STREAM:
            end = replace(self.graph.logits, id=STREAM_END - probe.rank, rank=probe.rank)
            return self.stream(end, -1, t, (), live)
        node = self.graph.members(probe.nodes)[0]
        if probe.site is Site.ATTN_OUT:
            return self.block(self.graph.blocks[node.block], t, (), live)
        if probe.site is Site.OUT:
            return self.node(node, t, (), live)
        word = ((node.id, -1, self.first + t),)
        live = frozenset(i for i in live if not accepts(self.patches[i], word, Site.OUT))
        if probe.site in (Site.IN, Site.POST):
            return (self.mlp_input if probe.site is Site.IN else self.post)(node, t, (), live)
        if probe.site in (Site.SCORES, Site.PATTERN):
            q, k, _ = self.qkv(node, t, (), live)
            return self._attention(node, t, q, k, ())[probe.site is Site.PATTERN]
        if probe.site is not Site.Z:
            return self.projected(node, PORT_SITE.index(probe.site), t, (), live)
        out = self.z(node, t, (), live)
        for patch in self._starting(word, Site.Z):
            out = self.value(patch, (node.id, "z"), t, out)
        return out

    def logits(self, cell: Cell) -> Tensor:
        """`[pos, vocab]`."""
        self.patches = cell.patches
        live = frozenset(i for i, p in enumerate(cell.patches) if p.complement)
        rows = [self.stream(self.graph.logits, -1, t, (), live) for t in range(self.length)]
        return self.toy.unembed(torch.stack(rows))

    def stream(self, reader: Node, port: int, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        """What a port of a copy reads at position t."""
        suffix = ((reader.id, port, self.first + t), *suffix)
        x = torch.zeros(self.graph.d_model, dtype=self.toy.dtype)
        start = (-1, -1, self.first + t)
        for rank in range(reader.rank + 1):
            alone = [(start,)] if reader.id <= STREAM_END and rank == reader.rank else []
            for patch in self._starting([(start, *suffix), *alone], Site.STREAM, rank):
                x = self.value(patch, ("stream", rank), t, x)
            for block in self.graph.blocks:
                if block.rank == rank < reader.rank:
                    x = x + self.block(block, t, suffix, live)
        return x

    def block(self, block: Block, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        members = self.graph.members(block.nodes)
        out = self._normed(block, sum(self.node(n, t, suffix, live) for n in members))
        for patch in self._starting(((block.first, -1, self.first + t), *suffix), Site.ATTN_OUT):
            whole = {w: self._whole(plain, block) for w, plain in self.plain.items()}
            out = self._mix(patch.value, {w: x[t] for w, x in whole.items()}, out)
        return out

    def node(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        """One copy's output at position t."""
        word = ((node.id, -1, self.first + t), *suffix)
        constant = node.kind == "attn_bias"
        for patch in self._starting(word, Site.OUT):
            if not patch.value.uses_self:
                return self.plain[self.run][node.id][t] if constant else self.value(patch, node.id, t, None)
        live = frozenset(i for i in live if not accepts(self.patches[i], word, Site.OUT))
        out = self.computed(node, t, suffix, live)
        for patch in self._starting(word, Site.OUT):
            out = out if constant else self.value(patch, node.id, t, out)
        return out

    def computed(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        if node.rank == 0 or node.kind == "attn_bias":
            for i in sorted(live):  # a whole path from the input that is not in the set
                return self.value(self.patches[i], node.id, t, None)
            return self.plain[self.run][node.id][t]
        if node.kind == "mlp":
            return self._mlp(node, t, suffix, live)
        return self.toy.write(node.layer, self.z(node, t, suffix, live)[None, None], [node.head])[0]

    def z(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        return self._z(node, t, *self.qkv(node, t, suffix, live), suffix)

    def qkv(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> list[Tensor]:
        last = t + 1 if self.graph.causal else self.length
        q, k, v = (self.plain[self.run][node.id, p].clone() for p in range(3))
        for port, x, positions in ((0, q, [t]), (1, k, range(last)), (2, v, range(last))):
            for s in positions:
                x[s] = self.projected(node, port, s, suffix, live)
        return [q, k, v]

    def _mlp(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        return self.toy.mlp_down(node.layer, self.post(node, t, suffix, live)[None])[0]

    def mlp_input(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        word = ((node.id, -1, self.first + t), *suffix)
        live = frozenset(i for i in live if not accepts(self.patches[i], word, Site.IN))
        live = frozenset(i for i in live if not accepts(self.patches[i], word, Site.POST))
        x = self.stream(node, -1, t, suffix, live)
        for patch in self._starting(word, Site.IN):
            x = self.value(patch, ("stream", node.rank), t, x)
        return x

    def post(self, node: Node, t: int, suffix: Word, live: frozenset[int]) -> Tensor:
        word, x = ((node.id, -1, self.first + t), *suffix), self.mlp_input(node, t, suffix, live)
        own = self.toy.mlp_post(node.layer, x[None])[0]
        plain = {w: self.toy.mlp_post(node.layer, y["stream", node.rank])[t] for w, y in self.plain.items()}
        post = own.clone()
        for n in range(len(own)):
            for patch in self._starting(word, Site.POST, n):
                post[n] = self._mix(patch.value, {w: y[n] for w, y in plain.items()}, own[n])
        return post

    def projected(self, node: Node, port: int, s: int, suffix: Word, live: frozenset[int]) -> Tensor:
        word = ((node.id, -1, self.first + s), *suffix)
        for site in (PORT_SITE[port], *((Site.SCORES, Site.PATTERN) if port < 2 else ())):
            live = frozenset(i for i in live if not accepts(self.patches[i], word, site))
        x = self.stream(node, port, s, suffix, live)
        out = self.toy.project(node.layer, port, self.toy.norm(node.layer, port, x[None]), [node.head])[0, 0]
        for patch in self._starting(word, PORT_SITE[port]):
            out = self.value(patch, (node.id, port), s, out)
        return out

    def _starting(self, word: Word | list[Word], site: Site, number: int = -1) -> list[Patch]:
        words = word if isinstance(word, list) else [word]
        found = [p for p in self.patches if not p.complement and any(accepts(p, w, site, number) for w in words)]
        return list({p.value: p for p in found}.values())  # one start with one value twice is that start once

    def value(self, patch: Patch, key: object, t: int, own: Tensor | None) -> Tensor:
        return self._mix(patch.value, {w: plain[key][t] for w, plain in self.plain.items()}, own)

    def _mix(self, value: Value, worlds: dict[str, Tensor], own: Tensor | None) -> Tensor:
        out = torch.zeros_like(worlds[self.run])
        for factor, source in value.terms:
            match source:
                case FromWorld(world):
                    out = out + factor * worlds[world]
                case Itself():
                    assert own is not None
                    out = out + factor * own
        return out
