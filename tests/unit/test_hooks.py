"""The hooks backend against patches written by hand, against brute force, and against itself on another driver."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from patchc.diagnostics import PatchcError
from patchc.execute.hooks import Oracle
from patchc.ir.experiment import (
    Called,
    Cell,
    Constant,
    Experiment,
    FromWorld,
    Given,
    Itself,
    Kl,
    Mean,
    Measure,
    Metric,
    Patch,
    Product,
    Prompts,
    Quotient,
    Read,
    Sum,
    Value,
)
from patchc.ir.graph import BlockKind, Kind, ResidualGraph
from patchc.ir.paths import Alt, Edges, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from tests.unit.oracle_models import D_HEAD, MODELS, NodeFunctions, gpt2, llama, native, prompts
from tests.unit.oracle_unrolling import Disagree, Plain, Unrolled

ROOT = Path(__file__).parents[2]
CORRUPT = Value(((1.0, FromWorld("corrupt")),))
DRIVERS = [
    ("gpt2", "transformer_lens"),
    ("gpt2", "forward_hooks"),
    ("llama", "transformer_lens"),
    ("llama", "forward_hooks"),
    ("native", "transformer_lens"),
]


def experiment(*metrics: Metric) -> Experiment:
    return Experiment("e", None, "clean", (), (), metrics)


def cell(*patches: Patch) -> Cell:
    return Cell((), patches)


def head(graph: ResidualGraph, layer: int, number: int) -> int:
    node = graph.node(Kind.HEAD, layer, number)
    assert node is not None
    return 1 << node.id


def to_logits(graph: ResidualGraph, *steps: Step) -> Seq:
    """`steps -> any* -> logits`."""
    return Seq((*steps, Star(Step(graph.all)), Step(graph.logits_set)))


def largest_difference(got: list[Tensor], want: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


class Fixture:
    """A model, an oracle on it, and its plain runs."""

    def __init__(
        self,
        kind: str,
        driver: str = "auto",
        *,
        n_heads: int = 4,
        data: Prompts | None = None,
        double: bool = False,
        **given: Any,
    ):
        self.model, self.graph = MODELS[kind](n_heads)
        if double:
            self.model = self.model.double()
        self.data = data or prompts(5, 7, 5)
        self.oracle = Oracle(self.model, self.graph, self.data, driver=driver, **given)
        self.functions = NodeFunctions(self.model, self.graph, self.data.layout)

    def logits(self, *patches: Patch) -> list[Tensor]:
        return self.oracle.logits(experiment(), cell(*patches))

    @torch.no_grad()
    def plain(self, world: str) -> list[Tensor]:
        outs = (self.model(torch.tensor([ids])) for ids in self.data.world(world).ids)
        return [(out if isinstance(out, Tensor) else out.logits)[0] for out in outs]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=DRIVERS, ids="-".join)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    return Fixture(*request.param)


# ---- against whole runs


def test_no_patch_gives_the_base_run(fixture: Fixture) -> None:
    assert largest_difference(fixture.logits(), fixture.plain("clean")) < 2e-6


def test_a_path_that_no_start_can_take_gives_the_base_run(fixture: Fixture) -> None:
    graph = fixture.graph
    backwards = Seq((Step(head(graph, 1, 0)), Step(head(graph, 0, 0)), Step(graph.logits_set)))
    assert largest_difference(fixture.logits(Patch(backwards, CORRUPT)), fixture.logits()) == 0.0


@pytest.mark.parametrize("spelling", ["input", "complement", "stream", "final stream"])
def test_every_path_patched_gives_the_other_run(fixture: Fixture, spelling: str) -> None:
    graph = fixture.graph
    patch = {
        "input": Patch(to_logits(graph, Step(graph.input)), CORRUPT),
        "complement": Patch(Seq((Step(0), Step(graph.logits_set))), CORRUPT, complement=True),
        "stream": Patch(to_logits(graph, Step(graph.below(2), site=Site.STREAM, rank=2)), CORRUPT),
        "final stream": Patch(to_logits(graph, Step(graph.all, site=Site.STREAM, rank=graph.top)), CORRUPT),
    }[spelling]
    assert largest_difference(fixture.logits(patch), fixture.plain("corrupt")) < 5e-6
    assert largest_difference(fixture.logits(), fixture.plain("corrupt")) > 0.1


# ---- against hooks written by hand


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook) if before else module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def kept(model: nn.Module, ids: Tensor, module: nn.Module, before: bool = False) -> Tensor:
    """What a module takes (or gives) in a run."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: Any, *out: Any) -> None:
        seen.append((args[0] if before else out[0]).clone())

    with torch.no_grad(), hooked(module, hook, before):
        model(ids)
    return seen[0]


