"""Answer tokens: what `logit(answer)` and the like read. Each text is one token, as written.

Explains a text that becomes several tokens or another text, which is most often a missing space.
"""

from __future__ import annotations

from typing import Any

from patchc.diagnostics import RULES, Severity, Span
from patchc.parse import tree
from patchc.resolve.data import Dataset, silent
from patchc.resolve.encode import Ids
from patchc.resolve.scope import WRONG_KIND

MULTI_TOKEN_ANSWER = RULES.add("multi-token-answer", "an answer has several tokens, and a metric reads one")
ANSWER_NOT_AS_WRITTEN = RULES.add("answer-not-as-written", "the tokenizer turns an answer into another text")
MISSING_LEADING_SPACE = RULES.add(
    "missing-leading-space", "an answer in the middle of a text lacks its leading space", Severity.WARNING
)

Answers = tuple[Ids, ...]
"""Per prompt, the ids of the answer tokens (several: an answer set)."""


class AnswerReader:
    """Answers of a data set, by column or by literal text. `first`: the first token of each, however many
    there are."""

    def __init__(self, dataset: Dataset):
        self._data = dataset
        self._encoder = dataset.encoder

    def column(self, name: tree.Name, first: bool = False) -> Answers:
        """The answers in a column."""
        data = self._data
        if not data.records:
            raise silent()
        if name.text not in data.columns:
            raise data.scope.not_a("an answer (a column of the data)", name, data.columns)
        answers: list[Ids] = []
        for prompt in range(len(data.records)):
            cell = data.cell(prompt, name.text, name.span)
            where = data.records[prompt].span(name.text) or name.span
            answers.append(self._cell(cell, prompt, name.text, where, first))
        return tuple(answers)

    def literal(self, text: str, span: Span | None, first: bool = False) -> Answers:
        """One token, the same for every prompt."""
        if not self._data.records:
            raise silent()
        return ((self._token(text, None, span, first),),) * len(self._data.records)

    def _cell(self, cell: Any, prompt: int, name: str, where: Span | None, first: bool) -> Ids:
        items: list[Any] = list(cell) if isinstance(cell, list | tuple) else [cell]  # pyright: ignore[reportUnknownArgumentType]
        found: list[int] = []
        for item in items:
            if isinstance(item, str):
                found.append(self._token(item, prompt, where, first))
            elif isinstance(item, int) and not isinstance(item, bool):
                self._data.check_vocabulary((item,), where)
                found.append(item)
            else:
                raise WRONG_KIND.error(f"{name!r} is used as an answer, and prompt {prompt} has {cell!r}", span=where)
        if not found:
            raise WRONG_KIND.error(f"{name!r} is used as an answer, and prompt {prompt} has an empty set", span=where)
        return tuple(dict.fromkeys(found))

    def _token(self, text: str, prompt: int | None, span: Span | None, first: bool) -> int:
        if not text:
            raise WRONG_KIND.error("an answer cannot be an empty text", span=span)
        spaced = self._encoder.piece_or_none(" " + text) if not text.startswith(" ") else None
        ids = self._encoder.piece_or_none(text)
        if ids is None or (len(ids) != 1 and not first):
            self._refuse(text, ids, spaced, span)
        assert ids is not None
        self._data.check_vocabulary(ids, span)
        self._check_written(text, ids, span)
        if spaced is not None and len(spaced) == 1 and spaced != ids and not self._ends_in_space(prompt):
            message = f'the answer "{text}" has no leading space, and the text does not end in one'
            self._data.scope.report.add(MISSING_LEADING_SPACE.at(span, message, fix=f'write `" {text}"`'))
        return ids[0]

    def _refuse(self, text: str, ids: Ids | None, spaced: Ids | None, span: Span | None) -> None:
        """Say why `text` is not one token."""
        fix = f'write `" {text}"`' if spaced is not None and len(spaced) == 1 else None
        if ids is None and fix is None:
            self._encoder.piece(text, span)  # raises, naming the unknown word
        if ids is None:
            message = f'the tokenizer does not know "{text}"; with its leading space it is one token'
            raise MULTI_TOKEN_ANSWER.error(message, fix=fix, span=span)
        message = f'the answer "{text}" is {len(ids)} tokens ({self._encoder.listed(ids)}), and a metric reads one'
        raise MULTI_TOKEN_ANSWER.error(message, fix=fix or "`first(...)` reads the first of them", span=span)

    def _check_written(self, text: str, ids: Ids, span: Span | None) -> None:
        written = self._encoder.written(ids)
        if written not in (text, text.lstrip(" ")):  # some tokenizers put the space into the token, unseen
            message = f'the tokenizer turns the answer "{text}" into "{written}"'
            raise ANSWER_NOT_AS_WRITTEN.error(message, fix=f'write `"{written}"`, if that is what you mean', span=span)

    def _ends_in_space(self, prompt: int | None) -> bool:
        """Whether a prompt's text (any prompt's) ends in white space; ids alone are taken not to warn."""
        data = self._data
        chosen = range(len(data.records)) if prompt is None else (prompt,)
        texts = [data.records[i].cells.get(data.text_column) for i in chosen]
        return any(not isinstance(t, str) or t != t.rstrip() for t in texts)
