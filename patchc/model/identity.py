"""What a module computes, as a short text, as far as its code and its settings go; its weights aside.

Two modules of equal identity and equal weights are traced to the same graph. A module whose code may be anything (a
class of the user's own, a function put in a library's place) has no identity.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from patchc.model.cache import digest

PACKAGES = ("torch", "transformers", "transformer_lens")
"""Libraries whose versions say what their code is."""
BESIDE = (
    "huggingface_hub",
    "safetensors",
    "accelerate",
    "packaging",
    "tqdm",
    "jaxtyping",
    "einops",
    "typing_extensions",
)
"""Packages whose functions those import, and compute nothing with."""
MEANT_ELSEWHERE = frozenset(
    """_name_or_path name_or_path _commit_hash training _is_hf_initialized generation_config
    _output_capturing_hooks_installed _weight_conversions""".split()
)
"""Attributes that say nothing of what a forward pass in eval mode computes."""
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, np.generic)


class _NotTellableError(Exception):
    """Something of which it cannot be said what it computes."""


def identity(model: nn.Module) -> str | None:
    """A hash of the classes and settings of a module and all its parts; None where they may compute anything.

    Every function of their classes, and of the files that these stand in, must be where its library put it.
    """
    parts = list(model.named_modules(remove_duplicate=False))
    try:
        _check_classes({base for kind in {type(part) for _, part in parts} for base in kind.__mro__[:-1]})
        _check_functions(v for space in (torch, nn.functional, Tensor) for v in list(vars(space).values()))
        teller = _Teller({id(part): name for name, part in reversed(parts)})
        return digest([[name, teller.part(part)] for name, part in parts])
    except (_NotTellableError, RecursionError):
        return None


# ---- code


def _check_classes(kinds: set[type]) -> None:
    """Classes with all their bases, and the files that they stand in, each once."""
    for kind in kinds:
        _check_class(kind)
    # torch's own files are large, and call nothing by hook
    for name in {kind.__module__ for kind in kinds if kind.__module__.split(".")[0] in PACKAGES[1:]}:
        _check_functions(_registered(sys.modules[name]))


def _check_class(kind: type) -> None:
    _check_functions(vars(kind).values())
    module = sys.modules.get(kind.__module__)
    if kind.__module__.split(".")[0] not in (*PACKAGES, "builtins", *sys.stdlib_module_names) or module is None:
        raise _NotTellableError(kind)
    if issubclass(kind, nn.Module) and vars(module).get(kind.__name__, kind) is not kind:
        raise _NotTellableError(kind)


def _registered(module: ModuleType) -> Iterator[Any]:
    """What a file's functions call by name: the functions it defines or imports, and those in its registries."""
    for value in list(vars(module).values()):
        yield value
        if isinstance(value, Mapping) and type(value).__module__.split(".")[0] in PACKAGES:
            yield from cast("Mapping[Any, Any]", value).values()


def _check_functions(values: Iterable[Any]) -> None:
    for value in values:
        for function in _within(value):
            if isinstance(function, FunctionType):
                known = _is_theirs(function)
            else:
                known = not callable(function) or isinstance(function, type) or _root(type(function)) in _known()
            if not known:
                raise _NotTellableError(function)


def _within(value: Any) -> Iterator[Any]:
    """A value, and what it calls where it is put around something: a property, a method, a decorated function."""
    yield value
    names = ("fget", "__func__", "func", "__wrapped__")
    if isinstance(value, property | staticmethod | classmethod | MethodType | partial | cached_property | FunctionType):
        for name in names:
            if (inside := getattr(value, name, None)) is not None:
                yield from _within(inside)


def _is_theirs(function: FunctionType) -> bool:
    """Whether a function is one of the libraries' or of Python's. `<` starts the names of code without a file: a
    library's, as `dataclass` writes it, or what somebody types."""
    file = function.__code__.co_filename
    if file.startswith("<"):
        return str(function.__globals__.get("__name__")).split(".")[0] in _known()
    return _is_their_file(file)


@cache
def _is_their_file(file: str) -> bool:
    stdlib = sysconfig.get_path("stdlib")
    return file.startswith(_folders()) or (file.startswith(stdlib) and "-packages" not in file)


@cache
def _known() -> frozenset[str]:
    """The packages whose code is what their versions say."""
    return frozenset({*PACKAGES, *BESIDE, "builtins", *sys.stdlib_module_names} - {"__main__"})


def _root(kind: type) -> str:
    return kind.__module__.split(".")[0]


def _folders() -> tuple[str, ...]:
    files = (sys.modules[name].__file__ for name in (*PACKAGES, *BESIDE) if name in sys.modules)
    return tuple(str(Path(file).parent) + os.sep for file in files if file is not None)


# ---- settings


@dataclass
class _Teller:
    """Turns settings into plain data. `parts` names the modules that may be referred to; an object of a library's that
    is met again is named by when it was met first."""

    parts: dict[int, str]
    met: dict[int, int] = field(default_factory=dict[int, int])

    def part(self, module: nn.Module) -> list[Any]:
        """The class of a module, and all that hangs on it but weights, hooks and other modules."""
        own = {k: v for k, v in vars(module).items() if k not in _torchs_own()}
        held = sorted([*module._parameters, *module._buffers])  # pyright: ignore[reportPrivateUsage]
        return [_qualified(type(module)), self.told(own), held]

    def told(self, value: Any) -> Any:
        match value:
            case _ if isinstance(value, PLAIN):
                return f"{type(value).__name__} {value!r}"
            case nn.Module() if id(value) in self.parts:
                return {"part": self.parts[id(value)]}
            case Tensor():
                raise _NotTellableError(value)  # no parameter or buffer: not among the weights
            case FunctionType() | BuiltinFunctionType() | type():
                return self._code(value)
            case partial():
                return {"partial": [self.told(value.func), self.told(value.args), self.told(value.keywords)]}
            case Mapping():
                items = cast("Mapping[Any, Any]", value).items()
                return {"map": [[self.told(k), self.told(v)] for k, v in items if k not in MEANT_ELSEWHERE]}
            case list() | tuple():
                return [self.told(v) for v in cast("list[Any]", value)]
            case set() | frozenset():
                return {"set": sorted(repr(self.told(v)) for v in cast("set[Any]", value))}
            case _:
                return self._object(value)

    def _code(self, value: Any) -> Any:
        _check_functions([value])
        if value.__module__.split(".")[0] not in PACKAGES or getattr(value, "__closure__", None):
            raise _NotTellableError(value)
        return {"code": _qualified(value)}

    def _object(self, value: Any) -> Any:
        """A library's own object: its class and its attributes. Configs are shared by many parts."""
        if type(value).__module__.split(".")[0] not in PACKAGES or not hasattr(value, "__dict__"):
            raise _NotTellableError(value)
        if id(value) in self.met:
            return {"met": self.met[id(value)]}
        self.met[id(value)] = len(self.met)
        return {"object": [_qualified(type(value)), self.told(vars(value))]}


def _qualified(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@cache
def _torchs_own() -> frozenset[str]:
    return frozenset(vars(nn.Module()))
