"""The patch setters: each puts a part of the clean activation into the corrupted one, in place, and gives it back.

`generic_activation_patch` knows these, and TransformerLens' own of the same names, by identity and sets what they set
without calling them. Shapes are TransformerLens': `[batch, pos, ...]`, of attention `[batch, head, dest, src]`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from torch import Tensor

Setter = Callable[[Tensor, Sequence[int], Tensor], Tensor]


def layer_pos_patch_setter(corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor) -> Tensor:
    """One position, `index` = [layer, pos], of an activation `[batch, pos, ...]`."""
    _, pos = _of_length(index, 2)
    corrupted_activation[:, pos] = clean_activation[:, pos]
    return corrupted_activation


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """One head at one position, `index` = [layer, pos, head], of an activation `[batch, pos, head, d]`."""
    _, pos, head = _of_length(index, 3)
    corrupted_activation[:, pos, head] = clean_activation[:, pos, head]
    return corrupted_activation


def layer_head_vector_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """One head at every position, `index` = [layer, head], of an activation `[batch, pos, head, d]`."""
    _, head = _of_length(index, 2)
    corrupted_activation[:, :, head] = clean_activation[:, :, head]
    return corrupted_activation


def layer_head_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """One head's whole pattern or scores, `index` = [layer, head], `[batch, head, dest, src]`."""
    _, head = _of_length(index, 2)
    corrupted_activation[:, head] = clean_activation[:, head]
    return corrupted_activation


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """One row of one head's pattern or scores, `index` = [layer, head, dest]."""
    _, head, dest = _of_length(index, 3)
    corrupted_activation[:, head, dest] = clean_activation[:, head, dest]
    return corrupted_activation


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
) -> Tensor:
    """One entry of one head's pattern or scores, `index` = [layer, head, dest, src]."""
    _, head, dest, src = _of_length(index, 4)
    corrupted_activation[:, head, dest, src] = clean_activation[:, head, dest, src]
    return corrupted_activation


def _of_length(index: Sequence[int], length: int) -> Sequence[int]:
    assert len(index) == length, f"this setter takes an index of {length} numbers, not of {len(index)}"
    return index


SETTERS: dict[str, Setter] = {
    setter.__name__: setter
    for setter in (
        layer_pos_patch_setter,
        layer_pos_head_vector_patch_setter,
        layer_head_vector_patch_setter,
        layer_head_pattern_patch_setter,
        layer_head_pos_pattern_patch_setter,
        layer_head_dest_src_pos_pattern_patch_setter,
    )
}


def known_setter(setter: object) -> str | None:
    """The name of a setter of this module or of TransformerLens' own, None for any other function."""
    theirs = sys.modules.get("transformer_lens.patching")
    for name, ours in SETTERS.items():
        if setter is ours or (theirs is not None and setter is getattr(theirs, name, None)):
            return name
    return None
