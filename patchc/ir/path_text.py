"""Paths and sets of nodes as text, in the words of a spec.

The whole form adds what a spec has no word for (`site`, `rank`, `ports`, ...) where a step has it, and the parentheses
that tell one tree of paths from another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from patchc.ir.bits import bits
from patchc.ir.graph import PORTS, QKV, Kind, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens
from patchc.ir.wording import Wording

NO_PATH = "no path"
EMPTY = "nothing"


def stream_ranks(graph: ResidualGraph) -> dict[str, int]:
    """The rank that each name of a stream stands for."""
    return {graph.stream_name(rank): rank for rank in range(graph.top, 0, -1)}


def attention_output(graph: ResidualGraph, layer: int) -> Nodes:
    """The nodes that `attn_out[layer]` stands for; none where the layer has no attention."""
    return next((b.nodes for b in graph.blocks if b.layer == layer and b.nodes & graph.heads), 0)


@dataclass(frozen=True, slots=True)
class PathText:
    """Writes paths over a graph."""

    graph: ResidualGraph
    wording: Wording

    # ---- paths

    def path(self, path: Path, first: bool = True) -> str:
        """`first`: whether a value enters at its first step."""
        match path:
            case Step():
                return self.step(path, first)
            case Seq(parts):
                text = " -> ".join(self._part(p, first and i == 0) for i, p in enumerate(parts)) or "()"
                return f"{text} ->" if self.wording.whole and len(parts) == 1 else text
            case Alt(parts):
                text = " | ".join(f"({self.path(p, first)})" for p in parts)
                return f"{text} |" if self.wording.whole and len(parts) == 1 else text or self._no_path
            case Star(Step() as step) if " " not in self.step(step, False):
                return f"{self.step(step, False)}*"
            case Star(part):
                return f"({self.path(part, False)})*"

    @property
    def _no_path(self) -> str:
        return NO_PATH if self.wording.whole else EMPTY

    def _part(self, path: Path, first: bool) -> str:
        text = self.path(path, first)
        if isinstance(path, Step):
            return self.grouped(path, text)
        is_joined = isinstance(path, Alt) if not self.wording.whole else not isinstance(path, Star)
        return f"({text})" if is_joined and (self.wording.whole or " | " in text) else text

    def grouped(self, step: Step, text: str) -> str:
        """A step's text in parentheses where it is a union of nodes and nothing else."""
        is_union = text == self.nodes(step.nodes) and (" | " in text or " - " in text)
        return f"({text})" if is_union else text

    # ---- steps

    def step(self, step: Step, first: bool) -> str:
        """A step: where a value enters (`first`), or where a path goes on."""
        via = "" if step.via is None else f" via {self._edges(step.via)}"
        if first or step.site is Site.STREAM:
            return self._start(step, via)
        said = Step(step.nodes, ports=step.ports)
        suffix = self._ports(step.ports) + self._at(step.tokens) + via + self._unsaid(step, said)
        return self._suffixed(self.nodes(step.nodes), suffix)

    def _start(self, step: Step, via: str) -> str:
        at, rest = self._at(step.tokens) + via, self._unsaid(step, Step(step.nodes, site=step.site))
        named = self._named(step)
        if named:
            return named + at + self._unsaid(step, Step(step.nodes, site=step.site, rank=step.rank))
        match step.site:
            case Site.OUT:
                return self._suffixed(self.nodes(step.nodes), at + rest)
            case Site.PATTERN | Site.SCORES if step.sources != EVERYWHERE:
                rows = "*" if step.tokens == EVERYWHERE else self._tokens(step.tokens)
                site = f".{step.site}[{rows}, {self._tokens(step.sources)}]"
                rest = self._unsaid(step, Step(step.nodes, site=step.site, sources=step.sources))
                return self._suffixed(self.nodes(step.nodes), site + via + rest)
            case Site.POST if step.neurons >= 0:
                site = f".post[{self.wording.ranges(list(bits(step.neurons)))}]"
                rest = self._unsaid(step, Step(step.nodes, site=step.site, neurons=step.neurons))
                return self._suffixed(self.nodes(step.nodes), site + at + rest)
            case _:
                return self._suffixed(self.nodes(step.nodes), f".{step.site}{at}{rest}")

    def spelt(self, step: Step) -> str:
        """Nodes and site, without any name that stands for both."""
        rank = "" if step.rank == -1 else f" rank {step.rank}"
        return self._suffixed(self.nodes(step.nodes), f".{step.site}{rank}")

    def _named(self, step: Step) -> str:
        """A stream or an attention output by its own name, or nothing where the name would say something else."""
        if step.site is Site.STREAM:
            name = self.graph.stream_name(step.rank)
            is_exact = stream_ranks(self.graph)[name] == step.rank and step.nodes == self.graph.below(step.rank)
            return name if is_exact or not self.wording.whole else ""
        if step.site is Site.ATTN_OUT and step.nodes:
            layer = self.graph.nodes[next(bits(step.nodes))].layer
            is_exact = layer is not None and step.nodes == attention_output(self.graph, layer) and step.rank == -1
            return f"attn_out[{layer}]" if is_exact or not self.wording.whole else ""
        return ""

    def _unsaid(self, step: Step, said: Step) -> str:
        """What a step has and its notation, which reads as `said`, does not say."""
        if not self.wording.whole:
            return ""
        words = [
            ("ports", step.ports != said.ports, "{" + ", ".join(PORTS[i] for i in bits(step.ports)) + "}"),
            ("site", step.site is not said.site, f"{step.site}"),
            ("rank", step.rank != said.rank, f"{step.rank}"),
            ("sources", step.sources != said.sources, self._tokens(step.sources)),
            ("neurons", step.neurons != said.neurons, self._neurons(step.neurons)),
        ]
        return "".join(f" {word} {text}" for word, differs, text in words if differs)

    def _neurons(self, neurons: int) -> str:
        return "" if neurons < 0 else self.wording.ranges(list(bits(neurons)))

    def _suffixed(self, names: str, suffix: str) -> str:
        is_union = " | " in names or " - " in names
        return f"({names}){suffix}" if is_union and suffix else names + suffix

    def _ports(self, entered: int) -> str:
        if entered == QKV:
            return ""
        ports = [PORTS[i] for i in bits(entered)]
        return f".{ports[0]}" if len(ports) == 1 else f".{{{', '.join(ports)}}}"

    def _at(self, tokens: Tokens) -> str:
        return "" if tokens == EVERYWHERE else f" @ {self._tokens(tokens)}"

    def _tokens(self, tokens: Tokens) -> str:
        return self.wording.spots(bits(tokens & self.wording.layout.all))

    def _edges(self, edges: Edges) -> str:
        rows = self._rows(edges) if self.wording.whole else self._joined(edges)
        shown = [
            f"{self.nodes(writers)} -> {self.nodes(1 << node)}{self._ports(ports)}" for node, writers, ports in rows
        ]
        return ("" if edges.keep else "not ") + "{" + self.wording.listed(shown) + "}"

    def _rows(self, edges: Edges) -> Iterator[tuple[int, Nodes, int]]:
        """(reader, writers, ports) of each row; all ports stand for a reader that has none."""
        for (node, port), writers in edges.rows:
            yield node, writers, QKV if port < 0 else 1 << port

    def _joined(self, edges: Edges) -> list[tuple[int, Nodes, int]]:
        """The same, a reader's ports together where they have the same writers."""
        joined: dict[tuple[int, Nodes], int] = {}
        for node, writers, ports in self._rows(edges):
            joined[node, writers] = joined.get((node, writers), 0) | ports
        return [(node, writers, ports) for (node, writers), ports in joined.items()]

    # ---- node sets

    def nodes(self, nodes: Nodes) -> str:
        """A set by the names of the sets that it is made of: `any`, `mlp`, `head[2, *]`, `head[0, 1]`."""
        graph = self.graph
        for name, whole in (
            ("any", graph.all),
            ("head", graph.heads),
            ("mlp", graph.mlps),
            ("input", graph.input),
        ):
            if nodes == whole and nodes:
                return name
        if self._without(nodes):
            return self._without(nodes)
        return " | ".join(self._names(nodes)) or EMPTY

    def _without(self, nodes: Nodes) -> str:
        """`any - a - b` where less is missing than is there."""
        missing = self.graph.all & ~nodes
        few = 2 * missing.bit_count() < nodes.bit_count() and not nodes & self.graph.logits_set
        return " - ".join(["any", *self._names(missing)]) if few else ""

    def _names(self, nodes: Nodes) -> Iterator[str]:
        if nodes & self.graph.input == self.graph.input:
            yield "input"
            nodes &= ~self.graph.input
        for block in self.graph.blocks:
            heads = block.nodes & self.graph.heads
            if heads and nodes & heads == heads:
                yield f"head[{block.layer}, *]"
                nodes &= ~heads
            yield from (self.graph.nodes[i].name for i in bits(nodes & block.nodes))
        if nodes & self.graph.logits_set:
            yield Kind.LOGITS.value
