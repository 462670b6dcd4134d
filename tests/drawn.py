"""What the property tests draw: small residual networks, data of several lengths, path languages, values."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from patchc.ir.experiment import Cell, FromWorld, Itself, Patch, Probe, Prompts, Value, World
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Edges, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Layout, Tokens
from tests.toy import VOCAB, Toy, graph_of

VALUES = (
    Value(((1.0, FromWorld("corrupt")),)),
    Value(()),
    Value(((0.3, FromWorld("corrupt")), (0.7, FromWorld("other")))),
    Value(((0.4, FromWorld("other")), (0.6, Itself()))),
    Value(((1.0, FromWorld("clean")),)),
)


@dataclass(frozen=True)
class Case:
    """A network, its data and a cell. The run is `clean`."""

    toy: Toy
    prompts: Prompts
    cell: Cell

    @property
    def graph(self) -> ResidualGraph:
        return self.toy.graph


def case(rng: Random, most_nodes: int = 8, inside: bool = False) -> Case:
    """A random case; `most_nodes` counts writers and the logits. `inside`: starts inside nodes too."""
    graph = network(rng)
    while len(graph.nodes) > most_nodes:
        graph = network(rng)
    layout = Layout(tuple(rng.choice([1, 2, 3]) for _ in range(rng.choice([1, 2]))))
    prompts = data(rng, layout)
    return Case(Toy(graph, rng.randrange(1000)), prompts, Draw(rng, graph, layout, inside=inside).cell())


def network(rng: Random) -> ResidualGraph:
    """One to three blocks, in sequence or in parallel."""
    shape: list[tuple[str, int]] = []
    for _ in range(rng.randint(1, 3)):
        parallel = bool(shape) and rng.random() < 0.2
        rank = shape[-1][1] + (not parallel) if shape else 1
        shape.append((rng.choice(["attention", "mlp"]), rank))
    return graph_of(
        shape, rng.choice([1, 2]), rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.7, rng.random() < 0.4
    )


def data(rng: Random, layout: Layout) -> Prompts:
    """Three worlds; about half the tokens of clean and corrupt are the same."""

    def ids() -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(rng.randrange(VOCAB) for _ in range(n)) for n in layout.lengths)

    clean, other = ids(), ids()
    corrupt = tuple(tuple(t if rng.random() < 0.5 else rng.randrange(VOCAB) for t in row) for row in clean)
    return Prompts(layout, (World("clean", clean), World("corrupt", corrupt), World("other", other)))


@dataclass
class Draw:
    """Draws patches over a graph."""

    rng: Random
    graph: ResidualGraph
    layout: Layout
    values: tuple[Value, ...] = VALUES
    complement: bool = False
    probe: Probe | None = None
    """Where a metric reads, beside the logits."""
    inside: bool = False

    def cell(self) -> Cell:
        n = self.rng.choice([1, 1, 2])
        return Cell((), tuple(self.patch(alone=n == 1) for _ in range(n)))

    def patch(self, alone: bool) -> Patch:
        # Beside another patch, which of the two values enters nearer the logits is a matter of where a complement's
        # value is said to enter; alone, with a whole world as value, it makes no difference.
        self.complement = alone and self.rng.random() < 0.35
        value = self.values[0] if self.complement else self.rng.choice(self.values)
        tail = (Star(Step(self.graph.all)),) if self.rng.random() < 0.5 else ()
        end = Step(self.graph.logits_set, tokens=self.tokens(0.7))
        if self.probe is None:
            return Patch(Seq((self.path(2, True), *tail, end)), value, self.complement)
        path: Path = Seq((self.path(2, True), *tail, Alt((end, self.read_at(self.probe)))))
        if self.rng.random() < 0.5 and not (self.complement and self.probe.site in (Site.STREAM, Site.ATTN_OUT)):
            path = Alt((path, self.read_start(self.probe)))
        return Patch(path, value, self.complement)

    def read_at(self, probe: Probe) -> Step:
        """The end of paths to a probe."""
        if probe.site is Site.STREAM:
            return Step(self.graph.below(probe.rank), tokens=self.tokens(0.6), site=probe.site, rank=probe.rank)
        return Step(probe.nodes, ports=self.rng.choice([7, 7, 1, 2, 4, 5]), tokens=self.tokens(0.6))

    def read_start(self, probe: Probe) -> Step:
        """A start that is itself read there."""
        if probe.site is Site.STREAM:
            return self.read_at(probe)
        site = Site.OUT if probe.site is Site.ATTN_OUT and self.rng.random() < 0.5 else probe.site
        sources = self.tokens(0.4) if site in (Site.SCORES, Site.PATTERN) and not self.complement else EVERYWHERE
        neurons = self.rng.randrange(1, 1 << self.graph.d_mlp) if site is Site.POST and not self.complement else -1
        tokens = EVERYWHERE if self.complement and sources == EVERYWHERE else self.tokens(0.6)
        return Step(probe.nodes, tokens=tokens, site=site, sources=sources, neurons=neurons)

    def any_probe(self) -> Probe:
        """A place to read."""
        kind, attention = self.rng.random(), [b for b in self.graph.blocks if b.kind == "attention"]
        if kind < 0.2:
            rank = self.rng.randrange(1, self.graph.top + 1)
            return Probe(self.graph.below(rank), Site.STREAM, rank)
        if kind < 0.35 and attention:
            return Probe(self.rng.choice(attention).nodes, Site.ATTN_OUT)
        if kind < 0.75 and attention:
            head = self.rng.choice(self.graph.members(self.graph.heads))
            inside = [Site.SCORES, Site.PATTERN] * 2 if self.inside else []
            return Probe(1 << head.id, self.rng.choice([Site.Q, Site.K, Site.V, Site.Z, *inside]))
        if kind < 0.85 and self.inside and self.graph.mlps:
            mlp = self.rng.choice(self.graph.members(self.graph.mlps))
            return Probe(1 << mlp.id, self.rng.choice([Site.IN, Site.POST]))
        writers = [n for n in self.graph.nodes[:-1] if n.kind != "attn_bias"]
        return Probe(1 << self.rng.choice(writers).id)

    def path(self, depth: int, first: bool) -> Path:
        kind = self.rng.random()
        if depth == 0 or kind < 0.3:
            return self.start() if first else self.step()
        if kind < 0.7:
            return Seq(tuple(self.path(depth - 1, first and i == 0) for i in range(self.rng.randint(2, 3))))
        if kind < 0.85 or first:
            return Alt(tuple(self.path(depth - 1, first) for _ in range(2)))
        return Star(self.path(depth - 1, False))

    def step(self) -> Step:
        ports = self.rng.choice([7, 7, 1, 2, 4, 3, 6])
        return Step(self.nodes(), ports=ports, tokens=self.tokens(0.6), via=self.via())

    def start(self) -> Step:
        kind, tokens = self.rng.random(), self.tokens(0.6)
        if self.inside and self.rng.random() < 0.6:
            return self.inner_start(tokens)
        attention = [b for b in self.graph.blocks if b.kind == "attention"]
        if kind < 0.15 and not self.complement:
            rank = self.rng.randrange(1, self.graph.top + 1)
            return Step(self.graph.below(rank), tokens=tokens, site=Site.STREAM, rank=rank)
        if kind < 0.3 and attention and not self.complement:
            return Step(self.rng.choice(attention).nodes, tokens=tokens, site=Site.ATTN_OUT)
        if kind < 0.5 and attention:
            heads = self.nodes() & self.graph.heads or self.graph.heads
            return Step(heads, tokens=tokens, site=self.rng.choice([Site.Q, Site.K, Site.V]), via=self.via())
        return Step(self.nodes(), tokens=tokens, via=self.via())

    def inner_start(self, tokens: Tokens) -> Step:
        """A start inside heads or MLPs; of a complement a whole one."""
        sites = [Site.SCORES, Site.PATTERN] + [Site.IN, Site.POST] * bool(self.graph.mlps)
        site = self.rng.choice(sites)
        if site in (Site.IN, Site.POST):
            some = -1 if self.rng.random() < 0.3 or self.complement else self.rng.randrange(1, 1 << self.graph.d_mlp)
            of_mlps = self.nodes() & self.graph.mlps or self.graph.mlps
            return Step(of_mlps, tokens=tokens, site=site, neurons=some if site is Site.POST else -1, via=self.via())
        sources = self.tokens(0.4)
        if self.complement:
            tokens = sources = EVERYWHERE
        heads = self.nodes() & self.graph.heads or self.graph.heads
        return Step(heads, tokens=tokens, site=site, sources=sources, via=self.via())

    def nodes(self) -> int:
        if self.rng.random() < 0.3:
            return self.graph.all
        n = len(self.graph.nodes) - 1
        return self.rng.getrandbits(n) | 1 << self.rng.randrange(n)

    def tokens(self, everywhere: float) -> Tokens:
        if self.rng.random() < everywhere:
            return EVERYWHERE
        n = self.layout.n_tokens
        return self.rng.getrandbits(n) | 1 << self.rng.randrange(n)

    def via(self) -> Edges | None:
        if self.rng.random() < 0.8:
            return None
        readers = ((r.node.id, -1 if r.port is None else r.port) for r in self.graph.readers)
        n = len(self.graph.nodes) - 1
        return Edges(tuple((r, self.rng.getrandbits(n)) for r in readers), self.rng.random() < 0.5)
