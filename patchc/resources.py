"""The files that patchc brings along: its grammar, and the models that specs may name without a path.

A wheel carries them under `patchc/_data`; a checkout, and an editable install of one, has them at its top
level.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_GRAMMARS = (_PACKAGE / "_data" / "grammar", _PACKAGE.parent / "grammar")
_MODELS = (_PACKAGE / "_data" / "models", _PACKAGE.parent / "examples" / "models")


def grammar_text() -> str:
    """The language's grammar, as lark reads it."""
    for folder in _GRAMMARS:
        path = folder / "patchc.lark"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise FileNotFoundError(f"patchc.lark is neither in {_GRAMMARS[0]} nor in {_GRAMMARS[1]}")


def builtin_models() -> tuple[str, ...]:
    """The names of the models that come with patchc, sorted."""
    return tuple(sorted(_model_folders()))


def builtin_model(name: str) -> Path | None:
    """The folder of the model called `name`, or None where patchc has none of that name."""
    return _model_folders().get(name)


def _model_folders() -> dict[str, Path]:
    # Listed and then looked up, never joined to a path: a name such as "../x" reaches nothing.
    for models in _MODELS:
        if models.is_dir():
            return {f.name: f for f in models.iterdir() if (f / "config.json").is_file()}
    return {}
