"""Patches as text: paths in the words of a spec, and the values that they carry. Long lists are cut.

Prints what `ir.paths` and `ir.experiment` hold; whole studies are for `ir.printer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from patchc.ir.bits import bits
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Source, Value
from patchc.ir.graph import PORTS, QKV, Kind, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout, Tokens

ITEMS = 12
"""How many items of one list are printed."""


def print_path(path: Path, graph: ResidualGraph, layout: Layout) -> str:
    """A path as a spec would write it; tokens are `prompt:position`, the prompt left off where there is
    one."""
    return _Paths(graph, layout).path(path, True)


# ---- values


def print_value(value: Value, layout: Layout) -> str:
    """A value as a spec would write it, where a spec can name it: `0.5 * corrupt + self`, `clean @ {9}`."""
    if not value.terms:
        return "zero"
    shown = [(c, _source(s, layout)) for c, s in value.terms]
    return " + ".join(text if c == 1 else f"{c:g} * {text}" for c, text in shown)


def _source(source: Source, layout: Layout) -> str:
    match source:
        case FromWorld(world):
            return world
        case Mean(world, over_positions, groups):
            by = "" if groups is None else f", by groups {shortened([str(g) for g in groups])}"
            return f"mean({world}{', over=positions' if over_positions else ''}{by})"
        case Moved(inner, tokens):
            return f"{_source(inner, layout)} {_moved(tokens, layout)}"
        case Noise(std, seed, relative):
            return f"noise({'sigma' if relative else 'std'}={std:g}, seed={seed})"
        case Blocked():
            return "blocked"
        case Itself():
            return "self"
        case Given(key):
            return f"tensor({key!r})"


def _moved(tokens: tuple[int, ...], layout: Layout) -> str:
    """`@ {9}`: of one token of each prompt; `of prompts 2, 0, 1`: at the same position of another prompt."""
    rows = [tokens[start : start + n] for start, n in zip(layout.offsets, layout.lengths, strict=False)]
    places = [[layout.place(t) for t in row] for row in rows]
    if all(len(set(row)) == 1 for row in rows):
        return f"@ {_spots([row[0] for row in places], layout)}"
    if all(p == i for row in places for i, (_, p) in enumerate(row)):
        return f"of prompts {shortened([str(row[0][0]) for row in places])}"
    return f"of tokens {shortened([f'{i}:{p}' for row in places for i, p in row])}"


def _spots(places: Iterable[tuple[int, int]], layout: Layout) -> str:
    """`{0, 3}`, or `{0:3, 1:4}` (prompt:position) where there are several prompts."""
    alone = layout.n_prompts == 1
    return "{" + shortened([str(p) if alone else f"{i}:{p}" for i, p in places]) + "}"


# ---- paths


class _Paths:
    """Steps in the words of a spec."""

    def __init__(self, graph: ResidualGraph, layout: Layout):
        self._graph = graph
        self._layout = layout

    def path(self, path: Path, first: bool) -> str:
        match path:
            case Step():
                return self._step(path, first)
            case Seq(parts):
                return " -> ".join(self._part(p, first and i == 0) for i, p in enumerate(parts)) or "()"
            case Alt(parts):
                return " | ".join(f"({self.path(p, first)})" for p in parts) or "nothing"
            case Star(Step() as step) if self._is_plain(step):
                return f"{self._step(step, False)}*"
            case Star(part):
                return f"({self.path(part, False)})*"

    def _part(self, path: Path, first: bool) -> str:
        text = self.path(path, first)
        is_union = isinstance(path, Alt) or (isinstance(path, Step) and text == self.nodes(path.nodes))
        return f"({text})" if is_union and (" | " in text or " - " in text) else text

    def _is_plain(self, step: Step) -> bool:
        return step.tokens == EVERYWHERE and step.via is None and " " not in self.nodes(step.nodes)

    def _step(self, step: Step, first: bool) -> str:
        via = "" if step.via is None else f" via {self._edges(step.via)}"
        if first or step.site is Site.STREAM:
            return self._start(step, via)
        at = "" if step.tokens == EVERYWHERE else f" @ {self._tokens(step.tokens)}"
        return self._suffixed(self.nodes(step.nodes), self._ports(step.ports) + at + via)

    def _start(self, step: Step, via: str) -> str:
        at = "" if step.tokens == EVERYWHERE else f" @ {self._tokens(step.tokens)}"
        match step.site:
            case Site.OUT:
                return self._suffixed(self.nodes(step.nodes), at + via)
            case Site.STREAM:
                return self._graph.stream_name(step.rank) + at + via
            case Site.ATTN_OUT:
                return f"attn_out[{self._graph.nodes[next(bits(step.nodes))].layer}]{at}{via}"
            case Site.PATTERN | Site.SCORES if step.sources != EVERYWHERE:
                rows = "*" if step.tokens == EVERYWHERE else self._tokens(step.tokens)
                site = f".{step.site}[{rows}, {self._tokens(step.sources)}]"
                return self._suffixed(self.nodes(step.nodes), site + via)
            case Site.POST if step.neurons >= 0:
                site = f".post[{_ranges_of(list(bits(step.neurons)))}]"
                return self._suffixed(self.nodes(step.nodes), site + at + via)
            case _:
                return self._suffixed(self.nodes(step.nodes), f".{step.site}{at}{via}")

    def _suffixed(self, names: str, suffix: str) -> str:
        is_union = " | " in names or " - " in names
        return f"({names}){suffix}" if is_union and suffix else names + suffix

    def _ports(self, entered: int) -> str:
        if entered == QKV:
            return ""
        ports = [PORTS[i] for i in bits(entered)]
        return f".{ports[0]}" if len(ports) == 1 else f".{{{', '.join(ports)}}}"

    def _tokens(self, tokens: Tokens) -> str:
        return _spots((self._layout.place(t) for t in bits(tokens & self._layout.all)), self._layout)

    def _edges(self, edges: Edges) -> str:
        joined: dict[tuple[int, Nodes], int] = {}
        for (node, port), writers in edges.rows:
            joined[node, writers] = joined.get((node, writers), 0) | (QKV if port < 0 else 1 << port)
        shown = [
            f"{self.nodes(writers)} -> {self.nodes(1 << node)}{self._ports(ports)}"
            for (node, writers), ports in joined.items()
        ]
        return ("" if edges.keep else "not ") + "{" + shortened(shown) + "}"

    # ---- node sets

    def nodes(self, nodes: Nodes) -> str:
        """A set by the names of the sets that it is made of: `any`, `mlp`, `head[2, *]`, `head[0, 1]`."""
        graph = self._graph
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
        return " | ".join(self._names(nodes)) or "nothing"

    def _without(self, nodes: Nodes) -> str:
        """`any - a - b` where less is missing than is there."""
        missing = self._graph.all & ~nodes
        few = 2 * missing.bit_count() < nodes.bit_count() and not nodes & self._graph.logits_set
        return " - ".join(["any", *self._names(missing)]) if few else ""

    def _names(self, nodes: Nodes) -> Iterator[str]:
        if nodes & self._graph.input == self._graph.input:
            yield "input"
            nodes &= ~self._graph.input
        for block in self._graph.blocks:
            heads = block.nodes & self._graph.heads
            if heads and nodes & heads == heads:
                yield f"head[{block.layer}, *]"
                nodes &= ~heads
            yield from (self._graph.nodes[i].name for i in bits(nodes & block.nodes))
        if nodes & self._graph.logits_set:
            yield Kind.LOGITS.value


# ---- lists


def _ranges_of(numbers: list[int]) -> str:
    """`3`, or `{1, 5..9}`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    shown = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs]
    return shown[0] if len(shown) == 1 else "{" + shortened(shown) + "}"


def shortened(items: list[str]) -> str:
    """The first items, and how many more there are."""
    rest = len(items) - ITEMS
    return ", ".join(items[:ITEMS]) + (f", and {rest} more" if rest > 0 else "")
