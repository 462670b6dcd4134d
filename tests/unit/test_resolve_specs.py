"""Experiments as researchers write them, on a graph of GPT-2's shape: what each resolves to, in short."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from patchc.ir.experiment import Blocked, Experiment, FromWorld, Given, Itself, Mean, Moved, Noise
from patchc.ir.paths import Seq, Site, Star, Step
from patchc.ir.printer import print_study
from tests.unit.resolving import GPT2, study

TEXTS = [("Mary", "John"), ("John", "Mary"), ("Ann", "Tom"), ("Tom", "Ann")]
METRICS = """
metric diff = logit(answer) - logit(wrong)
metric recovered = diff from corrupt to clean
"""


def data(n: int = 4) -> str:
    """Prompts of one length with named positions."""
    at = "at end -1 at io answer first at s1 wrong first at s1_next wrong first + 1 at s2 wrong last"
    blocks = [
        f'data {{ clean "When {io} and {s} went to the shop, {s} gave a bag to"\n'
        f'  corrupt "When {io} and {s} went to the shop, {io} gave a bag to"\n'
        f'  answer " {io}" wrong " {s}" {at} }}'
        for io, s in TEXTS[:n]
    ]
    return "\n".join(blocks) + METRICS


def only(body: str, spec: str = "", graph: Any = GPT2, **options: Any) -> Experiment:
    """The one experiment of a spec. What is printed of it is read by nobody here, and has to be printable."""
    found = study(f"{spec or data()}\nexperiment e {{ {body} }}", graph, **options)
    assert print_study(found, graph)
    return found.experiments[0]


def dims(found: Experiment) -> dict[str, int]:
    return {d.name: len(d.coords) for d in found.dims}


def start(found: Experiment, cell: int = 0, patch: int = 0) -> Step:
    path = found.cells[cell].patches[patch].path
    step = path.parts[0] if isinstance(path, Seq) else path
    assert isinstance(step, Step)
    return step


# ---- a world restored, or put in


@pytest.mark.parametrize(
    ("variables", "what", "expected"),
    [
        ("l in layers, p in positions", "resid_pre[l] @ p", {"layer": 12, "position": 14}),
        ("l in layers, p in positions", "resid_mid[l] @ p", {"layer": 12, "position": 14}),
        ("l in layers, p in positions", "attn_out[l] @ p", {"layer": 12, "position": 14}),
        ("l in layers, p in positions", "mlp[l] @ p", {"layer": 12, "position": 14}),
        ("l in layers, p in {end}, i in heads", "head[l, i].z @ p", {"layer": 12, "position": 1, "head": 12}),
        ("h in head", "h.q", {"layer": 12, "head": 12}),
        ("h in head, p in s1..s1_next", "h.pattern @ p", {"layer": 12, "head": 12, "position": 2}),
        ("h in head.{z, q, k, v, pattern}", "h", {"layer": 12, "head": 12, "site": 5}),
        ("n in attn_out | mlp | embed | pos_embed, p in positions", "n @ p", {"n": 26, "position": 14}),
        ("h in head[9, *], p in {end, s2, io}", "h.v @ p", {"layer": 1, "head": 12, "position": 3}),
        ("h in head[..2, *], p in s2..end", "h @ p", {"layer": 3, "head": 12, "position": 5}),
    ],
)
def test_sweeps_of_activations(variables: str, what: str, expected: dict[str, int]) -> None:
    found = only(f"for {variables} run corrupt patch node {what} with clean measure recovered")
    assert dims(found) == expected
    assert len(found.cells) == prod(expected.values())
    assert len({c.index for c in found.cells}) == len(found.cells)


def test_every_entry_of_every_pattern() -> None:
    body = "for h in head[9..10, *], d in positions, s in positions run corrupt patch node h.pattern[d, s] with clean"
    found = only(f"{body} measure recovered")
    assert dims(found) == {"layer": 2, "head": 12, "d": 14, "s": 14}
    assert len(found.cells) == 24 * 14 * 14
    entry = start(found, 14 + 2)
    assert (entry.site, entry.tokens.bit_count(), entry.sources.bit_count()) == (Site.PATTERN, 4, 4)


# ---- neurons


def test_every_neuron_of_some_layers() -> None:
    body = "for n in mlp[9..10].post[*] run clean patch node n @ end with mean(corrupt)"
    found = only(f"{body} measure diff, prob(answer) as p")
    assert dims(found) == {"layer": 2, "neuron": 3072}
    assert found.cells[3072 + 5].index == (1, 5)
    assert start(found, 3072 + 5).neurons == 1 << 5
    assert len({id(c.patches[0].value) for c in found.cells}) == 1


def test_some_neurons_at_once() -> None:
    found = only("run clean patch node mlp[9].post[{373, 1001}] with zero measure diff")
    assert start(found).neurons == 1 << 373 | 1 << 1001
    assert found.cells[0].patches[0].value.terms == ()


# ---- noise, then restored (Meng et al. 2022)

FACT = """
data { clean "The Space Needle is in the old shop" answer " John"
  at subject " Space Needle" at subject_last " Needle" last }
