"""Texts to token ids, by any tokenizer with the usual calls. Says which word it does not know.

What the texts are for is not its matter.
"""

from __future__ import annotations

import re
from typing import Any

from patchc.diagnostics import RULES, PatchcError, Span

UNKNOWN_TOKEN = RULES.add("unknown-token", "a text holds something that the model's tokenizer does not know")
NO_TOKENIZER = RULES.add("no-tokenizer", "the model has no tokenizer, so a text cannot become token ids")
NO_BOS = RULES.add("no-bos", "bos=true, and the tokenizer has no beginning-of-sequence token")

Ids = tuple[int, ...]


class Encoder:
    """A tokenizer and what the spec asks of it.

    A prompt is encoded as `tokenizer(text)` does by default, the special tokens that it adds included. A chat template
    is never applied, whether the tokenizer has one or not: a text that is a conversation is written out with its
    markers. `bos`: None for what the tokenizer does by default, True for its BOS token in front of the text, False for
    no special tokens. `model`: where the spec names the model, for what is wrong with its tokenizer.
    """

    def __init__(self, tokenizer: Any, bos: bool | None = None, model: Span | None = None):
        self._tokenizer = tokenizer
        self._bos = bos
        self._model = model
        self._known: dict[tuple[str, bool], Ids] = {}
        self._shown: dict[int, str] = {}

    @property
    def bos(self) -> int | None:
        """The id of the beginning-of-sequence token, where there is one."""
        found = getattr(self._tokenizer, "bos_token_id", None)
        return None if found is None else int(found)

    def prompt(self, text: str, span: Span | None) -> Ids:
        """The ids of a whole text, special tokens included as the model's tokenizer adds them."""
        if self._bos is None:
            return self._ids(text, True, span)
        if not self._bos:
            return self._ids(text, False, span)
        if self.bos is None:
            message = "bos=true, but the model's tokenizer has no beginning-of-sequence token"
            raise NO_BOS.error(message, fix="leave `bos` out, or write `bos=false`", span=self._model)
        return (self.bos, *self._ids(text, False, span))

    def n_leading(self, text: str) -> int:
        """How many special tokens stand before a text's own; 0 where they cannot be told apart."""
        try:
            whole, own = self.prompt(text, None), self.piece(text, None)
        except PatchcError:
            return 0
        return next((k for k in range(len(whole)) if whole[k : k + len(own)] == own), 0)

    def piece(self, text: str, span: Span | None) -> Ids:
        """The ids of a piece of text, no special tokens."""
        return self._ids(text, False, span)

    def piece_or_none(self, text: str) -> Ids | None:
        """The ids of a piece of text, or None where the tokenizer does not know it."""
        try:
            return self._ids(text, False, None)
        except PatchcError:
            return None

    def show(self, token: int) -> str:
        """A token as text."""
        if token not in self._shown:
            self._shown[token] = str(token) if self._tokenizer is None else str(self._tokenizer.decode([token]))
        return self._shown[token]

    def written(self, ids: Ids) -> str:
        """Several tokens as text."""
        return " ".join(map(str, ids)) if self._tokenizer is None else str(self._tokenizer.decode(list(ids)))

    def listed(self, ids: Ids) -> str:
        """Several tokens one by one, for a message: `"When", " Mary"`."""
        return ", ".join(f'"{self.show(i)}"' for i in ids)

    def _ids(self, text: str, special: bool, span: Span | None) -> Ids:
        key = (text, special)
        if key not in self._known:
            self._known[key] = self._encode(text, special, span)
        return self._known[key]

    def _encode(self, text: str, special: bool, span: Span | None) -> Ids:
        if self._tokenizer is None:
            fix = "give it one, `patchc.load(module, tokenizer=...)`, or write token ids into the data"
            raise NO_TOKENIZER.error("the model has no tokenizer to read texts", fix=fix, span=self._model)
        ids = self._call(text, special)
        if ids is not None and not self._has_unknown(text):
            return ids
        words = [w for w in re.findall(r"\s*\S+", text) if self._call(w, False) is None or self._has_unknown(w)]
        what = f"{words[0]!r} in {text!r}" if words and words[0] != text else repr(text)
        raise UNKNOWN_TOKEN.error(f"the model's tokenizer does not know {what}", span=span)

    def _call(self, text: str, special: bool) -> Ids | None:
        try:
            found = self._tokenizer(text) if special else self._tokenizer(text, add_special_tokens=False)
        except Exception:  # tokenizers raise a bare Exception for a word that is not in their vocabulary
            return None
        return tuple(int(i) for i in found["input_ids"])

    def _has_unknown(self, text: str) -> bool:
        """Whether the text becomes an unknown token that is not itself written in it."""
        unknown = getattr(self._tokenizer, "unk_token_id", None)
        if unknown is None or unknown not in (self._call(text, False) or ()):
            return False
        return str(getattr(self._tokenizer, "unk_token", "")) not in text
