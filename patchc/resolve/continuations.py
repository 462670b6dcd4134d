"""Answers of several tokens that `logprob` sums over: their tokens but the last are run after each prompt.

What follows the prompts settles the layout, so the spec's metrics are looked through before any of them is resolved.
Each different answer has a copy of the prompts to itself: an earlier token never sees it, attention being causal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

from patchc.diagnostics import PatchcError, Span
from patchc.ir.experiment import Continuation
from patchc.parse import tree
from patchc.resolve.answers import MULTI_TOKEN_ANSWER, AnswerReader, Sequences
from patchc.resolve.data import TEXT_TOO_LONG, Dataset
from patchc.resolve.scope import Scope

SUMMED = "logprob"
"""The one function that takes an answer of several tokens."""


class Continuations:
    """The answers of several tokens that a spec's metrics read."""

    def __init__(self, spec: tree.Spec, dataset: Dataset, answers: AnswerReader):
        self._spec = spec
        self._data = dataset
        self._answers = answers

    @cached_property
    def endings(self) -> tuple[Sequences, ...]:
        """For each copy of the prompts what follows each of them there; empty where no copy is needed."""
        found: dict[Sequences, None] = {}
        for node in _summed(self._spec, self._data.scope):
            try:
                if self._answers.is_several(node):
                    ending = _before_last(self._answers.sequences(node))
                    if self._too_long(ending) is None and self._data.graph.causal:
                        found[ending] = None
            except PatchcError:
                continue  # resolving the metric says why
        return tuple(found)

    def read(self, answers: Sequences, span: Span | None) -> Continuation:
        """The log-probability of such answers."""
        ending = _before_last(answers)
        self._check(ending, span)
        copy, lengths = self.endings.index(ending), self._data.lengths
        tokens = tuple(
            tuple(self._data.token(i, lengths[i] - 1 + k, copy) for k in range(len(ids)))
            for i, ids in enumerate(answers)
        )
        return Continuation(answers, tokens)

    def _check(self, ending: Sequences, span: Span | None) -> None:
        if not self._data.graph.causal:
            message = "this model looks ahead, so that an answer's tokens would change what stands before them"
            raise MULTI_TOKEN_ANSWER.error(message, fix="`first(...)` reads the first token", span=span)
        if (prompt := self._too_long(ending)) is not None:
            n = self._data.lengths[prompt] + len(ending[prompt])
            message = f"prompt {prompt} and its answer have {n} tokens; the model's context is {self._data.graph.n_ctx}"
            raise TEXT_TOO_LONG.error(message, span=span)

    def _too_long(self, ending: Sequences) -> int | None:
        limit = self._data.graph.n_ctx
        both = zip(self._data.lengths, ending, strict=True)
        return next((i for i, (n, e) in enumerate(both) if limit and n + len(e) > limit), None)


def _before_last(answers: Sequences) -> Sequences:
    return tuple(ids[:-1] for ids in answers)


def _summed(spec: tree.Spec, scope: Scope) -> Iterator[tree.Name | tree.Text]:
    """What each `logprob(...)` of the spec takes, where that is a column or a text."""
    for function in _functions(spec.items):
        match function.arguments:
            case (tree.Ref(name, (), ()),):
                yield name
            case (tree.Text() as text,):
                yield text
            case (tree.Parameter(name) as parameter,) if isinstance(scope.parameters.get(name), str):
                yield tree.Text(scope.text(parameter), span=parameter.span)
            case _:
                pass


def _functions(node: Any) -> Iterator[tree.Function]:
    """Every `logprob` with its arguments, and the bare name, in a part of the tree."""
    if isinstance(node, tree.Function) and node.name.text == SUMMED:
        yield node
    elif isinstance(node, tree.Ref) and node.name.text == SUMMED and not node.indices and not node.sites:
        yield tree.Function(node.name, (tree.Ref(tree.Name("answer", span=node.span)),))
    elif isinstance(node, tuple):
        for item in node:  # pyright: ignore[reportUnknownVariableType]
            yield from _functions(item)
    elif isinstance(node, tree.Construct) and is_dataclass(node):
        for f in fields(node):
            if f.name != "span":
                yield from _functions(getattr(node, f.name))
