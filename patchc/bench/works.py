"""The sweeps that are measured, as specs: all that patchc is told of them.

A sweep too long to be run whole is restricted to some layers; `sampled` is how its loops are then written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchc.bench.shape import Shape

SPEC = """
metric diff = logit(answer) - logit(wrong)
experiment sweep {{ {loops} run corrupt patch {patch} with clean measure diff }}
"""


@dataclass(frozen=True, slots=True)
class Work:
    """A sweep. In `loops`, `sampled` and `patch`, LAYERS stands for a set of layers, RECEIVER for `layer, head` of
    the receiver and BELOW for the layers below it.

    transformer_lens: the function of `transformer_lens.patching` for it, or which loop over hooks stands in; axes: the
    spec's dims in the order of that function's index. part: which of the sweeps of one name. quick: where in the
    model, 0 to 1, the layer lies that stands for all in a quick run.
    """

    name: str
    loops: str
    sampled: str
    patch: str
    transformer_lens: str
    axes: tuple[int, ...]
    part: str = ""
    quick: float = 0.5

    @property
    def title(self) -> str:
        """The name, and which part of it."""
        return f"{self.name}: {self.part}" if self.part else self.name

    def spec(self, shape: Shape, layers: Sequence[int] | None = None) -> str:
        """The spec's text, of the whole sweep or of the cells of some layers."""
        layer, head = shape.receiver
        loops = self.loops if layers is None else self.sampled
        chosen = "{" + ", ".join(map(str, layers or ())) + "}"
        below = f"..{layer - 1}"
        text = SPEC.format(loops=loops, patch=self.patch)
        return text.replace("LAYERS", chosen).replace("RECEIVER", f"{layer}, {head}").replace("BELOW", below)

    def depth(self, shape: Shape) -> int:
        """How many layers the sweep goes over."""
        return shape.receiver[0] if "BELOW" in self.loops else shape.n_layers

    def some_layers(self, shape: Shape, count: int) -> tuple[int, ...]:
        """`count` layers, evenly spread."""
        depth = self.depth(shape)
        count = min(count, depth)
        return tuple(int((i + 0.5) * depth / count) for i in range(count))

    def quick_layer(self, shape: Shape) -> tuple[int]:
        return (min(int(self.quick * self.depth(shape)), self.depth(shape) - 1),)


HEADS, SOME_HEADS = "for h in head", "for h in head[LAYERS, *]"
DIRECT_PATHS, PATHS_TO_QUERY = "edges", "paths to a query"
"""Loops over hooks, where TransformerLens has no function for the work."""

RESID_PRE = Work(
    "resid_pre [layer, pos]",
    "for l in layers, p in positions",
    "for l in LAYERS, p in positions",
    "node resid_pre[l] @ p",
    "get_act_patch_resid_pre",
    (0, 1),
)
HEAD_OUT = Work("head out, all positions", HEADS, SOME_HEADS, "node h", "get_act_patch_attn_head_out_all_pos", (0, 1))
HEAD_SITES = tuple(
    Work(
        "head q, k, v, all positions (each)",
        HEADS,
        SOME_HEADS,
        f"node h.{site}",
        f"get_act_patch_attn_head_{site}_all_pos",
        (0, 1),
        part=site,
    )
    for site in "qkv"
)
HEAD_BY_POSITION = Work(
    "head out [layer, pos, head]",
    f"{HEADS}, p in positions",
    f"{SOME_HEADS}, p in positions",
    "node h.z @ p",
    "get_act_patch_attn_head_out_by_pos",
    (0, 2, 1),
)
PATTERN = Work(
    "pattern [layer, head, dest, src]",
    f"{HEADS}, d in positions, s in positions",
    f"{SOME_HEADS}, d in positions, s in positions",
    "node h.pattern[d, s]",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    (0, 1, 2, 3),
    quick=0.85,
)
PATH = Work(
    "sender -> mlp* -> one receiver's q",
    "for h in head[BELOW, *]",
    SOME_HEADS,
    "path h -> mlp* -> head[RECEIVER].q -> any* -> logits",
    PATHS_TO_QUERY,
    (0, 1),
)
EDGES = Work(
    "all edges",
    "for w in writers, r in readers",
    "for w in writers, r in head[LAYERS, *].{q, k, v} | mlp[LAYERS]",
    "edge w -> r",
    DIRECT_PATHS,
    (0, 1),
    quick=0.0,
)

WORKS = (RESID_PRE, HEAD_OUT, *HEAD_SITES, HEAD_BY_POSITION, PATTERN, PATH, EDGES)
"""In the order of the table of targets."""