metric p = prob(answer)
"""


def test_a_window_of_mlps_is_cut_to_the_model() -> None:
    noise = "patch node embed @ subject with self + noise(sigma=3, seed=0)"
    body = f"for l in layers, q in positions run clean {noise} patch node mlp[l - 5..l + 4] @ q with clean measure p"
    found = only(body, FACT)
    assert dims(found) == {"layer": 12, "position": 8}
    widths = [start(found, 8 * layer, 1).nodes.bit_count() for layer in range(12)]
    assert widths == [5, 6, 7, 8, 9, 10, 10, 10, 9, 8, 7, 6]
    assert found.cells[0].patches[0].value.terms == ((1.0, Itself()), (1.0, Noise(3.0, 0, True)))
    assert start(found).tokens == 0b110


def test_several_seeds_are_a_dim() -> None:
    noise = "patch node embed @ subject with self + noise(sigma=3, seed=s)"
    body = f"for l in layers, s in {{0, 1, 2}} run clean {noise} patch node resid_post[l] @ subject_last with clean"
    found = study(f"{FACT} experiment e {{ {body} measure p }}", GPT2)
    assert dims(found.experiments[0]) == {"layer": 12, "s": 3}
    assert found.seeds == (("noise", 0), ("noise", 1), ("noise", 2))


def test_severed_paths_go_through_everything_but_mlps() -> None:
    path = "resid_pre[l] @ subject_last -> (any - mlp)* -> logits"
    found = only(
        f"for l in layers run clean patch node embed @ subject with zero patch path {path} with clean measure p", FACT
    )
    parts: Any = found.cells[3].patches[1].path
    assert isinstance(parts.parts[1], Star)
    assert parts.parts[1].part.nodes == GPT2.all & ~GPT2.mlps


# ---- resampled, steered, moved


def test_resampled_heads() -> None:
    found = only("for h in head, s in {0, 1, 2, 3, 4} run clean patch node h with resample(seed=s) measure diff")
    assert dims(found) == {"layer": 12, "head": 12, "s": 5}
    values = {c.patches[0].value for c in found.cells}
    assert len(values) == len({id(c.patches[0].value) for c in found.cells}) == 5
    doubled = data() + data().removesuffix(METRICS)
    same = only("run clean patch node head[9, *] with resample(same=answer, seed=0) measure diff", doubled)
    ((_, source),) = same.cells[0].patches[0].value.terms
    assert isinstance(source, Moved)
    assert [source.tokens[14 * i] // 14 for i in range(8)] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_a_steering_vector(tmp_path: Path) -> None:
    header = json.dumps({"direction": {"dtype": "F32", "shape": [768], "data_offsets": [0, 3072]}}).encode()
    (tmp_path / "steer.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3072))
    value = 'self + c * tensor("steer.safetensors", "direction")'
    body = f"for c in {{-8, 0, 2.5}}, l in 4..8 run clean patch node resid_pre[l] with {value} measure diff, kl(clean)"
    found = only(body, data(1), base=tmp_path)
    assert dims(found) == {"c": 3, "l": 5}
    assert found.dims[0].coords == (-8, 0, 2.5)
    values = [c.patches[0].value.terms for c in found.cells[::5]]
    given = Given("steer.safetensors#direction")
    assert values == [((1.0, Itself()), (-8.0, given)), ((1.0, Itself()),), ((1.0, Itself()), (2.5, given))]


def test_a_blend_of_what_is_and_the_mean() -> None:
    value = "(1 - a) * self + a * mean(clean)"
    found = only(f"for a in {{0, 0.25, 1}} run clean patch node resid_post[6] @ end with {value} measure diff")
    values = [c.patches[0].value.terms for c in found.cells]
    assert values == [((1.0, Itself()),), ((0.75, Itself()), (0.25, Mean("clean"))), ((1.0, Mean("clean")),)]


SPAN = """
data { clean "The keys to the old cabinet" corrupt "The key to the old cabinet" answer " are" wrong " is"
  at noun " keys" at phrase 2..5 at verb -1 }
