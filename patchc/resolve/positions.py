"""Positions: named ones (an index, a range, where a text stands), and every place that `@` can be followed
by.

An offset counts from the end of what it is added to: `wrong first + 1` is the token after a name of any
length.
"""

from __future__ import annotations

from typing import Any

from patchc.diagnostics import RULES, PatchcError, Span
from patchc.ir.tokens import Tokens
from patchc.parse import tree
from patchc.resolve.bindings import NO_LOCALS, Binding, Env, Number, Place, Spots
from patchc.resolve.data import Dataset, shortened, silent
from patchc.resolve.data_files import Counted
from patchc.resolve.scope import WRONG_KIND, collecting

POSITION_OUTSIDE = RULES.add("position-outside", "a position that a prompt is too short for")
TEXT_NOT_FOUND = RULES.add("text-not-found", "the text that a position stands at is not in the prompt")
AMBIGUOUS_POSITION = RULES.add(
    "ambiguous-position", "the text that a position stands at is in the prompt several times"
)
MISSING_POSITION = RULES.add("missing-position", "a prompt lacks a named position that the spec uses")
EMPTY_RANGE = RULES.add("empty-range", "a range whose end stands before its start")
ONE_POSITION = RULES.add("one-position", "a metric at several positions of a prompt")
UNEQUAL_POSITIONS = RULES.add("unequal-positions", "a loop over positions of prompts of different lengths")

OnePrompt = tuple[int, ...]


