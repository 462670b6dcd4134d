"""Logits of which only those are there that a Python metric reads.

A metric `logits[:, -1].gather(-1, answers)` needs one position and a few answers of `[prompt, pos, d_vocab]`:
`reads_of` finds out which, `held_logits` is a tensor that has these and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

A: Any = torch.ops.aten

MOVES = {
    A.alias.default, A.detach.default, A.expand.default, A.lift_fresh.default, A.permute.default, A.select.int,
    A.slice.Tensor, A.squeeze.dim, A.transpose.int, A.unsqueeze.default,
}  # fmt: skip
"""Operations that only say which rows are meant, as long as the last axis, the vocabulary, stays where it is."""
RESHAPES = {A.view.default, A._unsafe_view.default, A.reshape.default}

Metric = Callable[[Tensor], Any]


NOT_HELD = -1
"""The place of what is not there."""


class NotHeld(Exception):  # noqa: N818 (a signal: the metric reads on another run what it did not on the first)
    """A logit is read that is not there."""


class Table(Protocol):
    """Where logits come from: rows are numbers of tokens in prompt order, `prompt * length + pos`."""

    def rows(self, where: Tensor) -> Tensor:
        """Whole rows, `[*where, d_vocab]`."""
        ...

    def entries(self, where: Tensor, columns: Tensor) -> Tensor:
        """Single logits, shaped as `where` and `columns`, which are alike."""
        ...


@dataclass
class Recorder:
    """A table of zeros that notes what is read of it."""

    d_vocab: int
    dtype: torch.dtype
    read: set[int] = field(default_factory=set[int])
    columns: set[int] | None = field(default_factory=set[int])
    """None once a whole row is read."""

    def rows(self, where: Tensor) -> Tensor:
        self.read.update(where.reshape(-1).tolist())
        self.columns = None
        return torch.zeros(*where.shape, self.d_vocab, dtype=self.dtype, device=where.device)

    def entries(self, where: Tensor, columns: Tensor) -> Tensor:
        self.read.update(where.reshape(-1).tolist())
        if self.columns is not None:
            self.columns.update(columns.reshape(-1).tolist())
        return torch.zeros(columns.shape, dtype=self.dtype, device=columns.device)


@dataclass
class Seen:
    """What a metric got of a table, each tensor with its version then, and whether it asked for what is not there."""

    tensors: list[tuple[Tensor, int]] = field(default_factory=list[tuple[Tensor, int]])
    missed: bool = False

    def note(self, x: Tensor) -> Tensor:
        self.tensors.append((x, _version(x)))
        return x

    def miss(self) -> NotHeld:
        """To be raised; a metric may catch it."""
        self.missed = True
        return NotHeld()

    @property
    def is_faithful(self) -> bool:
        """Whether the metric had what it would have had of all logits: nothing was missed, and nothing written to."""
        return not self.missed and all(_version(x) == version for x, version in self.tensors)


def _version(x: Tensor) -> int:
    """How often a tensor has been written into; not known of those made under inference mode."""
    return 0 if x.is_inference() else x._version


@dataclass
class Held:
    """Logits `[row, column]` of some tokens (`place`: the row of each, or `NOT_HELD`) and token ids (`columns`
    likewise; None: all of them)."""

    logits: Tensor
    place: Tensor
    columns: Tensor | None

    def rows(self, where: Tensor) -> Tensor:
        if self.columns is not None:
            raise NotHeld
        return self.logits[_held(self.place, where)]

    def entries(self, where: Tensor, columns: Tensor) -> Tensor:
        found = columns if self.columns is None else _held(self.columns, columns)
        return self.logits[_held(self.place, where), found]


def _held(places: Tensor, wanted: Tensor) -> Tensor:
    found = places[wanted]
    if bool((found < 0).any()):
        raise NotHeld
    return found


class Logits(Tensor):
    """Logits `[*where, d_vocab]` that are looked up when something other than their place is asked for."""

    _table: Table
    _rows: Tensor
    _seen: Seen

    @staticmethod
    def __new__(
        cls: Any, table: Table, where: Tensor, d_vocab: int, dtype: torch.dtype, seen: Seen | None = None
    ) -> Logits:
        make: Any = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportPrivateUsage]
        out: Logits = make(cls, (*where.shape, d_vocab), dtype=dtype, device=where.device)
        out._table, out._rows, out._seen = table, where, seen or Seen()
        return out

    @property
    def seen(self) -> Seen:
        return self._seen

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Logits({list(self.shape)})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.is_mutable:
            raise next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Logits)).seen.miss()
        if args and isinstance(args[0], Logits):
            out = args[0]._moved(func, args[1:], kwargs or {})
            if out is not None:
                return out
        given: Any = tree_map_only(Logits, lambda x: x._looked_up(), (tuple(args), dict(kwargs or {})))
        return func(*given[0], **given[1])

    # ---- what can be said without looking anything up
    def _moved(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result where it is a matter of rows or of single logits; None otherwise."""
        last = self.dim() - 1
        if func is A._to_copy.default and set(kwargs) <= {"dtype"} and self._widens(kwargs.get("dtype")):
            return Logits(self._table, self._rows, self.shape[-1], kwargs.get("dtype") or self.dtype, self._seen)
        if func in RESHAPES and self._keeps_rows(args[0]):
            return self._at(self._rows.reshape(args[0][:-1]))
        if func is A.gather.default:
            return self._gathered(args[0], args[1])
        if func is A.index.Tensor:
            return self._indexed(list(args[0]))
        if func is A.index_select.default and args[0] % self.dim() != last:
            return self._at(self._rows.index_select(args[0] % self.dim(), args[1]))
        if func is A.select.int and args[0] % self.dim() == last:
            return self._entries(self._rows, torch.full(self._rows.shape, args[1], device=self.device))
        if func in MOVES and (where := self._where_after(func, args)) is not None:
            return self._at(where)
        return None

    def _widens(self, dtype: torch.dtype | None) -> bool:
        """Whether a cast to `dtype` loses nothing, so that it may come after the last look-up."""
        return dtype is None or torch.promote_types(self.dtype, dtype) == dtype

    def _keeps_rows(self, shape: Sequence[int]) -> bool:
        """Whether the vocabulary stays the last axis of a new shape."""
        return shape[-1] == self.shape[-1] or (shape[-1] == -1 and prod(shape[:-1]) == self._rows.numel())

    def _where_after(self, func: Any, args: Sequence[Any]) -> Tensor | None:
        """The rows after an operation on the axes before the last; None where it touches the last."""
        dim, last = self.dim(), self.dim() - 1
        match func:
            case A.alias.default | A.detach.default | A.lift_fresh.default:
                return self._rows
            case A.expand.default:
                return self._rows.expand(args[0][:-1]) if args[0][-1] in (-1, self.shape[-1]) else None
            case A.permute.default:
                order = [d % dim for d in args[0]]
                return self._rows.permute(order[:-1]) if order[-1] == last else None
            case A.slice.Tensor:
                return self._sliced(args)
            case A.transpose.int:
                one, other = (d % dim for d in args[:2])
                return self._rows.transpose(one, other) if last not in (one, other) else None
            case A.unsqueeze.default:
                at = args[0] % (dim + 1)
                return self._rows.unsqueeze(at) if at <= last else None
            case _:  # select, squeeze
                return func(self._rows, args[0] % dim, *args[1:]) if args[0] % dim != last else None

    def _sliced(self, args: Sequence[Any]) -> Tensor | None:
        axis, start, end, step = cast(
            "tuple[int, int | None, int | None, int]", (*args, *(0, None, None, 1)[len(args) :])
        )
        if axis % self.dim() != self.dim() - 1:
            return A.slice.Tensor(self._rows, axis % self.dim(), start, end, step)
        whole = start in (None, 0) and (end is None or end >= self.shape[-1]) and step == 1
        return self._rows if whole else None

    def _gathered(self, axis: int, index: Tensor) -> Tensor | None:
        if axis % self.dim() != self.dim() - 1 or index.dim() != self.dim():
            return None
        if bool((index < 0).any()):
            raise IndexError("gather takes no negative index")
        where = self._rows[tuple(slice(n) for n in index.shape[:-1])]
        return self._entries(where[..., None].expand(index.shape), index)

    def _indexed(self, index: list[Tensor | None]) -> Tensor | None:
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in index):
            return None
        index += [None] * (self.dim() - len(index))
        *before, columns = index
        if columns is None:
            return self._at(A.index.Tensor(self._rows, before)) if any(i is not None for i in before) else None
        if all(i is None for i in before):
            where = self._rows[(..., *[None] * columns.dim())]
            return self._entries(*torch.broadcast_tensors(where, columns))
        if any(i is None for i in before):
            return None
        *rows, columns = torch.broadcast_tensors(*before, columns)
        return self._entries(self._rows[tuple(rows)], columns)

    # ---- looking up
    def _at(self, where: Tensor) -> Logits:
        return Logits(self._table, where, self.shape[-1], self.dtype, self._seen)

    def _entries(self, where: Tensor, columns: Tensor) -> Tensor:
        size = self.shape[-1]
        if bool(((columns < -size) | (columns >= size)).any()):
            raise IndexError(f"a token id is out of bounds for a vocabulary of {size}")
        return self._found(lambda: self._table.entries(where, columns.remainder(size)))

    def _looked_up(self) -> Tensor:
        return self._found(lambda: self._table.rows(self._rows))

    def _found(self, look_up: Callable[[], Tensor]) -> Tensor:
        try:
            return self._seen.note(look_up().to(self.dtype))
        except NotHeld:
            raise self._seen.miss() from None