@torch.no_grad()
def test_a_node_patch_is_a_forward_hook() -> None:
    f = Fixture("gpt2", data=prompts(6))
    clean, corrupt = (torch.tensor(f.data.world(w).ids) for w in ("clean", "corrupt"))
    model: Any = f.model
    projection = model.transformer.h[0].attn.c_proj
    donor = kept(model, corrupt, projection, before=True)

    def replace(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].clone()
        z[:, 2:4, D_HEAD : 2 * D_HEAD] = donor[:, 2:4, D_HEAD : 2 * D_HEAD]
        return (z,)

    with hooked(projection, replace, before=True):
        want = model(clean).logits[0]
    step = Step(head(f.graph, 0, 1), tokens=0b1100)
    before = f.oracle.passes
    got = f.logits(Patch(to_logits(f.graph, step), CORRUPT))
    assert f.oracle.passes == before + 3  # both worlds' own runs, and this cell
    assert largest_difference(got, [want]) < 2e-6
    assert largest_difference(got, f.plain("clean")) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_a_stream_patch_at_one_position_is_a_forward_hook(rank: int) -> None:
    f = Fixture("gpt2", data=prompts(6))
    clean, corrupt = (torch.tensor(f.data.world(w).ids) for w in ("clean", "corrupt"))
    model: Any = f.model
    blocks = model.transformer.h
    # The stream between attention and MLP is what ln_2 reads and the MLP's output is added to: set by hand below.
    places = {1: blocks[0], 3: blocks[1], 5: model.transformer.ln_f}
    if rank in places:
        module = places[rank]
        donor = kept(model, corrupt, module, before=True)

        def at_2(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0].clone()
            x[:, 2] = donor[:, 2]
            return (x, *args[1:])

        with hooked(module, at_2, before=True):
            want = model(clean).logits[0]
    else:
        block = blocks[rank // 2 - 1]
        donor = kept(model, corrupt, block.ln_2, before=True)
        base = kept(model, clean, block.ln_2, before=True)

        def add_at_2(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[:, 2] += (donor - base)[:, 2]
            return out

        with hooked(block.attn.c_proj, add_at_2):
            want = model(clean).logits[0]
    step = Step(f.graph.below(rank), site=Site.STREAM, rank=rank, tokens=0b100)
    got = f.logits(Patch(to_logits(f.graph, step), CORRUPT))
    assert largest_difference(got, [want]) < 3e-6
    assert largest_difference(got, f.plain("clean")) > 1e-3


@torch.no_grad()
def test_zeroed_attention_output_loses_its_bias() -> None:
    f = Fixture("gpt2", data=prompts(6))
    model: Any = f.model
    with hooked(model.transformer.h[1].attn.c_proj, lambda _, __, out: torch.zeros_like(out)):
        want = model(torch.tensor(f.data.world("clean").ids)).logits[0]
    block = f.graph.blocks[3]
    got = f.logits(Patch(to_logits(f.graph, Step(block.nodes, site=Site.ATTN_OUT)), Value(())))
    assert largest_difference(got, [want]) < 2e-6


# ---- against the node functions


@torch.no_grad()
def test_an_edge_patch_is_a_head_with_another_q(fixture: Fixture) -> None:
    f, graph = fixture.functions, fixture.graph
    a, b = graph.node(Kind.HEAD, 0, 1), graph.node(Kind.HEAD, 1, 2)
    assert a is not None and b is not None
    clean, corrupt = (Plain(f, fixture.data.world(w).ids) for w in ("clean", "corrupt"))
    below = sum(x for node, x in clean.out.items() if node.rank < b.rank)
    q = f.project(b, 0, below + corrupt.out[a] - clean.out[a])
    out = f.write(b, f.z(b, q, *clean.qkv[b][1:]))
    stream = sum(x for node, x in clean.out.items() if node.rank <= b.rank) + out - clean.out[b]
    mlp = graph.node(Kind.MLP, 1)
    want = f.unembed(stream + f.mlp(mlp, stream) if mlp else stream)
    got = fixture.logits(Patch(to_logits(graph, Step(1 << a.id), Step(1 << b.id, ports=1)), CORRUPT))
    assert largest_difference(got, list(want.split(fixture.data.layout.lengths))) < 5e-6
    assert largest_difference(got, fixture.logits()) > 1e-4


@torch.no_grad()
def test_a_given_output_of_a_head_is_what_it_adds_to_the_stream() -> None:
    vector = torch.linspace(-1, 1, 4 * D_HEAD)
    f = Fixture("native", tensors={"v": vector})
    node = f.graph.node(Kind.HEAD, 1, 3)
    assert node is not None
    plain = Plain(f.functions, f.data.world("clean").ids)
    half = Value(((1.0, Given("v")), (0.5, Itself())))
    stream = sum(plain.out.values()) - 0.5 * plain.out[node] + vector
    want = f.functions.unembed(stream)
    got = f.logits(Patch(to_logits(f.graph, Step(1 << node.id)), half))
    assert largest_difference(got, list(want.split(f.data.layout.lengths))) < 5e-6


# ---- against brute force: random languages on models of two heads

SMALL = prompts(3, 2, seed=3)
EARLY = 0b01001  # the first token of either prompt
SOURCES = [
    FromWorld("corrupt"),
    FromWorld("third"),
    FromWorld("clean"),
    Itself(),
    Mean("corrupt"),
    Mean("third", True),
]


def values() -> st.SearchStrategy[Value]:
    term = st.tuples(st.sampled_from([1.0, 0.5, -1.0]), st.sampled_from(SOURCES))
    mixture = st.lists(term, max_size=2).map(lambda terms: Value(tuple(terms)))
    return st.one_of(st.just(CORRUPT), st.just(Value(())), mixture)


def node_sets(graph: ResidualGraph) -> st.SearchStrategy[int]:
    single = st.sampled_from([1 << n.id for n in graph.nodes[:-1]])
    kinds = [graph.all, graph.all & ~1, graph.heads, graph.mlps or graph.heads, graph.input]
    return st.one_of(single, st.sampled_from(kinds), st.integers(1, graph.all))


def relations(graph: ResidualGraph) -> st.SearchStrategy[Edges | None]:
    readers = [(r.node.id, -1 if r.port is None else r.port) for r in graph.readers]
    row = st.tuples(st.sampled_from(readers), st.integers(0, graph.all))
    rows = st.lists(row, max_size=6, unique_by=lambda pair: pair[0]).map(lambda pairs: tuple(sorted(pairs)))
    return st.one_of(st.none(), st.none(), st.none(), st.builds(Edges, rows, st.booleans()))


def tokens() -> st.SearchStrategy[int]:
    return st.sampled_from([-1, -1, -1, -1, EARLY, SMALL.layout.all & ~EARLY])


def steps(graph: ResidualGraph) -> st.SearchStrategy[Step]:
    ports = st.sampled_from([7, 7, 1, 2, 4, 6])
    return st.builds(Step, node_sets(graph), ports, tokens(), relations(graph))


def start_steps(graph: ResidualGraph) -> st.SearchStrategy[Step]:
    anywhere = st.builds(Step, node_sets(graph), st.just(7), tokens(), relations(graph))
    sites = st.sampled_from([Site.Z, Site.Q, Site.K, Site.V])
    of_heads = node_sets(graph).map(lambda nodes: nodes & graph.heads or graph.heads)
    inside = st.builds(Step, of_heads, st.just(7), tokens(), relations(graph), sites)
    ranks = st.integers(1, graph.top)
    streams = st.builds(
        lambda rank, some: Step(graph.below(rank), tokens=some, site=Site.STREAM, rank=rank), ranks, tokens()
    )
    layers = [b.nodes for b in graph.blocks if b.kind is BlockKind.ATTENTION]
    outputs = st.builds(
        lambda nodes, some: Step(nodes, tokens=some, site=Site.ATTN_OUT), st.sampled_from(layers), tokens()
    )
    return st.one_of(anywhere, anywhere, inside, streams, outputs)


def languages(graph: ResidualGraph) -> st.SearchStrategy[Seq]:
    step = steps(graph)
    group = st.one_of(
        st.lists(step, min_size=2, max_size=2).map(lambda two: Alt(tuple(two))),
        st.lists(step, min_size=2, max_size=2).map(lambda two: Seq(tuple(two))),
    )
    any_star = st.just(Star(Step(graph.all)))
    part = st.one_of(step, any_star, any_star, step.map(Star), group, group.map(Star))
    start = start_steps(graph)
    starts = st.one_of(start, st.lists(start, min_size=2, max_size=2).map(lambda two: Alt(tuple(two))))
    end = st.builds(Step, st.just(graph.logits_set), st.just(7), tokens())
    return st.builds(lambda a, middle, z: Seq((a, *middle, z)), starts, st.lists(part, max_size=3), end)


def patches(graph: ResidualGraph) -> st.SearchStrategy[tuple[Patch, ...]]:
    one = st.builds(Patch, languages(graph), values(), st.booleans())
    return st.one_of(one.map(lambda p: (p,)), st.tuples(one, one))


def checked(examples: int) -> Any:
    """Settings of a random test: the same examples each time, and no shrinking, which would take minutes."""
    phases = (Phase.explicit, Phase.generate)
    unwell = list(HealthCheck)
    return settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=unwell
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "examples", "tolerance"), [("native", 40, 1e-9), ("gpt2", 10, 1e-9), ("llama", 10, 2e-5)]
)
def test_random_languages_unroll(kind: str, examples: int, tolerance: float) -> None:
    # In double precision (but for Llama's norms and rotations): where patches zero all that a norm reads, it makes much
    # of the last bits.
    fixture = Fixture(kind, n_heads=2, data=SMALL, double=True)

    @checked(examples)
    @given(patches(fixture.graph))
    def check(some: tuple[Patch, ...]) -> None:
        try:
            with torch.no_grad():
                want = Unrolled(fixture.functions, fixture.data, "clean", some).logits()
        except Disagree:
            assume(False)
            return
        got = fixture.logits(*some)
        assert largest_difference(got, list(want.split(SMALL.layout.lengths))) < tolerance

    check()


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_both_drivers_agree(kind: str) -> None:
    one, other = (
        Fixture(kind, driver, data=prompts(4, 3, 4)) for driver in ("transformer_lens", "forward_hooks")
    )

    @checked(20)
    @given(patches(one.graph))
    def check(some: tuple[Patch, ...]) -> None:
        try:
            want = one.logits(*some)
        except PatchcError:
            assume(False)
            return
        assert largest_difference(other.logits(*some), want) < 1e-3

    check()