class Positions:
    """The positions of a data set."""

    def __init__(self, dataset: Dataset):
        self._data = dataset
        self._named: dict[str, Spots | None] = {}
        self._open: list[str] = []

    def check_declared(self) -> None:
        """Look up every position that a `data` statement declares, so that each error is reported once."""
        for name in dict.fromkeys(name for record in self._data.records for name in record.positions):
            if all(name in record.positions for record in self._data.records):
                with collecting(self._data.scope.report):
                    self.named(name, None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the prompts."""
        return self._data.lengths

    def names(self) -> list[str]:
        """Every named position, columns that can be one included."""
        declared = (name for record in self._data.records for name in record.positions)
        numbers = (n for r in self._data.records for n in r.cells if not isinstance(r.as_position(n), str))
        return list(dict.fromkeys([*declared, *numbers]))

    def tokens(self, spots: Spots) -> Tokens:
        """The tokens at these positions."""
        return self._data.tokens(spots)

    # ---- one position a prompt, where a metric is read

    @property
    def last(self) -> tuple[int, ...]:
        """The last token of each prompt."""
        return tuple(self._data.token(i, n - 1) for i, n in enumerate(self.lengths))

    def one(self, place: tree.Place | tree.Element) -> tuple[int, ...]:
        """The token of each prompt that a place names: one, or `one-position`."""
        spots = self.place(place, NO_LOCALS)
        many = next((i for i, here in enumerate(spots) if len(here) > 1), None)
        if many is not None:
            message = f"a metric is read at one position; this is {len(spots[many])} in prompt {many}"
            raise ONE_POSITION.error(message, span=place.span)
        return tuple(self._data.token(i, here[0]) for i, here in enumerate(spots))

    # ---- places, as `@` has them

    def place(self, node: tree.Place | tree.Element, env: Env) -> Spots:
        """The positions that a place stands for, in every prompt."""
        match node:
            case tree.Braces():
                parts = [self.place(item, env) for item in node.items]
                return tuple(tuple(sorted({p for part in parts for p in part[i]})) for i in range(self._n))
            case tree.Range():
                return self._between(node, env)
            case tree.Offset():
                base = self._item(node.base, env)
                return tuple(self._shifted(i, here, node.by, node.span) for i, here in enumerate(base))
            case tree.Text():
                raise WRONG_KIND.error(
                    f'"{node.text}" is a text; name its position with `at` in the data', span=node.span
                )
            case _:
                return self._item(node, env)

    @property
    def _n(self) -> int:
        return len(self._data.lengths)

    def _item(self, node: tree.Name | tree.Number | tree.Parameter, env: Env) -> Spots:
        if isinstance(node, tree.Name):
            local = env.get(node.text)
            return self.named(node.text, node.span, node) if local is None else self._of_local(local, node)
        return self._index(self._data.scope.number(node), node.span)

    def _of_local(self, local: Binding, node: tree.Name) -> Spots:
        match local:
            case Place():
                return local.spots
            case Number(value, None | "position"):
                return self._index(value, node.span)
            case Number(_, unit):
                raise WRONG_KIND.error(f"{node.text!r} counts {unit}s, and a position is needed here", span=node.span)
            case _:
                raise WRONG_KIND.error(f"{node.text!r} does not range over positions", span=node.span)

    def _index(self, index: int | float, span: Span | None) -> Spots:
        if not isinstance(index, int):
            raise WRONG_KIND.error(f"a position is a whole number, not {index}", span=span)
        return tuple((self._inside(i, index, span),) for i in range(self._n))

    def _inside(self, prompt: int, index: int, span: Span | None) -> int:
        length = self._data.lengths[prompt]
        if -length <= index < length:
            return index % length
        message = f"no position {index} in prompt {prompt}: its {length} tokens are numbered 0..{length - 1}"
        raise POSITION_OUTSIDE.error(message, fix="the last position is `-1`", span=span)

    def _between(self, node: tree.Range, env: Env) -> Spots:
        lengths = self._data.lengths
        first = None if node.first is None else self.place(node.first, env)
        last = None if node.last is None else self.place(node.last, env)
        return tuple(
            _span_of(first[i][0] if first else 0, last[i][-1] if last else lengths[i] - 1, i, node.span)
            for i in range(self._n)
        )

    def _shifted(self, prompt: int, here: OnePrompt, by: int, span: Span | None) -> OnePrompt:
        """The token `by` after the last of `here` (before the first where negative); `here` itself where `by`
        is 0."""
        if not by:
            return here
        index = here[-1] + by if by > 0 else here[0] + by
        if index < 0:
            raise POSITION_OUTSIDE.error(
                f"position {here[0]} - {-by} is before the start of prompt {prompt}", span=span
            )
        return (self._inside(prompt, index, span),)

    # ---- named positions

    def named(self, name: str, span: Span | None, node: tree.Name | None = None) -> Spots:
        """A named position in every prompt. One that is at fault is reported once."""
        if not self._data.records:
            raise silent()
        if name not in self._named:
            self._check_known(name, node)
            self._named[name] = None
            self._open.append(name)
            try:
                self._named[name] = tuple(self._in_prompt(name, i, span) for i in range(self._n))
            finally:
                self._open.pop()
        found = self._named[name]
        if found is None:
            if name in self._open:
                chain = " -> ".join([*self._open[self._open.index(name) :], name])
                raise WRONG_KIND.error(f"the position {name!r} is defined by itself ({chain})", span=span)
            raise silent()
        return found

    def _check_known(self, name: str, node: tree.Name | None) -> None:
        known = name in self._data.columns or any(name in r.positions for r in self._data.records)
        if not known and node is not None:
            raise self._data.scope.not_a("a position", node, self.names())

    def _in_prompt(self, name: str, prompt: int, span: Span | None) -> OnePrompt:
        record = self._data.records[prompt]
        if (declared := record.positions.get(name)) is not None:
            return self._declared(declared, prompt)
        if name not in record.cells:
            message = f"prompt {prompt} has no position {name!r}"
            raise MISSING_POSITION.error(message, fix=f"add `at {name} ...` to its `data`", span=record.where or span)
        self._data.cell(prompt, name, span)
        return self._from_cell(record.as_position(name), name, prompt, record.span(name) or span)

    def _declared(self, declared: tree.Position, prompt: int) -> OnePrompt:
        where = declared.where
        if not isinstance(where, tree.Anchor):
            return self._declared_item(where, prompt)
        text = where.text.text if isinstance(where.text, tree.Text) else self._column_text(where.text, prompt)
        named = None if isinstance(where.text, tree.Text) else where.text.text
        return self._shifted(prompt, self._find(text, prompt, where.which, where.span, named), where.offset, where.span)

    def _declared_item(self, where: tree.Item | tree.Range, prompt: int) -> OnePrompt:
        match where:
            case tree.Range():
                lengths = self._data.lengths
                first = 0 if where.first is None else self._declared_item(where.first, prompt)[0]
                last = lengths[prompt] - 1 if where.last is None else self._declared_item(where.last, prompt)[-1]
                return _span_of(first, last, prompt, where.span)
            case tree.Offset():
                return self._shifted(prompt, self._declared_item(where.base, prompt), where.by, where.span)
            case tree.Name():
                return self.named(where.text, where.span, where)[prompt]
            case tree.Number() | tree.Parameter():
                index = self._data.scope.number(where)
                if not isinstance(index, int):
                    raise WRONG_KIND.error(f"a position is a whole number, not {index}", span=where.span)
                return (self._inside(prompt, index, where.span),)

    def _from_cell(self, cell: Any, name: str, prompt: int, span: Span | None) -> OnePrompt:
        """A position that a record gives itself: an index, [first, last], or a text that stands there
        once."""
        match cell:
            case bool():
                pass
            case int():
                return (self._inside(prompt, cell, span),)
            case Counted(index):
                before = self._data.n_leading(prompt) if index >= 0 else 0
                return (self._inside(prompt, index + before, span),)
            case [int() as first, int() as last]:
                ends = self._inside(prompt, first, span), self._inside(prompt, last, span)
                return _span_of(ends[0], ends[1], prompt, span)
            case str():
                return self._find(cell, prompt, None, span, name)
            case _:
                pass
        message = f"{name!r} is used as a position, and prompt {prompt} has {shortened(cell)}"
        raise WRONG_KIND.error(message, fix="give an index, `[first, last]`, or a text", span=span)

    def _column_text(self, column: tree.Name, prompt: int) -> str:
        if column.text not in self._data.columns:
            raise self._data.scope.not_a("a column", column, self._data.columns)
        cell = self._data.cell(prompt, column.text, column.span)
        if isinstance(cell, str):
            return cell
        raise WRONG_KIND.error(
            f"{column.text!r} of prompt {prompt} is {shortened(cell)}; one text can be looked for", span=column.span
        )

    # ---- where a text stands

    def _find(self, text: str, prompt: int, which: str | None, span: Span | None, named: str | None) -> OnePrompt:
        """The tokens of the first, the last or the only occurrence of a text in a prompt."""
        found = self._occurrences(text, prompt, named is not None)
        if not found:
            raise self._not_found(text, prompt, span)
        if which is None and len(found) > 1:
            message = f'"{text}" stands {len(found)} times in prompt {prompt}: say `first` or `last`'
            said = named or f'"{text}"'
            raise AMBIGUOUS_POSITION.error(message, fix=f"write `{said} last`, or `{said} first`", span=span)
        return found[-1] if which == "last" else found[0]

    def _occurrences(self, text: str, prompt: int, of_column: bool) -> list[OnePrompt]:
        """Every place whose tokens are the text's own. A column's text may open the prompt, without its
        space."""
        ids = self._data.text_ids[prompt]
        found = _places(self._data.encoder.piece_or_none(text) or (), ids)
        if of_column and text.startswith(" "):
            bare = _places(self._data.encoder.piece_or_none(text[1:]) or (), ids)
            found = [p for p in bare if self._opens(p, ids)] + found
        return found

    def _opens(self, place: OnePrompt, ids: tuple[int, ...]) -> bool:
        """Whether nothing but a BOS token stands before a place."""
        return place[0] == 0 or (place[0] == 1 and ids[0] == self._data.encoder.bos)

    def _not_found(self, text: str, prompt: int, span: Span | None) -> PatchcError:
        other = text[1:] if text.startswith(" ") else " " + text
        fix = f'did you mean `"{other}"`?' if self._occurrences(other, prompt, False) else None
        column = self._data.text_column
        listed = self._data.encoder.listed(self._data.text_ids[prompt])
        message = f'"{text}" is not among the tokens of {column!r} in prompt {prompt}: {listed}'
        return TEXT_NOT_FOUND.error(message, fix=fix, span=span)


def _places(piece: tuple[int, ...], ids: tuple[int, ...]) -> list[OnePrompt]:
    """Every run of `ids` that is `piece`."""
    n = len(piece)
    if not n:
        return []
    return [tuple(range(i, i + n)) for i in range(len(ids) - n + 1) if ids[i : i + n] == piece]


def _span_of(first: int, last: int, prompt: int, span: Span | None) -> OnePrompt:
    if first > last:
        message = f"this range is empty in prompt {prompt}: position {first} comes after position {last}"
        raise EMPTY_RANGE.error(message, span=span)
    return tuple(range(first, last + 1))
