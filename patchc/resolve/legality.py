"""Whether a set of paths holds a path that the model has: every edge leads upwards, and some token takes them
all.

A node reads only what writes at a lower rank. Of all ways to take a step the one that ends lowest leaves the
most choice to the steps after it, so that a walk that is always as low as it can be finds a legal path if
there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from patchc.diagnostics import RULES, Diagnostic, Span
from patchc.ir.bits import bits, bitset
from patchc.ir.graph import Kind, ResidualGraph
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout, Tokens
from patchc.resolve.terms import Chain, Circuit, Either, NodeSet, Repeat, Term

BACKWARD_EDGE = RULES.add("backward-edge", "a path goes from a node to one that reads before the node writes")
EMPTY_SET = RULES.add("empty-set", "a set of nodes with nothing in it")
HIDDEN_ENTRY = RULES.add("hidden-entry", "an entry of an attention pattern that the model's mask hides")
NO_POSITION = RULES.add("no-position", "no position takes every step of a path")

EMPTY_CIRCUIT = RULES.add("empty-circuit", "a circuit that holds no path from the input to the logits")

LONG = 60
"""A set whose names take more characters is told by their number."""


def endless_circuit(span: Span | None, ends: str) -> Diagnostic:
    """For a circuit of edges that leads from the input to nothing that is measured."""
    message = f"no path of this circuit's edges leads from the input to {ends}"
    return EMPTY_CIRCUIT.at(span, message, fix="add the edges that are missing, such as `head[3, 1] -> logits`")


def empty_circuit(span: Span | None) -> Diagnostic:
    message = "no path from the input to the logits is in this circuit: its first nodes are not `input`'s"
    return EMPTY_CIRCUIT.at(span, message, fix="add `input`, or `embed`")


class Legality:
    """The rank rule of one model."""

    def __init__(self, graph: ResidualGraph):
        self._graph = graph
        entered = [n for n in graph.nodes if n.kind is not Kind.ATTN_BIAS]  # no edge leads into a constant
        ranks = range(graph.top + 1)
        self._above = [~0, *(bitset(n.id for n in entered if n.rank > rank) for rank in ranks)]

    def lowest(self, path: Path, after: int = -1) -> int | None:
        """The lowest rank at which a path that begins above rank `after` can end, or None where there is
        none."""
        match path:
            case Step():
                return self._lowest_of(path.nodes, path.site, path.rank, after)
            case Seq(parts):
                at: int | None = after
                for part in parts:
                    at = self.lowest(part, at)
                    if at is None:
                        return None
                return at
            case Alt(parts):
                return min((r for p in parts if (r := self.lowest(p, after)) is not None), default=None)
            case Star():
                return after

    def _lowest_of(self, nodes: int, site: Site, rank: int, after: int) -> int | None:
        if site is Site.STREAM:
            return rank - 1 if rank > after else None
        higher = nodes & self._above[after + 1]
        return self._graph.nodes[(higher & -higher).bit_length() - 1].rank if higher else None

    # ---- the reason, in the terms' own words

    def fault(self, term: Term) -> Diagnostic | None:
        """Why a path, or one of its alternatives as they are written, has no legal path; None where it
        has."""
        return self._walk(term, -1, "")[1]

    def _walk(self, term: Term, after: int, before: str) -> tuple[int, Diagnostic | None]:
        """The lowest end of `term` after rank `after`, and what is wrong with it; `before` names the step
        before."""
        match term:
            case NodeSet():
                return self._enter(term, after, before)
            case Chain(parts):
                for i, part in enumerate(parts):
                    after, fault = self._walk(part, after, before)
                    if fault:
                        return after, replace(fault, fix=fault.fix or self._turned(parts[i - 1 : i + 1]))
                    before = before if isinstance(part, Repeat) else self._label(part)
                return after, None
            case Either(parts):
                ends = [self._walk(part, after, before) for part in parts]
                return min(end for end, _ in ends), next((f for _, f in ends if f), None)
            case Repeat():
                return after, None
            case Circuit():
                fault = None if term.starts(self._graph) else empty_circuit(term.span)
                return self._graph.top, fault

    def _turned(self, steps: Sequence[Term]) -> str | None:
        """The fix for two nodes that stand the wrong way round."""
        sets = [step for step in steps if isinstance(step, NodeSet) and len(step.members) == 1]
        if len(sets) < 2 or not sets[0].members[0].ports:
            return None
        if self._enter(sets[0], self._enter(sets[1], -1, "")[0], "")[1]:
            return None
        reader, writer = (step.label.partition(".")[0] for step in sets)
        return f"did you mean `{writer} -> {reader}`?"

    def _enter(self, nodes: NodeSet, after: int, before: str) -> tuple[int, Diagnostic | None]:
        if not nodes.members:
            return after, EMPTY_SET.at(nodes.span, "there is no node in this set")
        ends = [self._lowest_of(m.nodes, m.site, m.rank, after) for m in nodes.members]
        found = [end for end in ends if end is not None]
        if found:
            return min(found), None
        message = f"{before} writes after {self._label(nodes)} reads: no edge leads from the one to the other"
        beside = min((self._graph.nodes[i].rank for i in bits(nodes.nodes)), default=-1) == after
        if before.startswith("head") and beside and not nodes.nodes & ~self._graph.heads:
            label = self._label(nodes)
            message = f"no edge leads from {before} to {label}: a layer's heads run side by side, none reads another"
        elif not nodes.nodes & ~self._graph.of(Kind.ATTN_BIAS):
            message = f"no edge leads into {self._label(nodes)}, which is the same in every run"
        return after, BACKWARD_EDGE.at(nodes.span, message)

    def _label(self, term: Term) -> str:
        if not isinstance(term, NodeSet):
            return "what stands before it"
        return term.label if len(term.label) <= LONG else f"every one of {len(term.members)} nodes"


# ---- positions


@dataclass(frozen=True)
class Reach:
    """Where a path's value can have come to: residual edges stay at their token, and only keys and values
    move it."""

    graph: ResidualGraph
    layout: Layout

    def end(self, path: Path) -> Tokens:
        """The tokens at which some path arrives; none means that no position takes every step."""
        return self._after(path, self.layout.all, True)

    def _after(self, path: Path, tokens: Tokens, first: bool) -> Tokens:
        match path:
            case Step():
                return self._through(path, tokens & path.tokens, first)
            case Seq(parts):
                for i, part in enumerate(parts):
                    tokens = self._after(part, tokens, first and i == 0)
                return tokens
            case Alt(parts):
                out = 0
                for part in parts:
                    out |= self._after(part, tokens, first)
                return out
            case Star(part):
                while (more := tokens | self._after(part, tokens, False)) != tokens:
                    tokens = more
                return tokens

    def _through(self, step: Step, tokens: Tokens, first: bool) -> Tokens:
        if step.site is Site.STREAM:
            return tokens
        moves = step.site in (Site.K, Site.V) if first else step.ports & 6 and step.nodes & self.graph.heads
        if not moves:
            return tokens
        return self.layout.after(tokens) if self.graph.causal else self.layout.whole(tokens)
