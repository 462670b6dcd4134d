"""Path expressions read from their end, by derivatives: which step may be last, and what remains before.

The hooks backend's own evaluation of the path language, shared with no other stage. No torch, no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from patchc.ir.paths import Alt, Path, Seq, Star, Step


def is_nullable(path: Path) -> bool:
    """Whether `path` may be no step at all."""
    match path:
        case Step():
            return False
        case Star():
            return True
        case Seq(parts):
            return all(map(is_nullable, parts))
        case Alt(parts):
            return any(map(is_nullable, parts))


def last_steps(path: Path) -> Iterator[tuple[Step, tuple[Path, ...]]]:
    """Every step that a path may end with, and what then remains before it (Antimirov's partial derivatives
    of the reversed expression)."""
    match path:
        case Step():
            yield path, ()
        case Star(part):
            yield from ((step, (path, *before)) for step, before in last_steps(part))
        case Alt(parts):
            for part in parts:
                yield from last_steps(part)
        case Seq(parts):
            for i in reversed(range(len(parts))):
                yield from ((step, (*parts[:i], *before)) for step, before in last_steps(parts[i]))
                if not is_nullable(parts[i]):
                    return


@dataclass(eq=False, slots=True)
class Rest:
    """What remains to be read of a path: `parts`, one after the other, read from the right. One object a
    content."""

    parts: tuple[Path, ...]
    nullable: bool
    moves: tuple[Move, ...] = ()
    has_via: bool = False


@dataclass(eq=False, slots=True)
class Move:
    """One reading of a rest: it ends with `step`, and `rest` remains before it. One object a content."""

    step: Step
    rest: Rest

    @property
    def accepts(self) -> bool:
        """Nothing need remain: the step may be the path's first."""
        return self.rest.nullable


class Rests:
    """Makes rests and moves, each once."""

    def __init__(self) -> None:
        self._rests: dict[tuple[Path, ...], Rest] = {}
        self._moves: dict[tuple[Step, Rest], Move] = {}

    def of(self, parts: tuple[Path, ...]) -> Rest:
        found = self._rests.get(parts)
        if found is None:
            found = self._rests[parts] = Rest(parts, is_nullable(Seq(parts)))
            moves = (self._move(step, self.of(before)) for step, before in last_steps(Seq(parts)))
            found.moves = tuple(dict.fromkeys(moves))
            found.has_via = any(move.step.via is not None for move in found.moves)
        return found

    def _move(self, step: Step, rest: Rest) -> Move:
        return self._moves.setdefault((step, rest), Move(step, rest))
