"""Whole suffixes: the plain model run on changed streams, each from the rank where it enters up to the logits.

After they enter, suffixes share nothing, so there is nothing to look up: those that have changed at the same tokens and
are asked for the same stand together as `[run, token, d_model]`, and every matrix product takes the rows of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from patchc.execute.alike import Alike, alike
from patchc.execute.indices import rows, where
from patchc.execute.packing import even
from patchc.ir.graph import Block, BlockKind
from patchc.ir.ops import Run, VariantId
from patchc.ir.program import GATHERED
from patchc.ir.tokens import Tokens

if TYPE_CHECKING:
    from patchc.execute.walk import Walk

Kind = tuple[Tokens, Tokens]
"""Where runs have changed, and what is asked of them at the top."""


@dataclass(eq=False)
class Group:
    """Runs of one kind: their streams `[run, token, d_model]`, at the tokens that have changed and are read; `rows`:
    where they stand in the flat tensor."""

    kind: Kind
    tokens: Tokens
    runs: list[VariantId]
    x: Tensor
    rows: slice

    def of(self, flat: Tensor) -> Tensor:
        """The group's part of rows that stand as its own do, `[run, token, ...]`."""
        return flat[self.rows].view(len(self.runs), self.tokens.bit_count(), *flat.shape[1:])


@dataclass(frozen=True, slots=True)
class Move:
    """A group on its way through a rank: the tokens that go out, where its rows that ask stand, and its outgoing
    ones."""

    group: Group
    tokens: Tokens
    asking: slice
    outgoing: slice

    @property
    def own(self) -> Tokens:
        """Outgoing tokens that have changed below the rank already."""
        return self.group.tokens & self.tokens

    @property
    def rest(self) -> Tokens:
        """Outgoing tokens that attention changes first."""
        return self.tokens & ~self.group.tokens

    def asked(self, flat: Tensor) -> Tensor:
        """The group's part of the rows that ask, `[run, token, ...]`."""
        return flat[self.asking].view(len(self.group.runs), self.own.bit_count(), *flat.shape[1:])

    def view(self, flat: Tensor) -> Tensor:
        """The group's part of outgoing rows, `[run, token, ...]`."""
        return flat[self.outgoing].view(len(self.group.runs), self.tokens.bit_count(), *flat.shape[1:])


