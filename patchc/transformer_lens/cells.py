"""From the rows of a sweep's index to cells: which places each row sets, and to which value.

Rows of a known setter set the clean run's own value, or a cache's tensor row by row; any other setter is called, and
what it changed is what is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from patchc.ir.experiment import FromWorld, Given, Patch, Value
from patchc.ir.graph import ResidualGraph
from patchc.ir.paths import EVERYWHERE, Alt, Path, Seq, Star, Step
from patchc.ir.tokens import Tokens
from patchc.transformer_lens.activations import Activation, Shape
from patchc.transformer_lens.errors import BAD_SWEEP, SweepError, failure
from patchc.transformer_lens.runs import CLEAN, CORRUPTED, Runs
from patchc.transformer_lens.setters import Setter, known_setter

Index = Sequence[Any]
Place = tuple[int, Tokens, Tokens]
"""A member of an activation, the tokens at which it is set, and of entries those that are looked at."""


@dataclass
class Rows:
    """What some rows set: each one's patches, and the tensors that they name."""

    patches: list[tuple[Patch, ...]] = field(default_factory=list[tuple[Patch, ...]])
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    bytes: int = 0
    """What the tensors take."""

    def keep(self, key: str, tensor: Tensor) -> None:
        """Name a tensor."""
        self.tensors[key] = tensor
        self.bytes += tensor.numel() * tensor.element_size()


@dataclass
class Cells:
    """Makes the cells of one sweep. `hook` gives the hook's name for a layer."""

    runs: Runs
    setter: Setter
    hook: Callable[[Any], str]
    _activations: dict[Any, Activation] = field(default_factory=dict[Any, Activation])
    _corrupted: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        self.known = known_setter(self.setter)
        self.paths = NodePaths(self.runs.model.loaded.graph)

    def add(self, index: Index, rows: Rows) -> None:
        """The cell of one row."""
        x = self._activation(index[0])
        placing = None if self.known is None else _PLACING.get((self.known, x.shape))
        places = None if placing is None else placing(x, index)
        clean = self.runs.clean(x) if places is not None else None
        if places is not None and self.runs.is_own(x):
            path = self.paths.of([x.step(*place) for place in places])
            rows.patches.append((Patch(path, Value(((1.0, FromWorld(CLEAN)),))),))
        elif places is not None and clean is not None and clean.shape == self._own(x).shape:
            rows.patches.append(tuple(self._given(x, clean, place, rows) for place in places))
        else:
            rows.patches.append(self._called(x, index, rows))

    def _activation(self, layer: Any) -> Activation:
        if layer not in self._activations:
            x = self._activations[layer] = self.runs.activation(self.hook(layer))
            self.runs.check_place(x)
        return self._activations[layer]

    def _own(self, x: Activation) -> Tensor:
        """The corrupted run's activation, in TransformerLens' shape."""
        if x.hook not in self._corrupted:
            if len(self._corrupted) > 1:  # a layer's: of a pattern its scores too
                self._corrupted.clear()
            self._corrupted[x.hook] = self.runs.own(x, CORRUPTED)
        return self._corrupted[x.hook]

    def _given(self, x: Activation, clean: Tensor, place: Place, rows: Rows) -> Patch:
        """A cache's own tensor at a place."""
        key = f"{x.hook}[{place[0]}]"
        if key not in rows.tensors:
            rows.keep(key, self._placed(x.of_member(clean, place[0])))
        return self._patch(x, place, key)

    def _patch(self, x: Activation, place: Place, key: str) -> Patch:
        if x.name == "result":
            x.refuse_post_norm()
        return Patch(self.paths.of([x.step(*place)]), Value(((1.0, Given(key)),)))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.runs.pieces.device, self.runs.pieces.dtype)

    # ---- any function
    def _called(self, x: Activation, index: Index, rows: Rows) -> tuple[Patch, ...]:
        """What a setter changes, row by row: a row that it touches is set as a whole, to what it made of it."""
        own = self._own(x)
        given = own.clone()
        with torch.no_grad():
            after = self._checked(x, own, self.setter(given, index, self.runs.clean(x)))
        x, changed = self._set_by(x, own, given, after), _unlike(after, own)
        if x.shape is Shape.ENTRIES:
            self._refuse_hidden(x, after, changed)
        out: list[Patch] = []
        for member in x.members():
            touched = x.of_member(changed, member).any(-1)
            if bool(touched.any()):
                key = f"{x.hook}[{member}] of row {len(rows.patches)}"
                rows.keep(key, x.of_member(after, member))
                out.append(self._patch(x, (member, x.tokens(touched), EVERYWHERE), key))
        return tuple(out)

    def _set_by(self, x: Activation, own: Tensor, given: Tensor, after: Tensor) -> Activation:
        """What a setter's tensor is set in: of a bridge's `resid_mid` what the MLP reads, unless it is the tensor that
        the setter was given and wrote into."""
        if x.name != "resid_mid" or not self.runs.mid_is_of_mlp or not bool(_unlike(after, given).any()):
            return x
        if not x.of_mlp and bool(_unlike(given, own).any()):
            message = f"the patch setter writes into {x.hook} and gives another tensor back: on a bridge without "
            message += "gradients the first is the stream, the second what the MLP reads of it"
            raise failure(SweepError, BAD_SWEEP, message, "write into the tensor and return it, or leave it as it is")
        return replace(x, of_mlp=True)

    def _checked(self, x: Activation, own: Tensor, after: Any) -> Tensor:
        if not isinstance(after, Tensor) or after.shape != own.shape:
            got = f"shape {list(after.shape)}" if isinstance(after, Tensor) else type(after).__name__
            message = f"the patch setter gave {got} for {x.hook}, which has shape {list(own.shape)}"
            raise failure(SweepError, BAD_SWEEP, message)
        return self._placed(after.detach())

    def _refuse_hidden(self, x: Activation, after: Tensor, changed: Tensor) -> None:
        """What the mask hides stays hidden: there nothing can be set but another very low score."""
        if x.name == "attn_scores":
            still = after <= torch.finfo(after.dtype).min / 2
            hidden = self._own(x).isneginf() & ~still
        else:
            scores = self.runs.activation(x.hook.replace("hook_pattern", "hook_attn_scores"))
            hidden = self._own(scores).isneginf() & (after != 0)
        if bool((changed & hidden).any()):
            message = f"the patch setter lets {x.hook} look where the model's mask lets nothing look"
            raise failure(SweepError, BAD_SWEEP, message)