# ---- values that meet


@torch.no_grad()
def test_of_two_starts_on_one_path_the_one_nearest_the_logits_wins() -> None:
    f = Fixture("native")
    low, high = head(f.graph, 0, 0), head(f.graph, 1, 2)
    noise = Patch(to_logits(f.graph, Step(low)), Value(()))
    restore = Patch(to_logits(f.graph, Step(f.graph.heads & ~low)), Value(((1.0, FromWorld("clean")),)))
    direct = Patch(Seq((Step(low), Step(f.graph.logits_set))), Value(()))
    assert largest_difference(f.logits(noise, restore), f.logits(direct)) < 2e-6
    assert largest_difference(f.logits(noise), f.logits(direct)) > 1e-4
    assert high & restore.path.parts[0].nodes


def test_one_start_with_two_values_is_an_error() -> None:
    f = Fixture("native")
    step = to_logits(f.graph, Step(head(f.graph, 0, 0)))
    with pytest.raises(PatchcError, match="hooks-two-values") as error:
        f.logits(Patch(step, CORRUPT), Patch(step, Value(())))
    assert "head[0, 0]" in error.value.diagnostics[0].message
    assert (
        largest_difference(
            f.logits(Patch(step, CORRUPT), Patch(step, CORRUPT)), f.logits(Patch(step, CORRUPT))
        )
        == 0
    )


