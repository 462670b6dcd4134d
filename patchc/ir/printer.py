"""Resolved studies as text, for people and for golden tests: readable, deterministic, cells as the first few
and a count.

Prints what `ir.experiment` holds and nothing that has to be computed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from patchc.ir.bits import bits
from patchc.ir.experiment import (
    Blocked,
    Called,
    Cell,
    Constant,
    Continuation,
    Dim,
    Expect,
    Experiment,
    Expression,
    FromWorld,
    Given,
    Interval,
    Itself,
    Kl,
    Mean,
    Metric,
    Moved,
    NodeRead,
    Noise,
    Patch,
    Probe,
    Product,
    Prompts,
    Quotient,
    Read,
    Source,
    Study,
    Sum,
    Value,
)
from patchc.ir.graph import PORTS, QKV, Kind, Nodes, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout, Tokens

CELLS = 3
"""How many cells of a sweep are printed."""
ITEMS = 12
"""How many coordinates, prompts and edges of one list are printed."""


def print_study(study: Study, graph: ResidualGraph) -> str:
    """The whole study, ended by a line end."""
    lines = [f"model {study.model.name!r}" + "".join(f" {k}={v}" for k, v in study.model.options)]
    lines += _prompts(study.prompts)
    lines += [f"tensor {key} from {source}" for key, source in study.tensors]
    lines += [f"seed {seed} of {what}" for what, seed in study.seeds]
    for experiment in study.experiments:
        lines += ["", *_experiment(experiment, graph, study.prompts)]
    return "\n".join(lines) + "\n"


def print_path(path: Path, graph: ResidualGraph, layout: Layout) -> str:
    """A path as a spec would write it; tokens are `prompt:position`, the prompt left off where there is
    one."""
    return _Paths(graph, layout).path(path, True)


# ---- data


def _prompts(prompts: Prompts) -> Iterator[str]:
    yield f"prompts {prompts.n}, of {_ranges(prompts.own_lengths)} tokens"
    if prompts.own:
        yield f"  copies {prompts.copies}, of {_ranges(prompts.layout.lengths)} tokens with what follows"
    for world in prompts.worlds:
        own = world.layout and f", of {world.layout.n_prompts} prompts of {_ranges(world.layout.lengths)} tokens"
        yield f"  world {world.name}{own or ''}"
    for i, text in enumerate(prompts.texts[:ITEMS]):
        yield f"  {i}: {'|'.join(text)}"
    yield from _more(prompts.texts, ITEMS, "  ")


def _ranges(lengths: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(lengths))))


# ---- experiments


def _experiment(experiment: Experiment, graph: ResidualGraph, prompts: Prompts) -> Iterator[str]:
    title = f' "{experiment.title}"' if experiment.title else ""
    cells = _count(len(experiment.cells), "cell")
    yield f"experiment {experiment.name}{title}: run {experiment.run}, {cells}"
    yield from (f"  dim {dim}" for dim in _dims(experiment))
    for metric in experiment.metrics:
        yield f"  measure {_metric(metric, prompts, graph)}"
    for cell in experiment.cells[:CELLS]:
        yield from _cell(cell, graph, prompts.layout)
    yield from _more(experiment.cells, CELLS, "  ")
    for expect in experiment.expects:
        yield f"  expect {_expect(expect)}"
    for show in experiment.shows:
        yield f"  show {show.kind}" + (f" {show.path!r}" if show.path else "")
    for save in experiment.saves:
        yield f"  save {save.path!r}"


def _dims(experiment: Experiment) -> list[str]:
    dims = [_dim(dim) for dim in experiment.dims]
    if (by := experiment.by_prompt) is not None:
        dims.insert(by.axis, f"{by.name} ({len(by.prompts)}): {_shortened(list(map(str, by.prompts)))}, by prompt")
    return dims


def _dim(dim: Dim) -> str:
    coords = [str(c) for c in dim.coords]
    if dim.labels is not None:
        coords = [f"{c}={label!r}" for c, label in zip(coords, dim.labels, strict=True)]
    return f"{dim.name} ({len(coords)}): {_shortened(coords)}"


def _cell(cell: Cell, graph: ResidualGraph, layout: Layout) -> Iterator[str]:
    where = f"[{', '.join(map(str, cell.index))}] " if cell.index else ""
    for patch in cell.patches:
        yield f"  {where}patch {_patch(patch, graph, layout)}"


def _patch(patch: Patch, graph: ResidualGraph, layout: Layout) -> str:
    but = "all except " if patch.complement else ""
    return f"{but}{print_path(patch.path, graph, layout)} with {_value(patch.value, layout)}"


def _expect(expect: Expect) -> str:
    shown = _shortened([f"[{', '.join(map(str, i))}]" for i in expect.indices])
    if expect.top:
        return f"{expect.metric} top({expect.top}) includes {shown}"
    within = "" if expect.tolerance is None else f" within {expect.tolerance:g}"
    return f"{expect.metric} at {shown} {expect.op} {expect.bound:g}{within}"


# ---- values


def _value(value: Value, layout: Layout) -> str:
    if not value.terms:
        return "zero"
    shown = [(c, _source(s, layout)) for c, s in value.terms]
    return " + ".join(text if c == 1 else f"{c:g} * {text}" for c, text in shown)


def _source(source: Source, layout: Layout) -> str:
    match source:
        case FromWorld(world):
            return world
        case Mean(world, over_positions, groups):
            by = "" if groups is None else f", by groups {_shortened([str(g) for g in groups])}"
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
        return f"of prompts {_shortened([str(row[0][0]) for row in places])}"
    return f"of tokens {_shortened([f'{i}:{p}' for row in places for i, p in row])}"


def _spots(places: Iterable[tuple[int, int]], layout: Layout) -> str:
    """`{0, 3}`, or `{0:3, 1:4}` (prompt:position) where there are several prompts."""
    alone = layout.n_prompts == 1
    return "{" + _shortened([str(p) if alone else f"{i}:{p}" for i, p in places]) + "}"


# ---- metrics


def _metric(metric: Metric, prompts: Prompts, graph: ResidualGraph) -> str:
    text = f"{metric.name} = {_Expressions(prompts, graph).written(metric.expression)}"
    if metric.zero is not None:
        text += f" from {metric.zero} to {metric.one}" + (" per prompt" if metric.per_prompt else "")
    return text + (_interval(metric.interval) if metric.interval else "")


def _interval(interval: Interval) -> str:
    return f" with interval {interval.level:g} seed={interval.seed} resamples={interval.resamples}"


class _Expressions:
    """Expressions in the words of a spec; answers are token ids."""

    def __init__(self, prompts: Prompts, graph: ResidualGraph):
        self._prompts = prompts
        self._graph = graph

    def written(self, expression: Expression) -> str:
        match expression:
            case Read(measure, answers, tokens):
                return f"{measure}({_each('|', answers)}) @ {self._places(tokens)}"
            case Continuation():
                return self._continuation(expression)
            case Kl(world, tokens):
                return f"kl({world}) @ {self._places(tokens)}"
            case NodeRead():
                return self._node_read(expression)
            case Called(name):
                return f"{name}()"
            case Constant(number):
                return f"{number:g}"
            case Sum(terms):
                return _sum([(c, self.written(e)) for c, e in terms])
            case Product(factors):
                return "(" + " * ".join(map(self.written, factors)) + ")"
            case Quotient(over, under):
                return f"({self.written(over)} / {self.written(under)})"

    def _continuation(self, read: Continuation) -> str:
        copy = self._prompts.layout.place(read.tokens[0][0])[0] // self._prompts.n
        where = f" of copy {copy}" if self._prompts.copies > 1 else ""
        spans = dict.fromkeys(self._span(tokens) for tokens in read.tokens)
        return f"logprob({_each(' ', read.answers)}) @ {', '.join(spans)}{where}"

    def _span(self, tokens: tuple[int, ...]) -> str:
        first, last = (self._prompts.layout.place(t)[1] for t in (tokens[0], tokens[-1]))
        return str(first) if first == last else f"{first}..{last}"

    def _node_read(self, read: NodeRead) -> str:
        probe = self._probe(read.probe)
        if read.sources:
            both = zip(read.tokens, read.sources, strict=True)
            return f"{probe}[{_or([f'{self._places([t])}, {self._places([s])}' for t, s in both])}]"
        neuron = "" if read.neuron < 0 else f"[{read.neuron}]"
        at = f"{probe}{neuron} @ {self._places(read.tokens)}"
        return at if read.key is None else f"dot({at}, tensor({read.key!r}))"

    def _probe(self, probe: Probe) -> str:
        if probe.site is Site.STREAM:
            return self._graph.stream_name(probe.rank)
        node = self._graph.members(probe.nodes)[0]
        if probe.site is Site.ATTN_OUT:
            return f"attn_out[{node.layer}]"
        return node.name if probe.site is Site.OUT else f"{node.name}.{probe.site}"

    def _places(self, tokens: Iterable[int]) -> str:
        """The position in each prompt, told once where it is one."""
        return ", ".join(dict.fromkeys(str(self._prompts.layout.place(t)[1]) for t in tokens))


def _each(separator: str, answers: Iterable[tuple[int, ...]]) -> str:
    return ", ".join(dict.fromkeys(separator.join(map(str, ids)) for ids in answers))


def _or(texts: list[str]) -> str:
    return " or ".join(dict.fromkeys(texts))


def _sum(terms: list[tuple[float, str]]) -> str:
    """`(a - 2 * b)`."""
    text = "".join(f" {'-' if c < 0 else '+'} " + (e if abs(c) == 1 else f"{abs(c):g} * {e}") for c, e in terms)
    return "(" + (text[3:] if text.startswith(" + ") else f"-{text[3:]}") + ")"


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
        return ("" if edges.keep else "not ") + "{" + _shortened(shown) + "}"

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
    return shown[0] if len(shown) == 1 else "{" + _shortened(shown) + "}"


def _shortened(items: list[str]) -> str:
    rest = len(items) - ITEMS
    return ", ".join(items[:ITEMS]) + (f", and {rest} more" if rest > 0 else "")


def _more(items: tuple[object, ...], shown: int, indent: str) -> Iterator[str]:
    if len(items) > shown:
        yield f"{indent}and {len(items) - shown} more"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
