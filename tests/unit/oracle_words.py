"""Paths of an unrolled model as words, matched whole against path expressions: no derivative is taken.

A word is written from its first node to where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchc.ir.graph import Kind, Node
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from patchc.ir.tokens import Tokens


@dataclass(frozen=True)
class Below:
    """The whole stream below a rank, as the beginning of a path."""

    rank: int


@dataclass(frozen=True)
class StreamEnd:
    """The stream below a rank, as the end of a path: a metric reads it."""

    rank: int


Item = tuple[Any, int | None, Tokens]
"""A node on a path (or a stream, at its beginning or end), the port (None: its only one) and the tokens by which the
path enters it from the node before."""

Word = tuple[Item, ...]
"""A path from a node to where it is read. Of the first item only the node counts."""


PORT_SITES = (Site.Q, Site.K, Site.V)
ENTRIES = (Site.SCORES, Site.PATTERN)
MIDDLE = (*ENTRIES, Site.POST)
INNER = (*PORT_SITES, Site.IN, *MIDDLE)


def joins(step: Step, word: Word, i: int) -> bool:
    """Whether `step` may be the one at place `i` of `word`."""
    node, port, tokens = word[i]
    if isinstance(node, Below | StreamEnd):
        here = step.site is Site.STREAM and step.rank == node.rank
        return here and (not i or bool(step.tokens & tokens))
    if not step.nodes >> node.id & 1:
        return False
    if step.site is Site.STREAM and (i + 1 == len(word) or not node.rank < step.rank <= word[i + 1][0].rank):
        return False
    if i and (not step.tokens & tokens or (port is not None and not step.ports >> port & 1)):
        return False
    if step.via is None or i + 1 == len(word):
        return True
    reader, port, _ = word[i + 1]
    reader_id = -1 if isinstance(reader, StreamEnd) else reader.id
    return bool(step.via.writers(reader_id, -1 if port is None else port) >> node.id & 1)


Match = tuple[int, Step | None]
"""Where a match has got to in a word, and the step at the word's own beginning if that is in it."""


def matches(path: Path, word: Word, begun: set[Match]) -> set[Match]:
    """Every way to match `path` on from one of `begun`."""
    match path:
        case Step():
            here = ((i, first) for i, first in begun if i < len(word) and joins(path, word, i))
            return {(i + 1, first or path) for i, first in here}
        case Alt(parts):
            return {end for part in parts for end in matches(part, word, begun)}
        case Seq(parts):
            for part in parts:
                begun = matches(part, word, begun)
            return begun
        case Star(part):
            ends, new = set(begun), set(begun)
            while new:
                new = matches(part, word, new) - ends
                ends |= new
            return ends


def steps_of(path: Path) -> list[Step]:
    """Every step that is written in `path`."""
    match path:
        case Step():
            return [path]
        case Star(part):
            return steps_of(part)
        case Seq(parts) | Alt(parts):
            return [step for part in parts for step in steps_of(part)]


def starts(path: Path, word: Word) -> list[Step]:
    """The steps of `path` that may be first in it where it is the whole of `word`."""
    found = (step for end, step in matches(path, word, {(0, None)}) if end == len(word) and step is not None)
    return list(dict.fromkeys(found))


def ports(node: Node | StreamEnd) -> list[int | None]:
    if isinstance(node, StreamEnd):
        return [None]
    return [0, 1, 2] if node.kind is Kind.HEAD else [None] if node.kind in (Kind.MLP, Kind.LOGITS) else []