def test_a_start_may_have_two_values_at_different_tokens() -> None:
    f = Fixture("native", data=prompts(4))
    early, late = (to_logits(f.graph, Step(head(f.graph, 0, 0), tokens=t)) for t in (0b0011, 0b1100))
    both = f.logits(Patch(early, CORRUPT), Patch(late, Value(())))
    assert largest_difference(both, f.logits(Patch(early, CORRUPT))) > 1e-4
    assert largest_difference([both[0][:2]], [f.logits(Patch(early, CORRUPT))[0][:2]]) < 2e-6


@pytest.mark.parametrize(
    ("tensors", "message"), [({}, "no tensor 'v'"), ({"v": torch.zeros(3)}, r"must be \[32\]")]
)
def test_a_tensor_that_does_not_fit_is_an_error(tensors: dict[str, Tensor], message: str) -> None:
    f = Fixture("native", tensors=tensors)
    given = Value(((1.0, Given("v")),))
    with pytest.raises(PatchcError, match=message):
        f.logits(Patch(to_logits(f.graph, Step(head(f.graph, 0, 0))), given))


# ---- metrics


def test_metrics_are_their_definitions() -> None:
    data = prompts(4, 6, 6)
    ends = tuple(data.layout.token(i, -1) for i in range(3))
    answers = ((1, 2), (3,), (4,))
    reads = {measure: Read(measure, answers, ends) for measure in Measure}
    expressions = {str(m): e for m, e in reads.items()} | {
        "kl": Kl("corrupt", ends),
        "sum": Sum(((2.0, reads[Measure.LOGIT]), (-1.0, Constant(3.0)))),
        "product": Product((reads[Measure.PROB], reads[Measure.LOSS])),
        "quotient": Quotient(reads[Measure.PROB], reads[Measure.LOSS]),
        "called": Called("largest"),
    }
    metrics = [Metric(name, e) for name, e in expressions.items()]
    f = Fixture("native", data=data, metrics={"largest": lambda logits: logits[:, -1].amax(-1)})
    got = f.oracle.measure(experiment(*metrics), [cell(), cell()])
    clean = torch.stack([x[-1] for x in f.plain("clean")]).double()
    corrupt = torch.stack([x[-1] for x in f.plain("corrupt")]).double()
    p, q = corrupt.softmax(-1), clean.softmax(-1)
    prob = torch.stack([q[i, list(a)].sum() for i, a in enumerate(answers)])
    logit = torch.stack([clean[i, list(a)].mean() for i, a in enumerate(answers)])
    best = [clean[i, list(a)].max() for i, a in enumerate(answers)]
    want = {
        "logit": logit.mean(), "prob": prob.mean(), "logprob": prob.log().mean(), "loss": -prob.log().mean(),
        "rank": sum((clean[i] > b).sum() for i, b in enumerate(best)) / 3,
        "correct": sum(float(int(clean[i].argmax()) in a) for i, a in enumerate(answers)) / 3,
        "kl": (p * (p / q).log()).sum(-1).mean(), "sum": (2 * logit - 3).mean(),
        "product": -(prob * prob.log()).mean(), "quotient": -(prob / prob.log()).mean(),
        "called": clean.amax(-1).mean(),
    }  # fmt: skip
    assert got.keys() == want.keys()
    for name, number in want.items():
        assert got[name].dtype == torch.float64
        assert got[name].tolist() == pytest.approx([float(number)] * 2, abs=2e-6), name