metric diff = logit(answer) - logit(wrong)
"""


def test_spans_and_moved_values() -> None:
    each = only(
        "for p in {noun, phrase, verb}, l in layers run corrupt patch node resid_pre[l] @ p with clean measure diff",
        SPAN,
    )
    assert dims(each) == {"position": 3, "layer": 12}
    assert [start(each, 12 * i).tokens for i in range(3)] == [0b10, 0b111100, 0b100000]
    tokens = only("for p in noun..verb run corrupt patch node resid_pre[4] @ p with clean measure diff", SPAN)
    assert tokens.dims[0].coords == (1, 2, 3, 4, 5)
    moved = only("for l in layers run clean patch node resid_post[l] @ verb with clean @ noun measure diff", SPAN)
    assert moved.cells[0].patches[0].value.terms == ((1.0, Moved(FromWorld("clean"), (1,) * 6)),)


# ---- attention


def test_knocked_out_attention() -> None:
    column = only("for s in positions run clean patch node head.pattern[end, s] with zero measure diff")
    assert dims(column) == {"position": 14}
    assert start(column, 3).nodes == GPT2.heads
    body = "for l in layers, p in {s1, s2} run clean patch node head[l - 4..l + 4, *].scores[end, p] with blocked"
    window = only(f"{body} measure diff")
    assert dims(window) == {"layer": 12, "position": 2}
    assert [start(window, 2 * i).nodes.bit_count() for i in (0, 4, 11)] == [60, 108, 60]
    assert window.cells[0].patches[0].value.terms == ((1.0, Blocked()),)


def test_composition_of_every_pair() -> None:
    pairs = "for a in head[..3, *], b in head[..3, *].{q, k, v}"
    found = only(f"{pairs} run clean patch path a -> b -> any* -> logits with zero measure diff")
    assert dims(found) == {"a.layer": 4, "a.head": 12, "b.layer": 4, "b.head": 12, "b.site": 3}
    assert len(found.cells) == 144 * 3 * 6  # 6 pairs of layers


def test_values_alone() -> None:
    found = only(
        "for h in head run clean patch path input -> (any - h)* -> h.v -> any* -> logits with corrupt measure diff"
    )
    assert dims(found) == {"layer": 12, "head": 12}
    path: Any = found.cells[0].patches[0].path
    assert (path.parts[2].ports, path.parts[2].nodes.bit_count()) == (4, 1)


def test_two_hops_by_position() -> None:
    path = "head[2, 2] -> head[5, 5].k @ s2 -> (head[7, *] | head[8, *]).v @ s2 -> head[9, 9].q @ end -> logits"
    found = only(f"run clean patch path {path} with corrupt measure diff")
    steps: Any = found.cells[0].patches[0].path.parts  # type: ignore[union-attr]
    assert [s.ports for s in steps[1:]] == [2, 4, 1, 7]
    assert steps[2].nodes.bit_count() == 24


def test_worlds_as_a_dim() -> None:
    three = """
data { clean "When Mary and John went to the shop, John gave a bag to"
      abc "When Tom and Ann went to the shop, Mary gave a bag to"
      flip "When John and Mary went to the shop, John gave a bag to"
      answer " Mary" wrong " John" at end -1 }
metric diff = logit(answer) - logit(wrong)
"""
    path = "h -> mlp* -> head[9, {6, 9}].q @ end -> any* -> logits"
    found = only(f"for h in head[7..8, *], w in {{abc, flip}} run clean patch path {path} with w measure diff", three)
    assert dims(found) == {"layer": 2, "head": 12, "w": 2}
    assert found.dims[2].coords == ("abc", "flip")
    two = "patch path embed -> any* -> head[9, 9].k -> any* -> logits with flip "
    two += "patch path embed -> any* -> head[9, 9].q -> any* -> logits with clean"
    assert len(only(f"run abc {two} measure diff", three).cells[0].patches) == 2


def test_a_circuit_without_each_of_its_nodes() -> None:
    small = "let small = circuit(input | head[9, {6, 9}] | head[10, 0] | mlp)\n"
    body = "for n in nodes(small) - input run clean patch all except (small - n) with mean(corrupt) measure diff"
    found = only(body, small + data())
    assert dims(found) == {"n": 15}
    assert len(found.cells) == 15