# ---- as metrics get them


@dataclass(frozen=True, slots=True)
class Reads:
    """What a metric reads: rows (`prompt * length + pos`), and token ids, None where it reads whole rows."""

    rows: tuple[int, ...]
    columns: tuple[int, ...] | None


def reads_of(
    metric: Metric, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device | None = None
) -> Reads | None:
    """What a metric reads of logits of this `shape`, `[prompt, pos, d_vocab]`; None where that cannot be told, because
    it fails on zeros, writes into them, or reads none."""
    *rows, d_vocab = shape
    table, where = Recorder(d_vocab, dtype), torch.arange(prod(rows), device=device).view(rows)
    try:
        with torch.inference_mode(False), torch.no_grad():
            result_of(metric, Logits(table, where, d_vocab, dtype))
    except Exception:
        return None
    if not table.read:
        return None
    return Reads(tuple(sorted(table.read)), None if table.columns is None else tuple(sorted(table.columns)))


def held_logits(logits: Tensor, place: Tensor, column_of: Mapping[int, int], d_vocab: int) -> Logits:
    """Logits `[row, column or d_vocab]` as `[*place, d_vocab]`: `place` has the row of each, or `NOT_HELD`; with
    `column_of` only those token ids are there."""
    columns = None
    if column_of:
        columns = torch.full((d_vocab,), NOT_HELD, device=logits.device)
        columns[list(column_of)] = torch.tensor(list(column_of.values()), device=logits.device)
    where = torch.arange(place.numel(), device=logits.device).view(place.shape)
    return Logits(Held(logits, place.reshape(-1), columns), where, d_vocab, logits.dtype)


def result_of(metric: Metric, logits: Tensor) -> Tensor:
    """What a metric gives. Raises `NotHeld` where it asked for logits that are not there, whatever it did then, or
    wrote into some: what it wrote would be lost."""
    out = torch.as_tensor(metric(logits))
    if isinstance(logits, Logits) and not logits.seen.is_faithful:
        raise NotHeld
    return out.clone() if isinstance(out, Logits) else out
