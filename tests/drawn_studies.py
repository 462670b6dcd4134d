"""Random studies over a graph: everything that a resolved study can hold, whether or not a spec could say it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

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
    Measure,
    Metric,
    ModelChoice,
    Moved,
    NodeRead,
    Noise,
    Patch,
    Probe,
    Product,
    PromptDim,
    Prompts,
    Quotient,
    Read,
    Save,
    Show,
    Source,
    Study,
    Sum,
    TensorFrom,
    Value,
    World,
)
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from tests.drawn import Draw

NAMES = (
    "clean",
    "x_1",
    "zero",
    "with",
    "a b",
    "d.jsonl:q",
    "it's",
    'a"b',
    "\n",
    "é → \ud800",
    "\\",
    "",
    "inf",
    "head[0, 1]",
)
NUMBERS = (1.0, -1.0, 0.0, 0.1, -2.5, 1e-300, 1e22, 3, float("inf"), 0.1 + 0.2)


class DrawStudy:
    """Draws the parts of a study; `layout` is that of its prompts."""

    def __init__(self, rng: Random, graph: ResidualGraph):
        self.rng = rng
        self.graph = graph
        n, self.copies = rng.randint(1, 3), rng.choice([1, 1, 2])
        self.layout = Layout(tuple(rng.randint(1, 4) for _ in range(n * self.copies)))
        self.draw = Draw(rng, graph, self.layout, inside=True)

    def study(self) -> Study:
        options = self.some(2, lambda: (self.name(), self.rng.choice([True, False, 7, self.name()])))
        experiments = self.some(2, self.experiment)
        tensors = self.some(2, lambda: TensorFrom(self.name(), self.name(), self.rng.choice([None, self.name()])))
        seeds = self.some(2, lambda: (self.name(), self.rng.randrange(2**32)))
        return Study(ModelChoice(self.name(), options), self.prompts(), experiments, tensors, seeds)

    # ---- words

    def some(self, most: int, make: Callable[[], Any], least: int = 0) -> tuple[Any, ...]:
        return tuple(make() for _ in range(self.rng.randint(least, most)))

    def maybe(self, make: Callable[[], Any]) -> Any:
        return make() if self.rng.random() < 0.5 else None

    def name(self) -> str:
        return self.rng.choice(NAMES)

    def number(self) -> float:
        return self.rng.choice(NUMBERS)

    def token(self) -> int:
        return self.rng.randrange(self.layout.n_tokens)

    def ids(self) -> tuple[int, ...]:
        return self.some(3, lambda: self.rng.randrange(50257))

    # ---- data

    def prompts(self) -> Prompts:
        lengths = self.layout.lengths
        texts = self.some(3, lambda: self.some(3, self.name))
        own = tuple(self.rng.randint(1, n) for n in lengths) if self.rng.random() < 0.4 else ()
        return Prompts(self.layout, self.some(3, self.world), texts, self.copies, own)

    def world(self) -> World:
        layout = Layout(self.some(3, lambda: self.rng.randint(1, 4), least=1))
        return World(self.name(), self.some(3, self.ids), self.rng.choice([None, layout]))

    # ---- values and paths

    def patch(self) -> Patch:
        return Patch(self.path(), Value(self.some(3, lambda: (self.number(), self.source()))), self.rng.random() < 0.3)

    def path(self) -> Path:
        if self.rng.random() < 0.6:
            return self.draw.patch(alone=True).path
        return self.any_path(3)

    def any_path(self, depth: int) -> Path:
        """A path in which anything stands anywhere."""
        kind = self.rng.randrange(5) if depth else 0
        if kind == 1:
            return Seq(self.some(3, lambda: self.any_path(depth - 1)))
        if kind == 2:
            return Alt(self.some(3, lambda: self.any_path(depth - 1)))
        return Star(self.any_path(depth - 1)) if kind == 3 else self.any_step()

    def any_step(self) -> Step:
        rng, draw = self.rng, self.draw
        return Step(
            rng.choice([draw.nodes(), 0, self.graph.logits_set, self.graph.logits_set | draw.nodes()]),
            rng.choice([7, rng.randrange(8)]),
            rng.choice([draw.tokens(0.5), 0]),
            rng.choice([draw.via(), Edges((), rng.random() < 0.5)]),
            rng.choice([Site.OUT, *Site]),
            rng.choice([-1, rng.randint(0, self.graph.top + 1)]),
            rng.choice([draw.tokens(0.5), 0]),
            rng.choice([-1, rng.getrandbits(self.graph.d_mlp)]),
        )

    def source(self) -> Source:
        rng = self.rng
        groups = rng.choice([None, tuple(rng.randrange(3) for _ in self.layout.lengths)])
        origin = rng.choice([FromWorld(self.name()), Mean(self.name(), rng.random() < 0.5, groups)])
        noise = Noise(self.number(), rng.randrange(9), rng.random() < 0.5)
        return rng.choice([origin, Moved(origin, self.moved()), noise, Blocked(), Itself(), Given(self.name())])

    def moved(self) -> tuple[int, ...]:
        """One token of each prompt, another prompt at the same positions, or anything."""
        kind, lengths = self.rng.randrange(3), self.layout.lengths
        if kind == 0:
            return tuple(t for n in lengths for t in [self.token()] * n)
        longest = max(range(len(lengths)), key=lengths.__getitem__)
        if kind == 1:
            return tuple(self.layout.token(longest, p) for n in lengths for p in range(n))
        return tuple(self.token() for _ in range(self.layout.n_tokens))

    # ---- metrics

    def metric(self) -> Metric:
        zero, one, per_prompt = self.rng.choice(
            [(None, None, False), (self.name(), self.name(), self.rng.random() < 0.5)]
        )
        interval = self.maybe(lambda: Interval(self.number(), self.rng.randrange(9), self.rng.randrange(1, 9999)))
        return Metric(
            self.name(), self.expression(3), zero, one, per_prompt, interval=interval, unit=self.maybe(self.name)
        )

    def expression(self, depth: int) -> Expression:
        kind = self.rng.randrange(8 if depth else 5)
        match kind:
            case 0:
                return Read(self.rng.choice([*Measure]), self.some(3, self.ids), self.tokens())
            case 1:
                return Continuation(self.some(3, self.ids), self.some(3, self.span, least=1))
            case 2:
                return self.rng.choice(
                    [Kl(self.name(), self.tokens()), Called(self.name(), *self.maybe(self.reads) or ())]
                )
            case 3:
                return self.node_read()
            case 4:
                return Constant(self.number())
            case 5:
                return Sum(self.some(3, lambda: (self.number(), self.expression(depth - 1))))
            case 6:
                return Product(self.some(3, lambda: self.expression(depth - 1)))
            case _:
                return Quotient(self.expression(depth - 1), self.expression(depth - 1))

    def reads(self) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
        return self.tokens(), self.maybe(lambda: self.some(3, lambda: self.rng.randrange(50257), least=1))

    def tokens(self) -> tuple[int, ...]:
        return self.some(3, self.token, least=1)

    def span(self) -> tuple[int, ...]:
        prompt = self.rng.randrange(self.layout.n_prompts)
        whole = tuple(self.layout.numbers(self.layout.prompt(prompt)))
        return self.rng.choice([whole, self.some(3, self.token)])

    def node_read(self) -> NodeRead:
        probe = Probe(self.draw.nodes(), self.rng.choice([*Site]), self.rng.choice([-1, self.rng.randint(0, 4)]))
        tokens, key = self.tokens(), self.maybe(self.name)
        if self.rng.random() < 0.4:
            return NodeRead(probe, tokens, tuple(self.token() for _ in tokens))
        return NodeRead(probe, tokens, neuron=self.rng.choice([-1, 0, 5]), key=key)

    # ---- experiments

    def experiment(self) -> Experiment:
        rng = self.rng
        dims = self.some(3, self.dim)
        cells = tuple(Cell((i, *self.ids()), self.some(2, self.patch)) for i in range(rng.randrange(4)))
        by = PromptDim(rng.randint(0, len(dims)), self.name(), self.some(3, lambda: rng.randrange(9), least=1))
        return Experiment(
            self.name(),
            self.maybe(self.name),
            self.name(),
            dims,
            rng.choice([cells, (Cell((), self.some(2, self.patch)),)]),
            self.some(3, self.metric),
            self.some(3, self.expect),
            self.some(2, lambda: Save(self.name())),
            self.some(2, lambda: Show(self.name(), self.maybe(self.name))),
            by_prompt=rng.choice([None, by]),
        )

    def dim(self) -> Dim:
        coords = self.some(4, lambda: self.rng.choice([self.name(), self.number(), self.rng.randint(-5, 5)]), least=1)
        return Dim(self.name(), coords, self.rng.choice([None, tuple(self.name() for _ in coords)]))

    def expect(self) -> Expect:
        indices = self.some(3, self.ids, least=1)
        if self.rng.random() < 0.3:
            return Expect(self.name(), indices, "includes", 0.0, top=self.rng.randint(1, 9))
        op = self.rng.choice(["<", "<=", ">", ">=", "=="])
        return Expect(self.name(), indices, op, self.number(), tolerance=self.maybe(self.number))
