"""Where the variants of a masked DAG stand: the block that writes each, and what masks do to it. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from patchc.codegen.gaps import Gap
from patchc.ir.dag import Dag
from patchc.ir.ops import Const, Core, Masked, Out, PostNorm, Scale, Sum, Tokenwise, VariantId
from patchc.ir.tokens import Tokens

Parts = tuple[VariantId, ...]
Term = tuple[int, Tokens, Gap]
"""A mask, where it acts, and what it multiplies."""


@dataclass
class Homes:
    """Reads a DAG. `gap(own, value, tokens)`: what the mask of a start multiplies."""

    dag: Dag
    gap: Callable[[VariantId, VariantId, Tokens], Gap]
    _homes: dict[VariantId, int | None] = field(default_factory=dict[VariantId, "int | None"])

    def is_private(self, parts: Parts, rank: int) -> bool:
        """Whether a stream is of one reader: masks stand beside parts of lower blocks, and nothing goes on from it."""
        if not any(self.is_start(p) for p in parts):
            return False
        homes = [self.home(p) for p in parts]
        if any(home is None for home in homes):
            return False
        blocks = self.dag.graph.blocks
        rest = [p for p, home in zip(parts, homes, strict=True) if home is None or blocks[home].rank < rank - 1]
        return len(parts) == 1 or len(rest) > 1 or any(self.is_start(p) for p in rest)

    def is_start(self, p: VariantId) -> bool:
        return isinstance(self.dag.ops[p], Masked) and self.home(p) is not None

    def home(self, x: VariantId) -> int | None:
        """The block that writes a variant; None of streams."""
        if x not in self._homes:
            self._homes[x] = self._block_of(x)
        return self._homes[x]

    def _block_of(self, x: VariantId) -> int | None:
        match self.dag.ops[x]:
            case Const(block) | Tokenwise(block) | PostNorm(block):
                return block
            case Out(core, _):
                op = self.dag.ops[core]
                assert isinstance(op, Core)
                return op.block
            case Scale(_, y):
                return self.home(y)
            case Masked(own, starts):
                return self._common([p for p in (own, *(value for *_, value in starts)) if p])
            case Sum(parts):
                return self._common(parts)
            case _:
                return None

    def _common(self, parts: Sequence[VariantId]) -> int | None:
        homes = {self.home(p) for p in parts}
        return homes.pop() if len(homes) == 1 else None

    def own(self, parts: Parts) -> Parts:
        """What stands there before any mask acts."""
        found: list[VariantId] = []
        for p in parts:
            op = self.dag.ops[p]
            found.append(op.input if self.is_start(p) and isinstance(op, Masked) else p)
        return tuple(sorted(p for p in found if p))

    def terms(self, parts: Parts) -> list[Term]:
        out: list[Term] = []
        for p in parts:
            op = self.dag.ops[p]
            if self.is_start(p) and isinstance(op, Masked):
                out += [(mask, tokens, self.gap(op.input, v, tokens)) for mask, tokens, v in op.starts]
        return out

    # ---- blocks with a norm after them
    def before_norm(self, op: PostNorm) -> Parts:
        """The parts of what a block's members write, before its norm."""
        return self.flat(self.parts(op.input))

    def normed(self, parts: Parts) -> dict[int, Parts]:
        """The same of each block in whose sum masks stand."""
        ops = (op for p in parts if isinstance(op := self.dag.ops[p], PostNorm))
        found = ((op.block, self.before_norm(op)) for op in ops)
        return {block: raw for block, raw in found if any(map(self.is_start, raw))}

    def rest(self, parts: Parts) -> Parts:
        """All parts but those."""
        normed = self.normed(parts)
        return tuple(p for p in parts if not (isinstance(op := self.dag.ops[p], PostNorm) and op.block in normed))

    def every_term(self, parts: Parts) -> list[Term]:
        return [*self.terms(parts), *(term for raw in self.normed(parts).values() for term in self.terms(raw))]

    def unmasked(self, parts: Parts) -> tuple[Parts, tuple[tuple[int, Parts], ...]]:
        """What stands there before any mask acts: streams that have this in common differ by their masks alone."""
        normed = self.normed(parts).items()
        return self.own(self.rest(parts)), tuple((block, self.own(raw)) for block, raw in normed)

    # ---- parts
    def parts(self, x: VariantId) -> Parts:
        op = self.dag.ops[x]
        if isinstance(op, Sum):
            return op.parts
        return (x,) if x and self.home(x) is not None else ()

    def flat(self, parts: Parts) -> Parts:
        out: list[VariantId] = []
        for p in parts:
            op = self.dag.ops[p]
            out += self.flat(op.parts) if isinstance(op, Sum) else [p]
        return tuple(out)
