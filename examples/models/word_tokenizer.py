"""A tokenizer of whole words, each with the space before it, for the models trained in this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """One token a word, its leading space included; ids follow the order of `words`.

    There is no unknown token, so text with any other word (or a doubled space) raises on encoding."""
    if len(set(words)) != len(words):
        raise ValueError("a word stands twice in the vocabulary")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    # Every character lands in some piece, so nothing can be dropped without an error.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[^A-Za-z]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, clean_up_tokenization_spaces=False
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, and read them back."""
    tokenizer.save_pretrained(folder)
    again = PreTrainedTokenizerFast.from_pretrained(folder)
    for index in range(len(again)):
        text = again.decode([index])
        if again(text)["input_ids"] != [index]:
            raise AssertionError(f"token {index} ({text!r}) does not encode to itself")
