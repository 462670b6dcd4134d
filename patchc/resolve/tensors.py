"""Tensors that a value names: given from Python, or in a safetensors file, of which only the header is
read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchc.diagnostics import RULES, Span, nearest
from patchc.ir.experiment import TensorFrom
from patchc.parse import tree
from patchc.resolve.files import MISSING_FILE, open_checked
from patchc.resolve.scope import WRONG_KIND

UNKNOWN_TENSOR = RULES.add("unknown-tensor", "a tensor that was not given, or that its file does not hold")
BAD_TENSOR_FILE = RULES.add("bad-tensor-file", "a file that is not in the safetensors format")
TENSOR_SHAPE = RULES.add("tensor-shape", "a tensor whose shape does not fit where its value enters")

Shape = tuple[int, ...]

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""What the format allows, in bytes."""


@dataclass
class Tensors:
    """The tensors of a study: by key, shapes and where each came from, of those that were used."""

    given: Mapping[str, Sequence[int]]
    base: Path
    used: dict[str, TensorFrom] = field(default_factory=dict[str, TensorFrom])
    shapes: dict[str, Shape] = field(default_factory=dict[str, Shape])
    _headers: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])

    def named(self, node: tree.Function) -> str:
        """The key of the tensor that `tensor("name")` or `tensor("file", "key")` stands for."""
        texts = [a.text for a in node.arguments if isinstance(a, tree.Text)]
        if len(texts) != len(node.arguments) or len(texts) not in (1, 2):
            message = "tensor takes a safetensors file and a key, or the name of a tensor given in Python"
            raise WRONG_KIND.error(message, fix='as in `tensor("v.safetensors", "key")`', span=node.span)
        if len(texts) == 1:
            return self.from_python(texts[0], node.span)
        return self.from_file(texts[0], texts[1], node.span)

    def from_python(self, key: str, span: Span | None) -> str:
        """The key of a tensor that was given under that name."""
        if key not in self.given:
            known = f"the tensors given are {', '.join(self.given)}" if self.given else "no tensor was given"
            raise UNKNOWN_TENSOR.error(f"no tensor {key!r}: {known}", fix=nearest(key, self.given), span=span)
        return self._take(TensorFrom(key, key), self.given[key], span)

    def from_file(self, file: str, key: str, span: Span | None) -> str:
        """The key of a tensor of a safetensors file."""
        header = self._header(file, span)
        if key not in header:
            message = f"{file} has no tensor {key!r}; it has {', '.join(header) or 'none'}"
            raise UNKNOWN_TENSOR.error(message, fix=nearest(key, header), span=span)
        name = f"{file}#{key}"
        while name in self.given or self.used.get(name, found := TensorFrom(name, key, file)) != found:
            name += "'"  # `a#b` and `c` read like `a` and `b#c`
        return self._take(TensorFrom(name, key, file), header[key]["shape"], span)

    def _take(self, tensor: TensorFrom, shape: Sequence[int], span: Span | None) -> str:
        key = tensor.key
        if len(shape) not in (1, 3):
            message = (
                f"tensor {key!r} has shape {list(shape)}; a value has one axis, [d], or a row a token, [prompt, pos, d]"
            )
            raise TENSOR_SHAPE.error(message, span=span)
        self.used[key], self.shapes[key] = tensor, tuple(shape)
        return key

    def _header(self, file: str, span: Span | None) -> dict[str, Any]:
        if file not in self._headers:
            self._headers[file] = _read_header(self.base / file, file, span)
        return self._headers[file]


def _read_header(path: Path, name: str, span: Span | None) -> dict[str, Any]:
    open_checked(path, name, span, limit=None)  # only the header is read here
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(LENGTH_BYTES), "little")
            raw = file.read(size) if size <= MAX_HEADER else b""
    except OSError as error:
        raise MISSING_FILE.error(f"{name} cannot be read: {error.strerror}", span=span) from None
    try:
        found: dict[str, Any] = json.loads(raw)
        return {key: entry for key, entry in found.items() if key != "__metadata__" and _is_shape(entry["shape"])}
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        raise BAD_TENSOR_FILE.error(f"{name} is not a safetensors file", span=span) from None


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(isinstance(n, int) and n >= 0 for n in shape)
