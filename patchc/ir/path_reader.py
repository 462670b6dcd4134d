"""The printed form of paths, values and tokens, read back from the bottom up.

A path's meaning depends on whether a value enters at its first step, which is known only above it: each rule gives a
function of that.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import Any

from lark import Token, Transformer

from patchc.ir.bits import bitset
from patchc.ir.experiment import Blocked, FromWorld, Given, Itself, Mean, Moved, Noise, Source, Value
from patchc.ir.graph import PORTS, Kind, Nodes, ResidualGraph
from patchc.ir.path_text import EMPTY, attention_output, stream_ranks
from patchc.ir.paths import Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout

Built = Callable[[bool], Path]
"""A path, once it is known whether a value enters at its first step."""
Change = Callable[[Step, bool], Step]
"""A suffix of a step: the step with it, where a value enters (or not)."""
Spot = tuple[int, ...]
"""What stands in braces: a number, prompt and position, or every number of a range."""


class PathReader(Transformer[Token, Any]):
    """Paths over `graph`; `layout` is set once the data are read."""

    def __init__(self, graph: ResidualGraph):
        super().__init__()
        self._graph = graph
        self._streams = stream_ranks(graph)
        self._sets = {
            "any": graph.all,
            "head": graph.heads,
            "mlp": graph.mlps,
            "input": graph.input,
            EMPTY: 0,
            **{n.name: 1 << n.id for n in reversed(graph.nodes)},
        }
        self.layout = Layout(())

    # ---- words

    def NUMBER(self, token: Token) -> int | float:  # noqa: N802
        return int(token) if token.lstrip("-").isdigit() else float(token)

    def STRING(self, token: Token) -> str:  # noqa: N802
        return literal_eval(token)  # a text and nothing else: the terminal is that of a string

    def NAME(self, token: Token) -> str:  # noqa: N802
        return str(token)

    # ---- paths

    def none(self, _: list[Any]) -> Built:
        return lambda first: Alt(())

    def chain(self, items: list[Built]) -> Built:
        return lambda first: Seq(tuple(p(first and i == 0) for i, p in enumerate(items)))

    def alt(self, items: list[Built]) -> Built:
        return lambda first: Alt(tuple(p(first) for p in items))

    def star(self, items: list[Built]) -> Built:
        return lambda first: Star(items[0](False))

    def paren(self, items: list[Built]) -> Built:
        return items[0] if items else lambda first: Seq(())

    def step(self, items: list[Any]) -> Built:
        base, *changes = items

        def built(first: bool) -> Path:
            step = base(first)
            if not isinstance(step, Step):
                raise ValueError("only nodes have a site, positions and edges")
            for change in changes:
                step = change(step, first or step.site is Site.STREAM)
            return step

        return built

    def union(self, items: list[Built]) -> Built:
        nodes = 0
        for item in items:
            nodes |= nodes_of(item)
        return lambda first: Step(nodes)

    def difference(self, items: list[Built]) -> Built:
        nodes = nodes_of(items[0])
        for item in items[1:]:
            nodes &= ~nodes_of(item)
        return lambda first: Step(nodes)

    def atom(self, items: list[Any]) -> Built:
        step = self._atom(items[0], items[1:])
        return lambda first: step

    def _atom(self, kind: str, index: list[Any]) -> Step:
        name = f"{kind}[{', '.join(map(str, index))}]" if index else kind
        if name in self._streams:
            rank = self._streams[name]
            return Step(self._graph.below(rank), site=Site.STREAM, rank=rank)
        if kind == "attn_out" and len(index) == 1:
            return Step(attention_output(self._graph, index[0]), site=Site.ATTN_OUT)
        if kind == "head" and index[1:] == ["*"]:
            heads = (n for n in self._graph.nodes if n.kind is Kind.HEAD and n.layer == index[0])
            return Step(bitset(n.id for n in heads))
        return Step(self._sets[name])

    # ---- suffixes of a step

    def site(self, items: list[str]) -> Change:
        name = items[0]

        def change(step: Step, first: bool) -> Step:
            if first or name == Site.STREAM:
                return replace(step, site=Site(name))
            return replace(step, ports=_ports(items))

        return change

    def entries(self, items: list[Any]) -> Change:
        name, rows, sources = items
        tokens = -1 if rows is None else self._tokens(rows)
        return lambda step, first: replace(step, site=Site(name), tokens=tokens, sources=self._tokens(sources))

    def every(self, _: list[Any]) -> None:
        return None

    def neurons(self, items: list[Any]) -> Change:
        *site, numbers = items
        neurons = bitset(_numbers(numbers if isinstance(numbers, list) else [numbers]))
        return lambda step, first: replace(step, site=Site(site[0]) if site else step.site, neurons=neurons)

    def ports(self, items: list[str]) -> Change:
        return lambda step, first: replace(step, ports=_ports(items))

    def port_words(self, items: list[str]) -> Change:
        return self.ports(items)

    def at(self, items: list[Any]) -> Change:
        return lambda step, first: replace(step, tokens=self._tokens(items[0]))

    def site_word(self, items: list[str]) -> Change:
        return lambda step, first: replace(step, site=Site(items[0]))

    def rank(self, items: list[int]) -> Change:
        return lambda step, first: replace(step, rank=items[0])

    def sources(self, items: list[Any]) -> Change:
        return lambda step, first: replace(step, sources=self._tokens(items[0]))

    def outside(self, _: list[Any]) -> None:
        return None

    def via(self, items: list[Any]) -> Change:
        rows = tuple(item for item in items if item is not None)
        edges = Edges(rows, keep=len(rows) == len(items))
        return lambda step, first: replace(step, via=edges)

    def edge(self, items: list[Any]) -> tuple[tuple[int, int], Nodes]:
        writers, reader, *port = items
        number = nodes_of(reader).bit_length() - 1
        return (number, PORTS.index(port[0]) if port else -1), nodes_of(writers)

    # ---- tokens

    def spots(self, items: list[Spot]) -> list[Spot]:
        return items

    def spot(self, items: list[int]) -> Spot:
        return tuple(items)

    def spot_range(self, items: list[int]) -> range:
        return range(items[0], items[1] + 1)

    def place(self, items: list[int]) -> int:
        """The number of a token."""
        return self.layout.token(items[0] if len(items) > 1 else 0, items[-1])

    def _tokens(self, spots: list[Spot]) -> int:
        return bitset(self.place(list(spot)) for spot in spots)

    # ---- values

    def value(self, items: list[Any]) -> Value:
        return Value(tuple(item if isinstance(item, tuple) else (1.0, item) for item in items))

    def scaled(self, items: list[Any]) -> tuple[float, Source]:
        return items[0], items[1]

    def source(self, items: list[Any]) -> Source:
        return items[0] if len(items) == 1 else Moved(items[0], items[1])

    def from_world(self, items: list[str]) -> FromWorld:
        return FromWorld(items[0])

    def mean(self, items: list[Any]) -> Mean:
        world, *more = items
        return Mean(world, True in more, next((g for g in more if isinstance(g, tuple)), None))

    def over(self, _: list[Any]) -> bool:
        return True

    def groups(self, items: list[int]) -> tuple[int, ...]:
        return tuple(items)

    def noise(self, items: list[Any]) -> Noise:
        return Noise(items[1], items[2], relative=items[0])

    def deviation(self, _: list[Any]) -> bool:
        return False

    def relative(self, _: list[Any]) -> bool:
        return True

    def blocked(self, _: list[Any]) -> Blocked:
        return Blocked()

    def itself(self, _: list[Any]) -> Itself:
        return Itself()

    def given(self, items: list[str]) -> Given:
        return Given(items[0])

    def to_spots(self, items: list[Any]) -> tuple[int, ...]:
        tokens = [self.place(list(spot)) for spot in items[0]]
        return tuple(chain.from_iterable([t] * n for t, n in zip(tokens, self.layout.lengths, strict=True)))

    def to_prompts(self, items: list[int]) -> tuple[int, ...]:
        rows = zip(items, self.layout.lengths, strict=True)
        return tuple(self.layout.token(prompt, position) for prompt, n in rows for position in range(n))

    def to_tokens(self, items: list[int]) -> tuple[int, ...]:
        return tuple(items)


def nodes_of(built: Built) -> Nodes:
    """The nodes of what is to be a bare set of nodes."""
    step = built(False)
    if not isinstance(step, Step) or step != Step(step.nodes):
        raise ValueError("nodes are joined with nodes alone")
    return step.nodes


def _ports(names: list[str]) -> int:
    return bitset(PORTS.index(name) for name in names)


def _numbers(spots: list[Spot]) -> list[int]:
    return [n for spot in spots for n in spot]
