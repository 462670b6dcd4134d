"""Resolved studies as text, for people and for golden tests: readable, deterministic, cells as the first few
and a count.

Prints what `ir.experiment` holds and nothing that has to be computed for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from patchc.ir.experiment import (
    Called,
    Cell,
    Constant,
    Continuation,
    Dim,
    Expect,
    Experiment,
    Expression,
    Interval,
    Kl,
    Metric,
    NodeRead,
    Patch,
    Probe,
    Product,
    Prompts,
    Quotient,
    Read,
    Study,
    Sum,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.patch_text import ITEMS, print_path, print_value, shortened
from patchc.ir.paths import Site
from patchc.ir.tokens import Layout

CELLS = 3
"""How many cells of a sweep are printed."""


def print_study(study: Study, graph: ResidualGraph) -> str:
    """The whole study, ended by a line end."""
    lines = [f"model {study.model.name!r}" + "".join(f" {k}={v}" for k, v in study.model.options)]
    lines += _prompts(study.prompts)
    lines += [f"tensor {key} from {source}" for key, source in study.tensors]
    lines += [f"seed {seed} of {what}" for what, seed in study.seeds]
    for experiment in study.experiments:
        lines += ["", *_experiment(experiment, graph, study.prompts)]
    return "\n".join(lines) + "\n"


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
        dims.insert(by.axis, f"{by.name} ({len(by.prompts)}): {shortened(list(map(str, by.prompts)))}, by prompt")
    return dims


def _dim(dim: Dim) -> str:
    coords = [str(c) for c in dim.coords]
    if dim.labels is not None:
        coords = [f"{c}={label!r}" for c, label in zip(coords, dim.labels, strict=True)]
    return f"{dim.name} ({len(coords)}): {shortened(coords)}"


def _cell(cell: Cell, graph: ResidualGraph, layout: Layout) -> Iterator[str]:
    where = f"[{', '.join(map(str, cell.index))}] " if cell.index else ""
    for patch in cell.patches:
        yield f"  {where}patch {_patch(patch, graph, layout)}"


def _patch(patch: Patch, graph: ResidualGraph, layout: Layout) -> str:
    but = "all except " if patch.complement else ""
    return f"{but}{print_path(patch.path, graph, layout)} with {print_value(patch.value, layout)}"


def _expect(expect: Expect) -> str:
    shown = shortened([f"[{', '.join(map(str, i))}]" for i in expect.indices])
    if expect.top:
        return f"{expect.metric} top({expect.top}) includes {shown}"
    within = "" if expect.tolerance is None else f" within {expect.tolerance:g}"
    return f"{expect.metric} at {shown} {expect.op} {expect.bound:g}{within}"


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


# ---- lists


def _more(items: tuple[object, ...], shown: int, indent: str) -> Iterator[str]:
    if len(items) > shown:
        yield f"{indent}and {len(items) - shown} more"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
