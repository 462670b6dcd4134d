"""Codes that no example brings about: faults of the machine, of a tokenizer, of patchc itself. Each by hand.

The hooks backend's own are here too: a spec never gets as far, because the compiler refuses it first.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import patchc
from patchc import cli
from patchc.diagnostics import Diagnostic, PatchcError
from patchc.execute import check, hook_proof, oracle_metrics
from patchc.ir.experiment import FromWorld, Given, Patch, Value
from patchc.ir.paths import Edges, Seq, Site, Step
from patchc.model import fx_json, packaged, prove
from tests.unit.oracle_models import Fixture, gpt2, head, native, to_logits
from tests.unit.resolving import Words, errors

Provoke = Callable[[pytest.MonkeyPatch], tuple[Diagnostic, ...]]

CLEAN, ZERO = Value(((1.0, FromWorld("clean")),)), Value(())


def _raised(act: Callable[[], Any]) -> tuple[Diagnostic, ...]:
    with pytest.raises(PatchcError) as error:
        act()
    return error.value.diagnostics


def _answer_not_as_written(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    class Lowering(Words):
        def decode(self, ids: Any) -> str:
            return super().decode(ids).lower()

    text = 'data { clean "When Mary" corrupt "When Ann" answer " Mary" }\n'
    text += "experiment e { run clean patch node head[0, 0] with corrupt measure logit(answer) }"
    return tuple(errors(text, tokenizer=Lowering()))


def _internal(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    try:
        raise ZeroDivisionError("by hand")
    except ZeroDivisionError as error:
        return (cli._internal(error),)


def _interrupted(patched: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    found: list[Diagnostic] = []

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    patched.setattr(cli, "_failed", lambda _, diagnostics: found.extend(diagnostics))
    patched.setattr(cli, "_nodes", stop)
    with pytest.raises(SystemExit):
        cli.main(["nodes", "ioi-tiny"])
    return tuple(found)


def _not_resumed(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    spec = """data { clean "a b c d a b c" corrupt "a b c d a e c" answer " d" }
experiment e { for h in head run clean patch node h with corrupt measure logit(answer) }"""
    kept = Path("kept", "0" * 16)
    kept.mkdir(parents=True)
    (kept / "run.json").write_text('{"format_version": 1, "binding": {}}', encoding="utf-8")
    return patchc.load("induction-2l").compile(spec, partial="kept").warnings


def _model_not_installed(patched: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    patched.setattr(packaged.metadata, "distribution", missing)
    patched.setattr(packaged, "find_spec", lambda _: None)
    return _raised(lambda: patchc.load("smollm2-135m"))


def _trace_differs(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    pieces: Any = patchc.load("induction-2l").loaded.pieces
    prover = prove.Prover(pieces, patchc.load("induction-2l").loaded.eager)
    return _raised(lambda: prover._compare(torch.zeros(3), torch.ones(3), "the outputs of `h.0`"))


def _hooks_model(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    _model, graph = native()
    return _raised(lambda: hook_proof.driver_for(nn.Sequential(nn.Embedding(50, 32)), graph))


def _hooks_differ(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    eager, _graph = gpt2()
    _model, graph = native()
    return _raised(lambda: hook_proof.driver_for(eager, graph))


def _hooks_metric(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    return _raised(lambda: oracle_metrics._each("mine", torch.zeros(2, 2), 2))


def _hooks_tensor(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    f = Fixture("native", tensors={"v": torch.zeros(3)})
    patch = Patch(to_logits(f.graph, Step(head(f.graph, 0, 0))), Value(((1.0, Given("v")),)))
    return _raised(lambda: f.logits(patch))


def _hooks_two_values(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    f = Fixture("native")
    path = to_logits(f.graph, Step(head(f.graph, 0, 0)))
    return _raised(lambda: f.logits(Patch(path, CLEAN), Patch(path, ZERO)))


def _hooks_edges_from_stream(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    f = Fixture("native")
    nodes = f.graph.below(3)
    start = Step(nodes, via=Edges((((f.graph.logits.id, -1), nodes),)), site=Site.STREAM, rank=3)
    return _raised(lambda: f.logits(Patch(Seq((start, Step(f.graph.logits_set))), ZERO)))


def _check_failed(patched: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    patched.setattr(check, "TOLERANCE", -1.0)
    patched.setattr(check, "RATIO", -1.0)
    spec = 'data { clean "a b c" corrupt "a b d" answer " d" }\n'
    spec += "experiment e { run clean patch node head[0, 0] with corrupt measure logit(answer) }"
    return _raised(lambda: patchc.load("induction-2l").compile(spec).run(check=True, progress=False))


def _not_saveable(_: pytest.MonkeyPatch) -> tuple[Diagnostic, ...]:
    graph = fx.Graph()
    node = graph.call_function(torch.fft.fft, (graph.placeholder("x"),))
    return _raised(lambda: fx_json._target_json(node))


PROVOKED: dict[str, Provoke] = {
    "answer-not-as-written": _answer_not_as_written,
    "internal": _internal,
    "interrupted": _interrupted,
    "model-not-installed": _model_not_installed,
    "not-resumed": _not_resumed,
    "trace-differs": _trace_differs,
    "hooks-model": _hooks_model,
    "hooks-differ": _hooks_differ,
    "hooks-metric": _hooks_metric,
    "hooks-tensor": _hooks_tensor,
    "hooks-two-values": _hooks_two_values,
    "hooks-edges-from-stream": _hooks_edges_from_stream,
    "check-failed": _check_failed,
    "not-saveable": _not_saveable,
}

WITHOUT_EXAMPLE = frozenset(
    "file-too-large double-bos edge-positions complement-of-a-part no-inside mean-position no-text-column "
    "offset-of-number hooks-point hooks-read-tensor no-starter other-activation".split()
)
"""Codes whose page says what they mean without an example; tests of the stage that raises them bring them about."""