def test_normalised_metrics_are_0_and_1_at_their_worlds() -> None:
    f = Fixture("native", data=prompts(4, 6))
    ends = tuple(f.data.layout.token(i, -1) for i in range(2))
    logit = Read(Measure.LOGIT, ((1,), (2,)), ends)
    metrics = [
        Metric("of means", logit, "clean", "corrupt"),
        Metric("of ratios", logit, "clean", "corrupt", True),
    ]
    whole = Patch(to_logits(f.graph, Step(f.graph.input)), CORRUPT)
    part = Patch(to_logits(f.graph, Step(head(f.graph, 0, 0))), CORRUPT)
    done: list[int] = []
    got = f.oracle.measure(experiment(*metrics), [cell(), cell(whole), cell(part)], done.append)
    assert done == [1, 2, 3]
    for numbers in got.values():
        assert numbers[:2].tolist() == pytest.approx([0, 1], abs=1e-6)
    at_end = [
        torch.stack([x[-1, i + 1] for i, x in enumerate(run)]).double()
        for run in (f.plain("clean"), f.logits(part), f.plain("corrupt"))
    ]
    zero, x, one = at_end
    assert got["of means"][2].item() == pytest.approx(
        ((x.mean() - zero.mean()) / (one.mean() - zero.mean())).item(), abs=1e-5
    )
    assert got["of ratios"][2].item() == pytest.approx(((x - zero) / (one - zero)).mean().item(), abs=1e-5)


