"""Numbers a prompt of what is read beside single logits: continuations, places in the model; in graphs too."""

from __future__ import annotations

import torch

from patchc.execute.base import run_world
from patchc.execute.sweep import Outcome, Sweep
from patchc.ir.experiment import (
    Called,
    Cell,
    Continuation,
    Experiment,
    FromWorld,
    Metric,
    NodeRead,
    Patch,
    Probe,
    Prompts,
    Value,
    World,
)
from patchc.ir.paths import Alt, Seq, Site, Star, Step
from patchc.ir.tokens import Layout
from patchc.model.load import LoadedModel
from patchc.optimise.plan import place_name
from patchc.pipeline import to_graph, to_program
from tests.models import loaded_model, logits_of

CLEAN = ((1, 2, 3, 20, 21), (4, 5, 6, 7, 22), (1, 2, 3, 30, 31), (4, 5, 6, 7, 32))
CORRUPT = ((1, 9, 3, 20, 21), (8, 5, 6, 7, 22), (1, 9, 3, 30, 31), (8, 5, 6, 7, 32))
PROMPTS = Prompts(Layout((5, 5, 5, 5)), (World("clean", CLEAN), World("corrupt", CORRUPT)), copies=2, own=(3, 4, 3, 4))
ANSWERS = ((20, 21, 23), (22, 24))
TOKENS = ((2, 3, 4), (8, 9))


def experiment(m: LoadedModel, probe: Probe | None, *metrics: Metric) -> Experiment:
    """Every path from the input, which makes the run that of the corrupt world."""
    ends = [Step(m.graph.logits_set)] + ([Step(probe.nodes)] if probe else [])
    path = Seq((Step(m.graph.input), Star(Step(m.graph.all)), Alt(tuple(ends))))
    return Experiment(
        "e", None, "clean", (), (Cell((), (Patch(path, Value(((1.0, FromWorld("corrupt")),))),)),), metrics
    )


def ran(m: LoadedModel, e: Experiment, **functions) -> Outcome:
    program = to_program(e, PROMPTS, m, 1 << 30)
    return Sweep(program, m.pieces, m.pieces.tables(PROMPTS.layout), functions).run()


def test_a_continuation_is_the_sum_of_its_log_probabilities() -> None:
    m = loaded_model("gpt2-sdpa")
    outcome = ran(m, experiment(m, None, Metric("x", Continuation(ANSWERS, TOKENS))))
    for world, numbers in (("corrupt", outcome.numbers["x"]), ("clean", outcome.unpatched["x"]["clean"])):
        logits = logits_of(m.eager, torch.tensor(PROMPTS.world(world).ids)).double().log_softmax(-1).flatten(0, 1)
        want = [sum(logits[t, a] for t, a in zip(*pair, strict=True)) for pair in zip(TOKENS, ANSWERS, strict=True)]
        assert (numbers.per_prompt.flatten() - torch.stack(want)).abs().max() < 1e-4


def test_a_python_metric_sees_each_prompt_once_and_alone() -> None:
    m = loaded_model("gpt2-sdpa")
    prompts = Prompts(PROMPTS.layout, PROMPTS.worlds, copies=2, own=(3, 3, 3, 3))
    seen = []
    e = experiment(m, None, Metric("x", Called("f")))
    program = to_program(e, prompts, m, 1 << 30)

    def f(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits)
        return logits[:, -1, 7]

    Sweep(program, m.pieces, m.pieces.tables(prompts.layout), {"f": f}).run()
    clean = logits_of(m.eager, torch.tensor(CLEAN[:2]))[:, :3]
    assert (seen[0] - clean).abs().max() < 1e-4


def test_a_graph_captures_what_metrics_read() -> None:
    """Of an experiment that reads no logits too; with the mask 1 it is the corrupt world's number, with 0 the clean."""
    m = loaded_model("gpt2-sdpa")
    head, tensors = m.graph.members(m.graph.heads)[-1], {"v": torch.ones(m.graph.d_head)}
    layouts = m.pieces.tables(PROMPTS.layout)
    runs = {w.name: run_world(m.pieces, w, PROMPTS.layout, layouts) for w in PROMPTS.worlds}
    ids = [torch.tensor(w.ids) for w in PROMPTS.worlds]
    for site in (Site.Q, Site.Z, Site.PATTERN):
        probe = Probe(1 << head.id, site)
        leaf = NodeRead(probe, (2, 8), sources=(1, 7)) if site is Site.PATTERN else NodeRead(probe, (2, 8), key="v")
        e = experiment(m, probe, Metric("x", leaf))
        with torch.no_grad():
            captures = [to_graph(e, PROMPTS, m, tensors)(*ids, torch.tensor(x))[1] for x in (0.0, 1.0)]
        for world, found in zip(("clean", "corrupt"), captures, strict=True):
            attention = runs[world].attention[head.block]
            assert (found["stream"].flatten(0, 1) - runs[world].stream[-1]).abs().max() < 1e-4
            name = f"read {place_name(m.graph, probe)}"
            if site is Site.PATTERN:
                assert name not in found
            else:
                whole = attention.z if site is Site.Z else attention.raw[0]
                assert (found[name].flatten(0, 1) - whole[:, head.head]).abs().max() < 1e-4
