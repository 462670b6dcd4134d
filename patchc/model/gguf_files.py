"""Models in GGUF files, as transformers reads them: the config, the tokenizer, and the weights, dequantised.

For a file that is damaged, or of a kind that they do not read, transformers, gguf and tokenizers raise anything, plain
`Exception` too: so do these functions. What a file's header says is kept on disk (`cache`), as it takes seconds to
read; the dequantised weights are not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from patchc.model.cache import keep_entry, makers, read_entry

FORMAT = 1
KIND = "gguf"
Tell = Callable[[int, int], None]
"""Told how many of a file's tensors are read, and how many it has."""


def is_gguf(path: Path) -> bool:
    """Whether a model is one GGUF file, and no directory."""
    return path.suffix == ".gguf" and path.is_file()


def gguf_config(file: Path) -> dict[str, Any]:
    """The config that a file's header stands for, as plain data, `model_type` and all."""
    stat = file.stat()
    key = {"format": FORMAT, "file": str(file), "size": stat.st_size, "time": stat.st_mtime_ns, **makers()}
    found = read_entry(KIND, key)
    if found is not None:
        return found[0]
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config: dict[str, Any] = load_gguf_checkpoint(str(file), return_tensors=False)["config"]
    keep_entry(KIND, key, config)
    return config


def gguf_tokenizer(file: Path) -> Any:
    """The tokenizer in a file."""
    from transformers import PreTrainedTokenizerFast

    # By its class: `AutoTokenizer` would read the config once more to choose that.
    return PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)


def gguf_model(file: Path, config: dict[str, Any], tell: Tell, **options: Any) -> tuple[Any, dict[str, Any]]:
    """The module of a file, its weights dequantised, and what transformers says of their loading. `config`: as from
    `gguf_config`; `options`: of `from_pretrained`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with _readable(tell):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            config=AutoConfig.for_model(**config),
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    return loaded


@contextlib.contextmanager
def _readable(tell: Tell) -> Generator[None]:
    """transformers tells `tell` of its progress, and makes a model's map of names once, where it would for each of its
    modules: most of the time."""
    import gguf
    import transformers.modeling_gguf_pytorch_utils

    reading: Any = transformers.modeling_gguf_pytorch_utils

    def told(tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
        listed = list(tensors)
        for done, tensor in enumerate(listed):
            tell(done, len(listed))
            yield tensor
        tell(len(listed), len(listed))

    places: list[tuple[Any, str, Callable[[Any], Any]]] = [
        (gguf, "get_tensor_name_map", cache),
        (reading, "tqdm", lambda _: told),
    ]
    # Another version of either may lack one: then its progress is not told, or its map made each time.
    before = [(module, name, getattr(module, name)) for module, name, _ in places if hasattr(module, name)]
    for module, name, put in places:
        if hasattr(module, name):
            setattr(module, name, put(getattr(module, name)))
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