@dataclass
class Suffixes:
    """The suffixes of one pass, block by block with the rest of it."""

    walk: Walk
    groups: list[Group] = field(default_factory=list[Group])
    flat: Tensor = field(default_factory=lambda: torch.empty(0))
    """The streams of all groups, one after another."""

    def __post_init__(self) -> None:
        dag = self.walk.dag
        self.graph, self.pieces, self.base = dag.graph, self.walk.pieces, self.walk.stored.base_run
        self.rows, self.device = self.walk.schedule.rows, self.walk.device
        self.entering: dict[int, list[VariantId]] = {}
        self._needed: dict[Tokens, list[Tokens]] = {}
        for i in self.walk.demand.tokens:
            if isinstance(op := dag.ops[i], Run):
                self.entering.setdefault(op.rank, []).append(i)
        self.blocks = [[(i, b) for i, b in enumerate(self.graph.blocks) if b.rank == r] for r in range(self.graph.top)]
        self.group_of = torch.tensor([self.pieces.kv_head(h) for h in range(self.graph.n_heads)], device=self.device)

    # ---- which tokens
    def needed(self, demanded: Tokens) -> list[Tokens]:
        """At which tokens the stream below each rank is read, where the end is asked for `demanded`."""
        if demanded not in self._needed:
            out = [demanded]
            for blocks in reversed(self.blocks):
                out.append(self.walk.dag.reach(out[-1]) if _attends(blocks) else out[-1])
            self._needed[demanded] = out[::-1]
        return self._needed[demanded]

    # ---- one rank
    def advance(self, rank: int) -> None:
        """Let the runs of this rank enter, and run its blocks."""
        if entering := self.entering.get(rank):
            self._enter(rank, entering)
        if not self.groups:
            return
        blocks = self.blocks[rank]
        if [b.kind for _, b in blocks] == [BlockKind.MLP]:
            for some in even(self.flat, self.rows):
                some += self.pieces.mlp(self._layer(blocks[0][0]), some)
        else:
            self._rank(rank)

    def _layer(self, index: int) -> int:
        layer = self.graph.blocks[index].layer
        assert layer is not None
        return layer

    def _enter(self, rank: int, entering: Sequence[VariantId]) -> None:
        dag, demand = self.walk.dag, self.walk.demand
        new: dict[Kind, list[tuple[VariantId, VariantId]]] = {}
        for i in entering:
            op = dag.ops[i]
            assert isinstance(op, Run)
            new.setdefault((dag.changed[op.input], demand.tokens[i]), []).append((i, op.input))
        parts: dict[Kind, list[Tensor]] = {g.kind: [g.x.flatten(0, 1)] for g in self.groups}
        members = {g.kind: list(g.runs) for g in self.groups}
        tokens = {g.kind: g.tokens for g in self.groups}
        for kind, runs in new.items():
            tokens[kind] = kind[0] & self.needed(kind[1])[rank]
            parts.setdefault(kind, []).append(self.walk.stream_rows(rank, [(x, tokens[kind]) for _, x in runs]))
            for _, x in runs if tokens[kind] else ():  # else nobody has asked for it
                self.walk.release(x)
            members.setdefault(kind, []).extend(i for i, _ in runs)
        self._lay_out(torch.cat([x for some in parts.values() for x in some]), members, tokens)

    def _lay_out(self, flat: Tensor, members: dict[Kind, list[VariantId]], tokens: dict[Kind, Tokens]) -> None:
        self.flat, self.groups, first = flat, [], 0
        for kind, runs in members.items():
            n = tokens[kind].bit_count()
            mine = flat[first : first + n * len(runs)]
            at = slice(first, first + n * len(runs))
            self.groups.append(Group(kind, tokens[kind], runs, mine.view(len(runs), n, flat.shape[1]), at))
            first = at.stop

    # ---- a rank with attention, or several blocks side by side
    def _rank(self, rank: int) -> None:
        """The streams above a rank: what was below, at the tokens that are read further up, and what its blocks add
        there."""
        spread = self.walk.dag.spread if _attends(self.blocks[rank]) else _same
        by_kind: dict[Kind, list[Group]] = {}
        for g in self.groups:
            by_kind.setdefault((spread(g.kind[0]), g.kind[1]), []).append(g)
        tokens = {kind: kind[0] & self.needed(kind[1])[rank + 1] for kind in by_kind}
        moves = list(_moves(by_kind, tokens))
        asking = self._asking(moves)
        flat = self.flat.new_empty(moves[-1].outgoing.stop, self.graph.d_model)
        self._residual(rank, moves, flat)
        for index, block in self.blocks[rank]:
            if block.kind is BlockKind.ATTENTION:
                self._attention(index, asking, moves, flat)
            else:
                self._mlp(index, asking, moves, flat)
        self._lay_out(flat, {kind: [i for g in some for i in g.runs] for kind, some in by_kind.items()}, tokens)

    def _asking(self, moves: Sequence[Move]) -> Tensor:
        """The incoming rows of tokens that go out: those that have changed themselves."""
        if all(not m.group.tokens & ~m.tokens for m in moves) and [m.group for m in moves] == self.groups:
            return self.flat
        return torch.cat([m.group.x[:, where(m.group.tokens, m.own, self.device)].flatten(0, 1) for m in moves])

    def _residual(self, rank: int, moves: Sequence[Move], flat: Tensor) -> None:
        """What was below: a run's own, or the base run's."""
        stream = self.base.stream[rank]
        for m in moves:
            out = m.view(flat)
            if m.rest:
                out[:, where(m.tokens, m.rest, self.device)] = stream[rows(m.rest, self.device)]
            if m.own:
                out[:, where(m.tokens, m.own, self.device)] = m.group.x[:, where(m.group.tokens, m.own, self.device)]

    def _mlp(self, index: int, asking: Tensor, moves: Sequence[Move], flat: Tensor) -> None:
        """Adds an MLP that reads what was below the rank."""
        written = torch.cat([self.pieces.mlp(self._layer(index), some) for some in even(asking, self.rows)])
        for m in moves:
            out = m.view(flat)
            if m.rest:
                out[:, where(m.tokens, m.rest, self.device)] += self.base.mlp[index][rows(m.rest, self.device)]
            if m.own:
                out[:, where(m.tokens, m.own, self.device)] += m.asked(written)

    # ---- attention
    def _attention(self, index: int, asking: Tensor, moves: Sequence[Move], flat: Tensor) -> None:
        """Adds what attention writes."""
        layer = self._layer(index)
        z = self._z(index, layer, asking, moves, len(flat))
        bias = self.pieces.attn_bias(layer)
        for some, heads in zip(even(flat, self.rows), even(z, self.rows), strict=True):
            written = self.pieces.write(layer, heads)
            some += self.pieces.post_norm(layer, written if bias is None else written + bias)

    def _z(self, index: int, layer: int, asking: Tensor, moves: Sequence[Move], size: int) -> Tensor:
        at_keys = torch.cat([rows(g.tokens, self.device).repeat(len(g.runs)) for g in self.groups])
        at_queries = torch.cat([rows(m.own, self.device).repeat(len(m.group.runs)) for m in moves])
        if asking is self.flat and self.pieces.shares_norm(layer):
            q, k, v = self._projected(layer, (0, 1, 2), asking, at_keys)
        else:
            (q,) = self._projected(layer, (0,), asking, at_queries)
            k, v = self._projected(layer, (1, 2), self.flat, at_keys)
        z = q.new_empty(size, *q.shape[1:])
        for m in moves:
            n, mine_q, (mine_k, mine_v) = len(m.group.runs), m.asked(q), map(m.group.of, (k, v))
            out = m.view(z)
            for form in alike(self.walk.dag.layout, self.graph.causal, m.group.tokens, m.tokens, self.device):
                step = max(1, GATHERED // (len(form.tokens) * (2 * form.n_keys + len(form.queries))))
                for i in range(0, n, step):
                    some = slice(i, i + step)
                    found = self._core(index, layer, form, mine_q[some], mine_k[some], mine_v[some])
                    if form.outgoing is None:
                        out[some] = found.flatten(1, 2)
                    else:
                        out[some, form.outgoing] = found
        return z

    def _projected(self, layer: int, ports: Sequence[int], x: Tensor, at: Tensor) -> list[Tensor]:
        """What attention takes of some rows, `[row, head, d_head]` for each port; `at`: their tokens."""
        y, out = self.pieces.norm(layer, ports[0], x), list[Tensor]()
        for port in ports:
            if port != ports[0] and not self.pieces.shares_norm(layer):
                y = self.pieces.norm(layer, port, x)
            raw = self.pieces.project(layer, port, y)
            out.append(self.pieces.prepare(layer, port, raw, at, self.walk.tables))
        return out

    def _core(self, index: int, layer: int, form: Alike, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """z `[run, prompt, query, head, d_head]` of prompts of one form: a run's own rows laid over the base run's."""
        ready = self.base.attention[index].ready
        n, n_prompts = len(q), len(form.tokens)
        queries = form.pick(q, form.asking)
        if len(form.asking_at) < len(form.queries):
            own = queries
            queries = ready[0][form.tokens[:, form.queries]].expand(n, -1, -1, -1, -1).clone()
            queries[:, :, form.asking_at] = own
        sides: list[Tensor] = []
        for base, own in zip(ready[1:], (k, v), strict=True):
            own = form.pick(own, form.incoming)
            if len(form.changed) < form.n_keys:
                side = base[form.tokens].expand(n, -1, -1, -1, -1).clone()
                side[:, :, form.changed] = own
            else:
                side = own
            side = side.flatten(0, 1)
            sides.append(side if side.shape[2] == self.graph.n_heads else side[:, :, self.group_of])
        positions = form.queries.expand(n * n_prompts, -1)
        z = self.pieces.attend(
            layer, queries.flatten(0, 1), sides[0], sides[1], positions, form.length, self.walk.tables
        )
        return z.view(n, n_prompts, *z.shape[1:])

    # ---- the end
    def finals(self) -> Iterator[tuple[VariantId, Tensor]]:
        """Each run's final stream at the tokens that are demanded of it."""
        return ((i, x) for group in self.groups for i, x in zip(group.runs, group.x, strict=True))


def _attends(blocks: Sequence[tuple[int, Block]]) -> bool:
    return any(b.kind is BlockKind.ATTENTION for _, b in blocks)


def _same(tokens: Tokens) -> Tokens:
    return tokens


def _moves(by_kind: Mapping[Kind, Sequence[Group]], tokens: Mapping[Kind, Tokens]) -> Iterator[Move]:
    """Groups in the order in which they go out."""
    asking = outgoing = 0
    for kind, groups in by_kind.items():
        for g in groups:
            n = len(g.runs)
            asked, left = n * (g.tokens & tokens[kind]).bit_count(), n * tokens[kind].bit_count()
            yield Move(g, tokens[kind], slice(asking, asking + asked), slice(outgoing, outgoing + left))
            asking, outgoing = asking + asked, outgoing + left
