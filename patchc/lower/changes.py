"""At which tokens a value can differ from the base run's, known before anything runs: from the worlds' tokens alone.

And the variants that hold such values, at those tokens. Which values enter where, `entering` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.experiment import FromWorld, Itself, Prompts, Value
from patchc.ir.graph import Kind
from patchc.ir.laws import Law
from patchc.ir.ops import SCORES, Replaced, VariantId
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens


def differing(prompts: Prompts, one: str, other: str) -> Tokens:
    """The tokens whose ids differ between two worlds."""
    out, t = 0, 0
    for a, b in zip(prompts.world(one).ids, prompts.world(other).ids, strict=True):
        for x, y in zip(a, b, strict=True):
            out |= (x != y) << t
            t += 1
    return out


@lru_cache(maxsize=1024)  # cells share few values, and every start of every cell asks
def relative(value: Value, run: str) -> tuple[Value, float]:
    """A value as (the same with `self` read from the base run, the factor of `self`), sources joined and sorted."""
    factors: dict[FromWorld | object, float] = {}
    own = 0.0
    for factor, source in value.terms:
        if isinstance(source, Itself):
            own += factor
            source = FromWorld(run)
        factors[source] = factors.get(source, 0.0) + factor
    terms = tuple(sorted(((f, s) for s, f in factors.items() if f), key=repr))
    return Value(terms), own  # type: ignore[arg-type]


class Changes:
    """Where the stored values of one experiment can differ from its base run; with `any_data`, on any data."""

    def __init__(self, dag: Dag, prompts: Prompts, run: str, any_data: bool = False):
        self.dag, self.run = dag, run
        self._forward, self._drops = Law.FORWARD in dag.laws, Law.BASE in dag.laws
        self._at_node: dict[tuple[Value, Kind], Tokens] = {}  # one for each value that is patched, which cells share
        self._differing = {w.name: differing(prompts, run, w.name) for w in prompts.worlds if w.layout is None}
        if any_data:
            self._differing = {w: 0 if w == run else dag.layout.all for w in self._differing}

    def _tokens(self, value: Value) -> Tokens | None:
        """The tokens at which the worlds that a value mixes differ; None where it is no mixture of worlds."""
        if not all(isinstance(source, FromWorld) for _, source in value.terms):
            return None
        if abs(sum(factor for factor, _ in value.terms) - 1.0) > 1e-12:
            return None
        out = 0
        for _, source in value.terms:
            assert isinstance(source, FromWorld)
            out |= self._differing[source.world]
        return out

    def at_node(self, value: Value, kind: Kind) -> Tokens:
        """Tokens at which a node of this kind can differ from the base run under `value`."""
        found = self._at_node.get((value, kind))
        if found is None:
            found = self._at_node[value, kind] = self._of_kind(value, kind)
        return found

    def _of_kind(self, value: Value, kind: Kind) -> Tokens:
        tokens = self._tokens(value)
        match kind:
            case Kind.EMBED:
                return self.dag.layout.all if tokens is None else tokens
            case Kind.POS_EMBED | Kind.ATTN_BIAS:
                return self.dag.layout.all if tokens is None else 0
            case _:
                return self._all_or_spread(tokens)

    def at_stream(self, value: Value, rank: int) -> Tokens:
        """The same for the stream below `rank`: at rank 1 it is the embeddings alone."""
        tokens = self._tokens(value)
        return tokens if rank <= 1 and tokens is not None else self._all_or_spread(tokens)

    def _all_or_spread(self, tokens: Tokens | None) -> Tokens:
        return self.dag.layout.all if tokens is None else self.dag.spread(tokens)

    # ---- the variants that hold values
    def node(self, block: int, members: int, site: Site, value: Value, tokens: Tokens) -> VariantId:
        """The stored difference of some members of a block at `tokens`; members that cannot differ are left out."""
        graph, first = self.dag.graph, self.dag.graph.blocks[block].first
        if site is Site.ATTN_OUT and graph.blocks[block].post_norm:  # no sum of what members add to the stream
            return self.dag.const(block, members, value, self._where(self.at_node(value, Kind.HEAD), tokens), site)
        by_tokens: dict[Tokens, int] = {}
        for i in bits(members):
            here = self._where(self.at_node(value, graph.nodes[first + i].kind), tokens)
            by_tokens[here] = by_tokens.get(here, 0) | 1 << i
        return self.dag.sum(self.dag.const(block, some, value, here, site) for here, some in by_tokens.items() if here)

    def stream(self, rank: int, value: Value, tokens: Tokens, block: int = -1) -> VariantId:
        """The same of the whole stream below `rank`."""
        return self.dag.stream(rank, value, self._where(self.at_stream(value, rank), tokens), block)

    def z(self, block: int, head: int, value: Value, tokens: Tokens) -> VariantId:
        """The same of one head's z, as a metric reads it."""
        return self.dag.stored_z(block, head, value, self._where(self.at_node(value, Kind.HEAD), tokens))

    def inside(self, value: Value, tokens: Tokens, own_changes: Tokens) -> Tokens:
        """Those of `tokens` at which a value put inside a node can differ from the base run's: there the stored value
        does, or it undoes what the node itself would have."""
        stored, own = relative(value, self.run)
        return self._where(self.at_node(stored, Kind.HEAD) | (own_changes if own != 1.0 else 0), tokens)

    def inside_head(self, replaced: Sequence[Replaced], inputs: Sequence[VariantId]) -> list[Tokens]:
        """The same for each value set in a head on these q, k and v inputs: in the order q, k, v, scores, pattern."""
        changed = [self.dag.changed[x] for x in inputs]
        entries = changed[0] | self.dag.spread(changed[1])
        out: list[Tokens] = []
        for r in replaced:
            own = entries if r.port >= SCORES else changed[r.port]
            tokens = self.inside(self.dag.values[r.value], r.tokens, own)
            entries |= self.dag.spread(tokens) if r.port == 1 else tokens if r.port != 2 else 0
            out.append(tokens)
        return out

    def _where(self, differing: Tokens, tokens: Tokens) -> Tokens:
        """The tokens at which a value stands that enters at `tokens` and differs at `differing`."""
        if here := differing & tokens:
            return here if self._forward else tokens
        return 0 if self._drops else tokens