def _unlike(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ."""
    return (a != b) & ~(a.isnan() & b.isnan())


@dataclass
class NodePaths:
    """Paths from starts through any nodes to the logits. Equal steps are one object, which the compiler looks up."""

    graph: ResidualGraph
    _steps: dict[Step, Step] = field(default_factory=dict[Step, Step])

    @cached_property
    def rest(self) -> Path:
        return Star(self.step(Step(self.graph.all)))

    @cached_property
    def end(self) -> Path:
        return self.step(Step(self.graph.logits_set))

    def step(self, step: Step) -> Step:
        return self._steps.setdefault(step, step)

    def of(self, starts: Sequence[Step]) -> Path:
        """Everything that starts at one of these."""
        steps = [self.step(s) for s in starts]
        return Seq((steps[0] if len(steps) == 1 else Alt(tuple(steps)), self.rest, self.end))

    def edge(self, start: Step, reader: Step) -> Path:
        """Everything that starts at one node and enters another next."""
        return Seq((self.step(start), self.step(reader), self.rest, self.end))


# ---- what the known setters set


def _layer_pos(x: Activation, index: Index) -> list[Place] | None:
    """One position, of every head where there are heads."""
    at = _numbers(index, x.n_pos)
    return None if at is None else [(m, x.at(at[0]), EVERYWHERE) for m in x.members()]


def _layer_pos_head(x: Activation, index: Index) -> list[Place] | None:
    at = _numbers(index, x.n_pos, x.n_members)
    return None if at is None else [(at[1], x.at(at[0]), EVERYWHERE)]


def _layer_head(x: Activation, index: Index) -> list[Place] | None:
    at = _numbers(index, x.n_members)
    return None if at is None else [(at[0], EVERYWHERE, EVERYWHERE)]


def _layer_head_dest(x: Activation, index: Index) -> list[Place] | None:
    at = _numbers(index, x.n_members, x.n_pos)
    return None if at is None else [(at[0], x.at(at[1]), EVERYWHERE)]


def _layer_head_dest_src(x: Activation, index: Index) -> list[Place] | None:
    at = _numbers(index, x.n_members, x.n_pos, x.n_pos)
    return None if at is None else [(at[0], x.at(at[1]), x.at(at[2]))]


Placing = Callable[[Activation, Index], "list[Place] | None"]
_PLACING: Mapping[tuple[str, Shape], Placing] = {
    ("layer_pos_patch_setter", Shape.ROWS): _layer_pos,
    ("layer_pos_patch_setter", Shape.HEADS): _layer_pos,
    ("layer_pos_head_vector_patch_setter", Shape.HEADS): _layer_pos_head,
    ("layer_head_vector_patch_setter", Shape.HEADS): _layer_head,
    ("layer_head_pattern_patch_setter", Shape.ENTRIES): _layer_head,
    ("layer_head_pos_pattern_patch_setter", Shape.ENTRIES): _layer_head_dest,
    ("layer_head_dest_src_pos_pattern_patch_setter", Shape.ENTRIES): _layer_head_dest_src,
}


def _numbers(index: Index, *sizes: int) -> tuple[int, ...] | None:
    """What follows the layer, counted from 0; None where it is none of that many numbers in their ranges."""
    rest = index[1:]
    if len(rest) != len(sizes) or not all(isinstance(i, int) for i in rest):
        return None
    if not all(-n <= i < n for i, n in zip(rest, sizes, strict=True)):
        return None
    return tuple(i % n for i, n in zip(rest, sizes, strict=True))
