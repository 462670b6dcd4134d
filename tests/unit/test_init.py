"""`patchc init`: a spec for every model with a tokenizer, which is formatted and runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from patchc.diagnostics import Source
from patchc.parse import format_spec, parse, tree
from tests.models import gpt2, llama
from tests.unit.resolving import SMALL

if TYPE_CHECKING:
    from tests.unit.commands import Run

LETTERS = list("abcdefghijklmnopqrstuvwxyz")
WORDS = ["[UNK]", *(w for word in "red green blue cup of tea one two".split() for w in (word, " " + word))]
SENTENCE = ["The", " keys", " key", " to", " the", " old", " cabinet", " are", " is", "[UNK]"]


@pytest.fixture
def loaded_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`patchc ...`, a model that was loaded before not traced anew."""
    from patchc import api

    load, models = api.load_model, dict[str, Any]()

    def once(name: Any, **options: Any) -> Any:
        if name not in models:
            models[name] = load(name, **options)
        return models[name]

    monkeypatch.setattr(api, "load_model", once)
    return run


@dataclass(frozen=True)
class Model:
    """As much of a model as a starter spec needs."""

    tokenizer: Any | None
    graph: Any = SMALL
    bos: bool | None = None


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Gives every model a tokenizer, and loads none."""

    def describe(tokenizer: Any) -> None:
        monkeypatch.setattr("patchc.commands.init._described", lambda _: Model(tokenizer))

    return describe


def directory(module: Any, tokenizer: Any) -> str:
    """A model directory with a tokenizer."""
    module.save_pretrained("model")
    tokenizer.save_pretrained("model")
    return "model"


def tokenizer(words: Sequence[str], pieces: str = r" ?[A-Za-z]+|[^A-Za-z]", bos: bool = False) -> Any:
    """A token a word; `pieces` is what a word is. What is not in the vocabulary is `[UNK]`, where that is in it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*words, "<s>"] if bos else words
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    made.decoder = decoders.Fuse()
    if bos:
        made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", len(words) - 1)])
    special = {"bos_token": "<s>"} if bos else {}
    unknown = {"unk_token": "[UNK]"} if "[UNK]" in words else {}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special, **unknown, clean_up_tokenization_spaces=False)


def column(path: str, name: str) -> str:
    text = Path(path).read_text(encoding="utf-8")
    (data,) = [i for i in parse(Source(path, text)).items if isinstance(i, tree.Data)]
    (value,) = [f.value for f in data.fields if isinstance(f, tree.Column) and f.name.text == name]
    assert isinstance(value, tree.Text)
    return value.text


def runs(run: Run, path: str) -> None:
    """The spec is formatted, has no warnings, and gives numbers in every cell of both experiments."""
    text = Path(path).read_text(encoding="utf-8")
    assert format_spec(Source(path, text)) == text
    assert 20 <= len(text.splitlines()) <= 40
    ran = run("run", path, "--check", "--format", "json", "--quiet")
    assert (ran.exit, ran.err) == (0, "")
    assert list(ran.json["experiments"]) == ["heads", "direct"]
    assert Path(path).with_name(f"{Path(path).stem}.heads.png").exists()


@pytest.mark.parametrize(
    ("model", "answer"), [("ioi-tiny", " Mary"), ("induction-2l", " d"), ("weekday-1l", " Wednesday")]
)
def test_a_built_in_gets_what_it_was_trained_on(loaded_once: Run, model: str, answer: str) -> None:
    ran = loaded_once("init", model)
    assert (ran.exit, ran.out) == (0, "")
    assert f"patchc run {model}.patch" in ran.err
    assert column(f"{model}.patch", "answer") == answer
    runs(loaded_once, f"{model}.patch")


def test_words_of_a_vocabulary_that_has_no_known_prompt(loaded_once: Run) -> None:
    model = directory(gpt2(), tokenizer(WORDS))
    assert loaded_once("init", model).exit == 0
    assert column("model.patch", "clean").split() == ["red", "green", "red"]
    assert column("model.patch", "answer") == " green"
    runs(loaded_once, "model.patch")


def test_letters_without_spaces_and_a_bos_token(loaded_once: Run) -> None:
    model = directory(llama(), tokenizer(LETTERS, pieces=".", bos=True))
    assert loaded_once("init", model).exit == 0
    assert (column("model.patch", "clean"), column("model.patch", "answer")) == ("aba", "b")
    runs(loaded_once, "model.patch")


def test_the_first_known_prompt_that_fits_is_taken(run: Run, described: Callable[[Any], None]) -> None:
    described(tokenizer(SENTENCE))
    assert run("init", "model").exit == 0
    assert column("model.patch", "clean") == "The keys to the old cabinet"


def test_a_model_without_a_tokenizer(run: Run, described: Callable[[Any], None]) -> None:
    described(None)
    ran = run("init", "model")
    assert (ran.exit, ran.codes) == (1, ["no-tokenizer"])
    assert not Path("model.patch").exists()


def test_a_vocabulary_with_too_few_words(run: Run, described: Callable[[Any], None]) -> None:
    described(tokenizer(["[UNK]", "one", " one", "two", " two"]))
    ran = run("init", "model")
    assert (ran.exit, ran.codes) == (1, ["no-starter"])


def test_a_directory_is_named_from_where_the_spec_is(run: Run, described: Callable[[Any], None]) -> None:
    Path("models/small").mkdir(parents=True)
    Path("specs").mkdir()
    described(tokenizer(WORDS))
    assert run("init", "models/small", "specs/first.patch").exit == 0
    assert '\nmodel "../models/small"\n' in Path("specs/first.patch").read_text(encoding="utf-8")


def test_a_file_that_is_there_is_not_replaced(run: Run) -> None:
    Path("a.patch").write_text("mine")
    ran = run("init", "induction-2l", "a.patch")
    assert (ran.exit, ran.codes) == (1, ["file-exists"])
    assert Path("a.patch").read_text() == "mine"
    assert run("init", "induction-2l", "a.patch", "--force").exit == 0
    assert column("a.patch", "answer") == " d"


def test_stdout(run: Run) -> None:
    ran = run("init", "induction-2l", "-")
    assert (ran.exit, ran.err) == (0, "")
    assert format_spec(Source("-", ran.out)) == ran.out
    assert not [*Path().iterdir()]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["ioi-tny"], "model-not-found"), (["induction-2l", "no/a.patch"], "no-such-directory")]
)
def test_what_cannot_be_written(run: Run, arguments: list[str], code: str) -> None:
    ran = run("init", *arguments)
    assert (ran.exit, ran.codes) == (1, [code])
    assert not [*Path().iterdir()]
