"""Values, the expressions of metrics and the places that these read, as text in the words of a spec; answers are
token ids.

Paths are for `path_text`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from patchc.ir.experiment import (
    Blocked,
    Called,
    Constant,
    Continuation,
    Expression,
    FromWorld,
    Given,
    Itself,
    Kl,
    Mean,
    Moved,
    NodeRead,
    Noise,
    Probe,
    Product,
    Prompts,
    Quotient,
    Read,
    Source,
    Sum,
    Value,
)
from patchc.ir.path_text import PathText
from patchc.ir.paths import Site, Step
from patchc.ir.wording import Wording


@dataclass(frozen=True, slots=True)
class ValueText:
    """Writes values."""

    wording: Wording

    def value(self, value: Value) -> str:
        shown = [(c, self._source(s)) for c, s in value.terms]
        return " + ".join(t if c == 1 else f"{self.wording.number(c)} * {t}" for c, t in shown) or "zero"

    def _source(self, source: Source) -> str:
        w = self.wording
        match source:
            case FromWorld(world):
                return w.name(world)
            case Mean(world, over_positions, groups):
                by = "" if groups is None else f", by groups {w.listed([str(g) for g in groups])}"
                return f"mean({w.name(world)}{', over=positions' if over_positions else ''}{by})"
            case Moved(inner, tokens):
                return f"{self._source(inner)} {self._moved(tokens)}"
            case Noise(std, seed, relative):
                return f"noise({'sigma' if relative else 'std'}={w.number(std)}, seed={seed})"
            case Blocked():
                return "blocked"
            case Itself():
                return "self"
            case Given(key):
                return f"tensor({key!r})"

    def _moved(self, tokens: tuple[int, ...]) -> str:
        """`@ {9}`: of one token of each prompt; `of prompts 2, 0, 1`: at the same position of another prompt."""
        layout = self.wording.layout
        rows = [tokens[start : start + n] for start, n in zip(layout.offsets, layout.lengths, strict=False)]
        complete = len(tokens) == layout.n_tokens and all(layout.lengths)
        if complete and all(len(set(row)) == 1 for row in rows):
            return f"@ {self.wording.spots(row[0] for row in rows)}"
        places = [[layout.place(t) for t in row] for row in rows]
        if complete and all(p == i and t == row[0][0] for row in places for i, (t, p) in enumerate(row)):
            return f"of prompts {self.wording.listed([str(row[0][0]) for row in places])}"
        return f"of tokens {self.wording.listed([f'{i}:{p}' for i, p in map(layout.place, tokens)])}"


@dataclass(frozen=True, slots=True)
class MetricText:
    """Writes expressions."""

    wording: Wording
    paths: PathText
    prompts: Prompts

    def expression(self, expression: Expression) -> str:
        w = self.wording
        match expression:
            case Read(measure, answers, tokens):
                return f"{measure}({self._each('|', answers)}) @ {w.read_at(tokens)}"
            case Continuation():
                return self._continuation(expression)
            case Kl(world, tokens):
                return f"kl({w.name(world)}) @ {w.read_at(tokens)}"
            case NodeRead():
                return self._node_read(expression)
            case Called(name, tokens, columns):
                read = "every" if columns is None else ", ".join(map(str, columns))
                return f"{w.name(name)}()" + (f" reads {read} @ {w.spots(tokens)}" if w.whole and tokens else "")
            case Constant(number):
                return w.number(number)
            case Sum(terms):
                return self._sum([(c, self.expression(e)) for c, e in terms])
            case Product(factors):
                return "(" + " * ".join(map(self.expression, factors)) + ")"
            case Quotient(over, under):
                return f"({self.expression(over)} / {self.expression(under)})"

    def _each(self, separator: str, answers: Iterable[tuple[int, ...]]) -> str:
        """Each prompt's answers."""
        return ", ".join(self.wording.distinct(separator.join(map(str, ids)) or "none" for ids in answers))

    def _continuation(self, read: Continuation) -> str:
        spans = ", ".join(self.wording.distinct(self._span(tokens) for tokens in read.tokens))
        answers = self._each(" ", read.answers)
        if self.wording.whole:
            return f"logprob({answers}) in turn @ {spans}"
        copy = self.wording.layout.place(read.tokens[0][0])[0] // self.prompts.n
        where = f" of copy {copy}" if self.prompts.copies > 1 else ""
        return f"logprob({answers}) @ {spans}{where}"

    def _span(self, tokens: tuple[int, ...]) -> str:
        """Tokens that follow one another: `1..3`, in the whole form `0:1..3`; any others in braces."""
        w = self.wording
        if not w.whole:
            first, last = (w.layout.place(t)[1] for t in (tokens[0], tokens[-1]))
            return str(first) if first == last else f"{first}..{last}"
        prompts = {w.layout.place(t)[0] for t in tokens}
        if len(tokens) > 1 and len(prompts) == 1 and tokens == tuple(range(tokens[0], tokens[-1] + 1)):
            return f"{w.place(tokens[0])}..{w.layout.place(tokens[-1])[1]}"
        return w.place(tokens[0]) if len(tokens) == 1 else w.spots(tokens)

    def _node_read(self, read: NodeRead) -> str:
        probe = self._probe(read.probe, indexed=bool(read.sources) or read.neuron >= 0)
        if read.sources:
            both = zip(read.tokens, read.sources, strict=True)
            pairs = (f"{self.wording.read_at([t])}, {self.wording.read_at([s])}" for t, s in both)
            return f"{probe}[{' or '.join(self.wording.distinct(pairs))}]"
        neuron = "" if read.neuron < 0 else f"[{read.neuron}]"
        at = f"{probe}{neuron} @ {self.wording.read_at(read.tokens)}"
        return at if read.key is None else f"dot({at}, tensor({read.key!r}))"

    def _probe(self, probe: Probe, indexed: bool) -> str:
        """As where a path starts; in the whole form an index, and a rank, stand behind a site."""
        step = Step(probe.nodes, site=probe.site, rank=probe.rank)
        ranked = probe.site is Site.OUT and probe.rank != -1
        if self.wording.whole and (indexed or ranked):
            return self.paths.spelt(step)
        return self.paths.grouped(step, self.paths.step(step, first=True))

    def _sum(self, terms: list[tuple[float, str]]) -> str:
        """`(a - 2 * b)`; in the whole form every term has its sign and its factor: `(+ 1.0 * a - 2.0 * b)`."""
        if self.wording.whole:
            return "(" + (" ".join(f"{'-' if c < 0 else '+'} {abs(c)!r} * {e}" for c, e in terms) or "+") + ")"
        text = "".join(f" {'-' if c < 0 else '+'} " + (e if abs(c) == 1 else f"{abs(c):g} * {e}") for c, e in terms)
        return "(" + (text[3:] if text.startswith(" + ") else f"-{text[3:]}") + ")"
