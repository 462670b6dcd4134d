"""Whole studies: counts, sharing, models, tensors, and the warnings that come with a result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from patchc.diagnostics import PatchcError, Severity, Source
from patchc.ir.experiment import Experiment, Given, ModelChoice, TensorFrom
from patchc.ir.paths import Seq
from patchc.parse import parse
from patchc.resolve import model_choice, resolve
from tests.unit.resolving import (
    ATTENTION_ONLY,
    DATA,
    GPT2,
    METRIC,
    PARALLEL,
    SMALL,
    Words,
    error,
    errors,
    experiment,
    resolved,
    study,
)

EDGES = "for w in writers, r in readers run clean patch edge w -> r with corrupt"


def spec_of(text: str) -> Any:
    return parse(Source("a.patch", text))


# ---- counts and sharing


@pytest.mark.parametrize("graph", [SMALL, ATTENTION_ONLY, PARALLEL, GPT2], ids=lambda g: g.model)
def test_a_sweep_over_every_edge_has_every_edge_of_the_graph(graph: Any) -> None:
    found = experiment(EDGES, graph)
    assert len(found.cells) == graph.n_edges
    assert found.shape == (len(graph.writers), len(graph.readers))


def test_gpt2_has_as_many_edges_as_others_count() -> None:
    found = experiment(EDGES, GPT2)
    assert (found.shape, len(found.cells)) == ((157, 445), 32_491)
    assert found.dims[0].coords[:2] == ("input", "head[0, 0]")
    assert found.dims[1].coords[-1] == "logits"
    assert len({c.index for c in found.cells}) == len(found.cells)


def test_cells_share_what_does_not_depend_on_the_variables() -> None:
    paths = [p.path for c in experiment(EDGES).cells for p in c.patches]
    inner = [p for p in paths if isinstance(p, Seq) and len(p.parts) == 4]
    assert len({id(p.parts[2]) for p in inner}) == 1
    assert len({id(p.parts[0]) for p in inner}) == len(SMALL.writers) - 1  # nothing is above the last MLP
    by_value = {id(p.value) for c in experiment(EDGES).cells for p in c.patches}
    assert len(by_value) == 1


def test_equal_steps_are_one_object() -> None:
    found = experiment("run clean patch node mlp[0] with corrupt patch path mlp[0] -> any* -> logits with zero")
    first, second = (p.path for p in found.cells[0].patches)
    assert isinstance(first, Seq)
    assert isinstance(second, Seq)
    assert first == second
    assert first.parts[0] is second.parts[0]


def test_more_cells_than_are_run_are_refused_before_they_are_built() -> None:
    variables = "for a in writers, b in readers, c in readers, d in writers"
    found = error(f"{variables} run clean patch edge (a | d) -> (b | c) with corrupt", GPT2)
    assert found.code == "too-many-cells"
    assert f"{157 * 445 * 445 * 157:,}" in found.message


def test_a_sweep_over_later_variables_is_counted_too() -> None:
    variables = "for a in head, b in head, c in head, d in head - a, f in readers"
    found = error(f"{variables} run clean patch edge (a | b | c | d) -> f with corrupt", GPT2)
    assert f"{144 * 144 * 144 * 143 * 445:,}" in found.message


def test_a_range_of_too_many_numbers_is_refused_before_it_is_built() -> None:
    found = error("for l in 0..99999999999999 run clean patch node mlp[0] with l * corrupt")
    assert (found.code, "100,000,000,000,000 cells" in found.message) == ("too-many-cells", True)


def test_spellings_of_one_experiment_are_equal() -> None:
    node = experiment("for h in head run clean patch node h with corrupt")
    path = experiment("for h in head[*, *] run clean patch path h -> any* -> logits with 1 * corrupt + 0 * self")
    assert cells(node) == cells(path)


def cells(found: Experiment) -> list[Any]:
    return [(c.index, [(p.path, p.value, p.complement) for p in c.patches]) for c in found.cells]


# ---- other graphs


def test_a_star_over_no_mlps_is_taken_no_times() -> None:
    text = "experiment e { run clean patch path head[0, 0] -> mlp* -> logits with corrupt measure diff }"
    found = resolved(text, ATTENTION_ONLY)
    assert [w.severity for w in found.warnings] == [Severity.NOTE]
    path: Any = found.study.experiments[0].cells[0].patches[0].path
    assert len(path.parts) == 2


def test_a_model_without_mlps_has_no_mlp() -> None:
    assert error("run clean patch node mlp[0] with corrupt", ATTENTION_ONLY).code == "unknown-node"
    assert error("run clean patch node mlp with corrupt", ATTENTION_ONLY).code == "empty-set"
    assert error("run clean patch node resid_mid[0] with corrupt", ATTENTION_ONLY).code == "unknown-node"


def test_parallel_blocks_have_no_edge_between_them() -> None:
    assert error("run clean patch edge head[0, 0] -> mlp[0] with corrupt", PARALLEL).code == "backward-edge"
    assert error("run clean patch node resid_mid[0] with corrupt", PARALLEL).code == "unknown-node"
    post: Any = experiment("run clean patch node resid_post[0] with corrupt", PARALLEL).cells[0].patches[0].path
    pre: Any = experiment("run clean patch node resid_pre[1] with corrupt", PARALLEL).cells[0].patches[0].path
    assert post == pre


def test_without_position_embeddings_the_input_is_one_node() -> None:
    path: Any = experiment("run clean patch node input with corrupt", PARALLEL).cells[0].patches[0].path
    assert path.parts[0].nodes == 1
    assert error("run clean patch node pos_embed with corrupt", PARALLEL).code == "empty-set"


# ---- models


def test_the_model_statement() -> None:
    spec = spec_of('model "gpt2" dtype=float32 bos=true revision="main" device=cpu')
    assert model_choice(spec) == ModelChoice(
        "gpt2", (("dtype", "float32"), ("bos", True), ("revision", "main"), ("device", "cpu"))
    )


def test_a_model_can_be_a_parameter() -> None:
    assert model_choice(spec_of("model ${M}"), {"M": "gpt2"}).name == "gpt2"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("let a = head", "no-model"),
        ('model "a" model "b"', "two-models"),
        ('model "a" dtpe=float32', "unknown-option"),
        ('model "a" bos=1', "bad-option"),
        ("model ${M}", "unknown-parameter"),
    ],
)
def test_model_statements_that_are_refused(text: str, code: str) -> None:
    with pytest.raises(PatchcError) as raised:
        model_choice(spec_of(text))
    assert [d.code for d in raised.value.diagnostics] == [code]


def test_a_spec_needs_a_model_unless_one_is_given() -> None:
    text = DATA + METRIC + "experiment e { run clean patch node mlp[0] with corrupt measure diff }"
    source = Source("a.patch", text)
    with pytest.raises(PatchcError) as raised:
        resolve(parse(source), source, SMALL, Words(), base=Path())
    assert [d.code for d in raised.value.diagnostics] == ["no-model"]
    given = ModelChoice("mine")
    assert resolve(parse(source), source, SMALL, Words(), base=Path(), model=given).study.model == given


# ---- tensors


def safetensors(header: dict[str, Any]) -> bytes:
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw


def test_a_tensor_of_a_file_is_known_by_its_header(tmp_path: Path) -> None:
    header = {"__metadata__": {}, "v": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}
    (tmp_path / "v.safetensors").write_bytes(safetensors(header))
    text = 'experiment e { run clean patch node mlp[0] with self + tensor("v.safetensors", "v") measure diff }'
    found = study(text, base=tmp_path)
    assert found.tensors == (TensorFrom("v.safetensors#v", "v", "v.safetensors"),)
    assert found.experiments[0].cells[0].patches[0].value.terms[1] == (1.0, Given("v.safetensors#v"))
    (missing,) = errors(text.replace('"v")', '"w")'), base=tmp_path)
    assert (missing.code, "it has v" in missing.message) == ("unknown-tensor", True)


def test_files_and_keys_that_read_alike_stay_apart(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}
    for file, key in (("a#b", "c"), ("a", "b#c")):
        (tmp_path / file).write_bytes(safetensors({key: entry}))
    values = ('tensor("a#b", "c")', 'tensor("a", "b#c")', "tensor(\"a#b#c''\")", 'tensor("a#b", "c")')
    body = " ".join(f"patch node mlp[{i}] with {value}" for i, value in enumerate(values))
    text = f"experiment e {{ run clean {body} measure diff }}"
    found = study(text, base=tmp_path, tensors={"a#b#c": (3,), "a#b#c''": (32,)})
    given = {t.key: (t.file, t.name) for t in found.tensors}
    sources = [patch.value.terms[0][1] for patch in found.experiments[0].cells[0].patches]
    expected = [("a#b", "c"), ("a", "b#c"), (None, "a#b#c''"), ("a#b", "c")]
    assert [given[source.key] for source in sources if isinstance(source, Given)] == expected


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, safetensors({})[:9], b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "v.safetensors").write_bytes(content)
    text = 'experiment e { run clean patch node mlp[0] with tensor("v.safetensors", "v") measure diff }'
    (found,) = errors(text, base=tmp_path)
    assert found.code == "bad-tensor-file"


def test_a_tensor_from_python() -> None:
    text = 'experiment e { run clean patch node mlp[0] with tensor("mine") measure diff }'
    assert study(text, tensors={"mine": (32,)}).tensors == (TensorFrom("mine", "mine"),)


# ---- the rest


def test_python_metrics_share_the_names() -> None:
    text = "experiment e { run clean patch node mlp[0] with corrupt measure mine from corrupt to clean as m }"
    metric = study(text, metrics=["mine"]).experiments[0].metrics[0]
    assert (metric.name, metric.zero, metric.one) == ("m", "corrupt", "clean")
    found = errors(text, metrics=["mine", "end"])
    assert [d.code for d in found] == ["name-clash"]


def test_a_position_of_every_prompt_is_read_by_a_metric() -> None:
    text = "experiment e { run clean patch node mlp[0] with corrupt measure diff @ s2 as d }"
    expression: Any = study(text).experiments[0].metrics[0].expression
    assert expression.terms[0][1].tokens == (9,)


def test_a_stream_is_every_writer_below_its_rank() -> None:
    path: Any = experiment("run clean patch node resid_mid[1] with corrupt").cells[0].patches[0].path
    step = path.parts[0]
    assert step.nodes == SMALL.below(step.rank)
    assert {n.name for n in SMALL.members(SMALL.all & ~step.nodes)} >= {"mlp[1]", "head[2, 0]"}
    assert "attn_bias[1]" in {n.name for n in SMALL.members(step.nodes)}


def test_resolving_needs_no_torch() -> None:
    code = "import sys, patchc.resolve, patchc.ir.printer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_same_spec_resolves_to_the_same_study() -> None:
    text = f"experiment e {{ {EDGES} measure diff }}"
    assert study(text) == study(text)
