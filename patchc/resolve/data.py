"""The data set of a spec, tokenised: worlds that align token by token, and the layout of their prompts.

Columns are read when something uses them, so that only a used column has to be there and to make sense.
Answers and positions, which are columns too, are for `answers` and `positions`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from typing import Any

from patchc.diagnostics import RULES, Note, PatchcError, Report, Severity, Span
from patchc.ir.bits import bitset
from patchc.ir.experiment import Prompts, World
from patchc.ir.graph import ResidualGraph
from patchc.ir.tokens import Layout, Tokens
from patchc.parse import tree
from patchc.resolve.encode import Encoder, Ids
from patchc.resolve.records import Record
from patchc.resolve.scope import WRONG_KIND, Scope

MISSING_COLUMN = RULES.add("missing-column", "a prompt lacks a column that the spec uses")
UNEQUAL_LENGTHS = RULES.add("unequal-lengths", "two worlds of one prompt have different numbers of tokens")
TEXT_TOO_LONG = RULES.add("text-too-long", "a text has more tokens than the model's context")
EMPTY_TEXT = RULES.add("empty-text", "a text has no tokens")
BAD_TOKEN_ID = RULES.add("bad-token-id", "a token id that the model's vocabulary does not have")
DOUBLE_BOS = RULES.add("double-bos", "a text begins with the token that the tokenizer adds", Severity.WARNING)
UNUSED_COLUMN = RULES.add("unused-column", "a column that nothing uses", Severity.WARNING)


def silent() -> PatchcError:
    """For a broken data set, which has been reported: stops the work on what needs it, and says nothing
    more."""
    return PatchcError(())


class Dataset:
    """The records of a spec and the worlds read from them so far.

    `runs` are the names of the worlds that experiments run on: the first of them that is a column fixes the
    lengths. `following` gives, for each copy of the prompts, the ids that follow each prompt there (see
    `continuations`); none at all where nothing follows any prompt.
    """

    def __init__(
        self,
        records: Sequence[Record],
        encoder: Encoder,
        graph: ResidualGraph,
        scope: Scope,
        runs: Collection[str],
    ):
        self.records = records
        self.encoder = encoder
        self.graph = graph
        self.scope = scope
        self.used: set[str] = set()
        self.following: Callable[[], tuple[tuple[Ids, ...], ...]] = tuple
        self._told: set[str] = set()
        self._runs = runs
        self._worlds: dict[str, tuple[Ids, ...] | None] = {}

    # ---- columns

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Every column, in the order in which the records have them."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.cells))

    @cached_property
    def likely_worlds(self) -> list[str]:
        """The columns to name where a world is needed: texts half as long as the longest, and more."""
        cells = self.records[0].cells if self.records else {}
        words = {name: len(cell.split()) for name, cell in cells.items() if isinstance(cell, str)}
        return [name for name, count in words.items() if 2 * count >= max(words.values())]

    @property
    def likely_answers(self) -> list[str]:
        """The columns to name where an answer is needed: every other one."""
        return [name for name in self.columns if name not in self.likely_worlds]

    def cell(self, prompt: int, column: str, span: Span | None) -> Any:
        """A prompt's entry in a column that the spec uses at `span`."""
        self.used.add(column)
        record = self.records[prompt]
        if column in record.cells:
            return record.cells[column]
        notes = [Note(f"{column!r} is used here", span)] if span else []
        message = f"prompt {prompt} has no column {column!r}; it has {', '.join(record.cells) or 'none'}"
        raise PatchcError([MISSING_COLUMN.at(record.where or span, message, notes=notes)])

    def check_unused(self, report: Report) -> None:
        """A warning for each column of a `data` block that nothing has used."""
        for column in self.columns:
            written = [r.spans[column] for r in self.records if column in r.spans]
            if written and column not in self.used:
                fix = f"remove it, or write `at {column} ...` if it is meant as a position"
                report.add(UNUSED_COLUMN.at(written[0], f"nothing uses the column {column!r}", fix=fix))

    def n_leading(self, prompt: int) -> int:
        """How many special tokens the tokenizer puts before a prompt's text."""
        text = self.records[prompt].cells.get(self.base)
        return self.encoder.n_leading(text) if isinstance(text, str) else 0

    # ---- worlds

    def world(self, name: tree.Name) -> str:
        """The name of a world, once its column is known to be there, to be text and to align with the
        others."""
        if not self.records:
            raise silent()
        if name.text not in self.columns:
            raise self.scope.not_a("a world (a text column)", name, self.likely_worlds or self.columns)
        self.ids(name.text, name.span)
        return name.text

    def ids(self, column: str, span: Span | None = None) -> tuple[Ids, ...]:
        """The token ids of a world, a prompt each. A world that is at fault is reported once."""
        if column not in self._worlds:
            self._worlds[column] = None
            ids = self._encoded(column, span)
            if column != self.base:
                self._check_aligned(column, ids)
            self._worlds[column] = ids
        found = self._worlds[column]
        if found is None:
            raise silent()
        return found

    def _encoded(self, column: str, span: Span | None) -> tuple[Ids, ...]:
        return tuple(self._read(prompt, column, span) for prompt in range(len(self.records)))

    def _read(self, prompt: int, column: str, span: Span | None) -> Ids:
        cell, where = self.cell(prompt, column, span), self.records[prompt].span(column) or span
        if isinstance(cell, str):
            ids = self.encoder.prompt(cell, where)
            self._warn_double_bos(ids, column, where)
        elif isinstance(cell, list | tuple) and all(_is_id(i) for i in cell):  # pyright: ignore[reportUnknownVariableType]
            ids = tuple(int(i) for i in cell)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
        else:
            told = shortened(cell)
            raise WRONG_KIND.error(f"{column!r} is used as a world, and prompt {prompt} has {told} there", span=where)
        self._check_ids(ids, column, prompt, where)
        return ids

    def _warn_double_bos(self, ids: Ids, column: str, where: Span | None) -> None:
        bos = self.encoder.bos
        if bos is not None and ids[:2] == (bos, bos) and column not in self._told:
            self._told.add(column)
            shown = self.encoder.show(bos)
            message = f"{column!r} begins with {shown!r}, and the tokenizer puts another before it"
            self.scope.report.add(DOUBLE_BOS.at(where, message, fix=f"leave {shown} out, or write `bos=false`"))

    def _check_ids(self, ids: Ids, column: str, prompt: int, where: Span | None) -> None:
        limit = self.graph.n_ctx
        if not ids:
            raise EMPTY_TEXT.error(f"{column!r} of prompt {prompt} has no tokens", span=where)
        if limit and len(ids) > limit:
            message = f"{column!r} of prompt {prompt} has {len(ids)} tokens; the model's context is {limit}"
            raise TEXT_TOO_LONG.error(message, span=where)
        self.check_vocabulary(ids, where)

    def check_vocabulary(self, ids: Ids, where: Span | None) -> None:
        """Every id is one of the model's."""
        for i in ids:
            if not 0 <= i < self.graph.d_vocab:
                message = f"token id {i} is outside the model's vocabulary of {self.graph.d_vocab}"
                raise BAD_TOKEN_ID.error(message, span=where)

    def _check_aligned(self, column: str, ids: tuple[Ids, ...]) -> None:
        base = self.ids(self.base)
        wrong = [i for i, (a, b) in enumerate(zip(base, ids, strict=True)) if len(a) != len(b)]
        if not wrong:
            return
        i = wrong[0]
        listed = self.encoder.listed
        others = f" (and {len(wrong) - 1} more prompts)" if len(wrong) > 1 else ""
        message = (
            f"worlds align token by token: in prompt {i}, {self.base!r} has {len(base[i])} tokens "
            f"and {column!r} has {len(ids[i])}{others}"
        )
        notes = [
            Note(f"{self.base}: {listed(base[i])}", self.records[i].spans.get(self.base)),
            Note(f"{column}: {listed(ids[i])}", self.records[i].spans.get(column)),
        ]
        raise PatchcError([UNEQUAL_LENGTHS.at(self.records[i].span(column), message, notes=notes)])

    # ---- the layout

    @cached_property
    def base(self) -> str:
        """The column whose lengths the layout has: the first, in the data's order, that an experiment runs
        on."""
        return next((c for c in self.columns if c in self._runs), self.columns[0] if self.columns else "")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the prompts, without an answer that follows them. Positions count in these."""
        if not self.base:
            raise silent()
        return tuple(map(len, self.ids(self.base)))

    @cached_property
    def endings(self) -> tuple[tuple[Ids, ...], ...]:
        """What follows each prompt in each copy of the prompts: at least one copy."""
        return self.following() or (((),) * len(self.lengths),)

    @cached_property
    def layout(self) -> Layout:
        """The rows that are run: every prompt of the first copy, then of the next. Row = copy * prompts + prompt."""
        return Layout(tuple(n + len(e) for ending in self.endings for n, e in zip(self.lengths, ending, strict=True)))

    def token(self, prompt: int, position: int, copy: int = 0) -> int:
        """The number of the token at a position (from 0) of a prompt."""
        return self.layout.offsets[copy * len(self.lengths) + prompt] + position

    def tokens(self, spots: Sequence[Sequence[int]]) -> Tokens:
        """The tokens at these positions of each prompt, in every copy."""
        copies = range(len(self.endings))
        return bitset(self.token(i, p, copy) for copy in copies for i, here in enumerate(spots) for p in here)

    @cached_property
    def text_column(self) -> str:
        """Where named positions are found: the first column whose texts align with the worlds."""
        return next((c for c in self.columns if c == self.base or self._aligns(c)), self.base)

    def _aligns(self, column: str) -> bool:
        used = column in self.used
        try:
            found = tuple(map(len, self._encoded(column, None))) == self.lengths
        except PatchcError:
            found = False
        if not used:
            self.used.discard(column)
        return found

    @property
    def text_ids(self) -> tuple[Ids, ...]:
        """The token ids in which named positions are found."""
        return self.ids(self.text_column)

    def same(self, a: str, b: str) -> list[bool]:
        """Per prompt: whether two worlds have the same tokens."""
        return [x == y for x, y in zip(self.ids(a), self.ids(b), strict=True)]

    def prompts(self) -> Prompts:
        """The worlds that were used, in the data's order, the text column first."""
        names = [
            self.text_column,
            *(c for c in self.columns if self._worlds.get(c) and c != self.text_column),
        ]
        show = self.encoder.show
        texts = tuple(tuple(show(i) for i in ids) for ids in self.ids(names[0]))
        worlds = tuple(World(name, self._rows(self.ids(name))) for name in names)
        own = self.lengths * len(self.endings)
        return Prompts(self.layout, worlds, texts, len(self.endings), () if own == self.layout.lengths else own)

    def _rows(self, prompts: tuple[Ids, ...]) -> tuple[Ids, ...]:
        return tuple(ids + e for ending in self.endings for ids, e in zip(prompts, ending, strict=True))


def shortened(cell: Any) -> str:
    """A cell as it would be written in Python, for a message."""
    try:
        text = repr(cell)
    except RecursionError:
        return "brackets nested too deep"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
