"""What is wrong with a call, as diagnostics that are also the exceptions that TransformerLens raises for it."""

from __future__ import annotations

from typing import TypeVar

from patchc.diagnostics import RULES, PatchcError, Rule

BAD_SWEEP = RULES.add("sweep-arguments", "a sweep function was called with arguments that do not go together")
NO_ACTIVATION = RULES.add("unknown-activation", "a sweep of an activation that no patch can set, or that is not there")
OTHER_ACTIVATION = RULES.add(
    "other-activation", "a bridge's hook stands at another place of the model than the site of its name", exit=3
)

E = TypeVar("E", bound=PatchcError)


class SweepError(PatchcError, ValueError):
    """Arguments that make no sweep: a `ValueError` too."""


class SweepIndexError(PatchcError, IndexError):
    """An index outside the model or the prompts: an `IndexError` too."""


class SweepNameError(PatchcError, KeyError):
    """An activation, an axis or an entry of a cache that is not there: a `KeyError` too."""

    def __str__(self) -> str:
        return Exception.__str__(self)


def failure(kind: type[E], rule: Rule, message: str, fix: str | None = None) -> E:
    """An exception of a kind, to be raised."""
    return kind([rule.at(None, message, fix=fix)])