def test_a_python_metric_of_a_wrong_shape_is_an_error() -> None:
    f = Fixture("native", metrics={"all": lambda logits: logits})
    with pytest.raises(PatchcError, match="one number, or one a prompt"):
        f.oracle.measure(experiment(Metric("m", Called("all"))), [cell()])


# ---- what it leaves alone


@pytest.mark.parametrize(("kind", "driver"), DRIVERS)
def test_the_model_is_left_as_it_was(kind: str, driver: str) -> None:
    def state(model: nn.Module) -> list[Any]:
        modules = [
            (name, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ]
        return [modules, {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}]

    model, graph = MODELS[kind](4)
    model.train()
    before, weights = state(model), {name: x.clone() for name, x in model.state_dict().items()}
    config = str(getattr(model, "config", None))
    oracle = Oracle(model, graph, prompts(4), driver=driver)
    oracle.logits(experiment(), cell(Patch(to_logits(graph, Step(graph.heads, ports=1)), Value(()))))
    assert state(model) == before
    assert str(getattr(model, "config", None)) == config
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_a_model_that_nothing_can_hook_is_refused_by_name() -> None:
    _, graph = gpt2()
    with pytest.raises(PatchcError, match="cannot hook a Sequential") as error:
        Oracle(nn.Sequential(nn.Embedding(50, 32)), graph, prompts(4))
    assert error.value.exit == 3


def test_a_graph_of_another_model_is_refused() -> None:
    model, _ = gpt2()
    _, other = native()
    with pytest.raises(PatchcError, match="hooks-differ"):
        Oracle(model, other, prompts(4))


# ---- independence

FILES = ("hooks", "hook_drivers", "oracle_metrics", "oracle_worlds", "residuals")
ALLOWED = {"patchc", "patchc.diagnostics", "patchc.execute", *(f"patchc.execute.{name}" for name in FILES)}


def forbidden(modules: list[str]) -> list[str]:
    ours = (m for m in modules if m == "patchc" or m.startswith("patchc."))
    return sorted(m for m in ours if m not in ALLOWED and m != "patchc.ir" and not m.startswith("patchc.ir."))


def loaded_with(*names: str) -> list[str]:
    """The modules that a fresh process has after importing these."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def imported_by(source: str) -> list[str]:
    """Every module that a source names in an import, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.append(node.module or "")
    return names


def test_the_backend_loads_nothing_of_the_compiler() -> None:
    assert forbidden(loaded_with(*(f"patchc.execute.{name}" for name in FILES))) == []


@pytest.mark.parametrize("name", FILES)
def test_no_function_of_the_backend_imports_the_compiler(name: str) -> None:
    assert forbidden(imported_by((ROOT / "patchc" / "execute" / f"{name}.py").read_text())) == []


def test_the_tests_of_independence_can_fail() -> None:
    assert "patchc.lower" in forbidden(loaded_with("patchc.execute.residuals", "patchc.lower"))
    assert forbidden(imported_by("def f():\n    from patchc.optimise import cut")) == ["patchc.optimise"]
