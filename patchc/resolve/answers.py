"""Answer tokens: what `logit(answer)` and the like read. Each text is one token, as written; `logprob` takes an
answer of several.

Explains a text that becomes several tokens or another text, which is most often a missing space.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from patchc.diagnostics import RULES, Severity, Span, nearest
from patchc.parse import tree
from patchc.resolve.data import Dataset, shortened, silent
from patchc.resolve.encode import Ids
from patchc.resolve.scope import WRONG_KIND

MULTI_TOKEN_ANSWER = RULES.add("multi-token-answer", "an answer has several tokens, and a metric reads one")
ANSWER_NOT_AS_WRITTEN = RULES.add("answer-not-as-written", "the tokenizer turns an answer into another text")
MISSING_LEADING_SPACE = RULES.add(
    "missing-leading-space", "an answer in the middle of a text lacks its leading space", Severity.WARNING
)

Answers = tuple[Ids, ...]
"""Per prompt, the ids of the answer tokens (several: an answer set)."""
Sequences = tuple[Ids, ...]
"""Per prompt, the ids of one answer, one after another."""

WAYS_OUT = "logprob(...) sums over them, first(...) is the first of them"


class AnswerReader:
    """Answers of a data set, by column or by literal text. `first`: the first token of each, however many
    there are."""

    def __init__(self, dataset: Dataset):
        self._data = dataset
        self._encoder = dataset.encoder

    def column(self, name: tree.Name, first: bool = False) -> Answers:
        """The answers in a column."""
        return tuple(
            self._set(items, prompt, where, first) for prompt, (items, where) in enumerate(self._members(name))
        )

    def literal(self, text: str, span: Span | None, first: bool = False) -> Answers:
        """One token, the same for every prompt."""
        if not self._data.records:
            raise silent()
        return ((self._token(text, None, span, first),),) * len(self._data.records)

    def _members(self, name: tree.Name) -> Iterator[tuple[list[str | int], Span | None]]:
        """Each prompt's answers in a column, texts and token ids, and where they stand."""
        data = self._data
        if not data.records:
            raise silent()
        if name.text not in data.columns:
            known = data.likely_answers or data.columns
            meant = None if nearest(name.text, data.columns) else f'a token is written as a text: `" {name.text}"`'
            raise data.scope.not_a("an answer (a column of the data)", name, known, meant)
        for prompt in range(len(data.records)):
            cell = data.cell(prompt, name.text, name.span)
            where = data.records[prompt].span(name.text) or name.span
            items: list[Any] = list(cell) if isinstance(cell, list | tuple) else [cell]  # pyright: ignore[reportUnknownArgumentType]
            told = f"{name.text!r} is used as an answer, and prompt {prompt} has"
            if not items:
                raise WRONG_KIND.error(f"{told} an empty set", span=where)
            if not all(isinstance(i, str | int) and not isinstance(i, bool) for i in items):
                raise WRONG_KIND.error(f"{told} {shortened(cell)}", span=where)
            yield items, where

    def _set(self, items: list[str | int], prompt: int, where: Span | None, first: bool) -> Ids:
        return tuple(dict.fromkeys(self._one(item, prompt, where, first) for item in items))

    def _one(self, item: str | int, prompt: int, where: Span | None, first: bool) -> int:
        if isinstance(item, str):
            return self._token(item, prompt, where, first)
        self._data.check_vocabulary((item,), where)
        return item

    def _token(self, text: str, prompt: int | None, span: Span | None, first: bool) -> int:
        spaced, ids = self._spaced(text), self._encoder.piece_or_none(text)
        if not text:
            raise WRONG_KIND.error("an answer cannot be an empty text", span=span)
        if ids is None or (len(ids) != 1 and not first):
            self._refuse(text, ids, spaced, span)
        assert ids is not None
        self._check(text, ids, span)
        if spaced is not None and len(spaced) == 1 and spaced != ids:
            self._warn_space(text, prompt, span)
        return ids[0]

    def _spaced(self, text: str) -> Ids | None:
        """The ids with the leading space that a text may lack."""
        return self._encoder.piece_or_none(" " + text) if not text.startswith(" ") else None

    def _refuse(self, text: str, ids: Ids | None, spaced: Ids | None, span: Span | None) -> None:
        """Say why `text` is not one token."""
        fix = f'write `" {text}"`' if spaced is not None and len(spaced) == 1 else None
        if ids is None and fix is None:
            self._encoder.piece(text, span)  # raises, naming the unknown word
        if ids is None:
            message = f'the tokenizer does not know "{text}"; with its leading space it is one token'
            raise MULTI_TOKEN_ANSWER.error(message, fix=fix, span=span)
        message = f'the answer "{text}" is {len(ids)} tokens ({self._encoder.listed(ids)}), and a metric reads one'
        raise MULTI_TOKEN_ANSWER.error(message, fix=fix or WAYS_OUT, span=span)

    # ---- what is read as it is written

    def _check(self, text: str, ids: Ids, span: Span | None) -> None:
        self._data.check_vocabulary(ids, span)
        written = self._encoder.written(ids)
        if written not in (text, text.lstrip(" ")):  # some tokenizers put the space into the token, unseen
            message = f'the tokenizer turns the answer "{text}" into "{written}"'
            raise ANSWER_NOT_AS_WRITTEN.error(message, fix=f'write `"{written}"`, if that is what you mean', span=span)

    def _warn_space(self, text: str, prompt: int | None, span: Span | None) -> None:
        if not self._ends_in_space(prompt):
            message = f'the answer "{text}" has no leading space, and the text does not end in one'
            self._data.scope.report.add(MISSING_LEADING_SPACE.at(span, message, fix=f'write `" {text}"`'))

    def _ends_in_space(self, prompt: int | None) -> bool:
        """Whether a prompt's text (any prompt's) ends in white space; ids alone are taken not to warn."""
        data = self._data
        chosen = range(len(data.records)) if prompt is None else (prompt,)
        texts = [data.records[i].cells.get(data.text_column) for i in chosen]
        return any(not isinstance(t, str) or t != t.rstrip() for t in texts)

    # ---- answers of several tokens

    def is_several(self, node: tree.Name | tree.Text) -> bool:
        """Whether an answer has several tokens in some prompt; False where it cannot be read, which reading it
        explains."""
        return any(len(self._ids(item)) > 1 for items, _ in self._all(node) for item in items)

    def sequences(self, node: tree.Name | tree.Text) -> Sequences:
        """One answer a prompt, with all of its tokens. Raises for a set."""
        return tuple(self._sequence(items, prompt, where) for prompt, (items, where) in enumerate(self._all(node)))

    def _all(self, node: tree.Name | tree.Text) -> list[tuple[list[str | int], Span | None]]:
        if isinstance(node, tree.Name):
            return list(self._members(node))
        return [([node.text], node.span)] * len(self._data.records)

    def _ids(self, item: str | int) -> Ids:
        return (item,) if isinstance(item, int) else self._encoder.piece_or_none(item) or ()

    def _sequence(self, items: list[str | int], prompt: int, where: Span | None) -> Ids:
        if len(items) > 1:
            several = next((f'"{i}"' for i in items if len(self._ids(i)) > 1), "another prompt's answer")
            message = f"prompt {prompt} has a set of answers, and {several} is several tokens"
            fix = "logprob of one answer a prompt, or first(...) for the first token of each"
            raise MULTI_TOKEN_ANSWER.error(message, fix=fix, span=where)
        item = items[0]
        if isinstance(item, int):
            return (self._one(item, prompt, where, False),)
        if not item:
            raise WRONG_KIND.error("an answer cannot be an empty text", span=where)
        ids, spaced = self._encoder.piece(item, where), self._spaced(item)
        self._check(item, ids, where)
        if spaced is not None and len(spaced) <= len(ids) and spaced != ids:
            self._warn_space(item, prompt, where)
        return ids
