"""What a metric reads inside the model: an entry of a pattern, a neuron, a node's output along a direction.

One node and one position a prompt. Vectors become numbers by `dot` with a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from patchc.diagnostics import RULES, Span
from patchc.ir.experiment import NodeRead, Probe
from patchc.ir.graph import Kind, ResidualGraph
from patchc.ir.paths import EVERYWHERE, Site
from patchc.parse import tree
from patchc.resolve.bindings import NO_LOCALS
from patchc.resolve.data import Dataset
from patchc.resolve.indices import Axis, Indexer
from patchc.resolve.legality import HIDDEN_ENTRY
from patchc.resolve.positions import ONE_POSITION, Positions
from patchc.resolve.scope import WRONG_KIND, written
from patchc.resolve.selectors import UNKNOWN_SITE
from patchc.resolve.sets import Sets
from patchc.resolve.tensors import TENSOR_SHAPE, Tensors
from patchc.resolve.terms import Member

NOT_A_NUMBER = RULES.add("not-a-number", "a metric reads a vector, or several nodes, where one number is needed")

ENTRIES = (Site.PATTERN, Site.SCORES)
IN_MLPS = (Site.IN, Site.POST)
INNER = {site.value: site for site in (*ENTRIES, *IN_MLPS)}
"""Sites that this file reads itself, with their own indices."""
EXAMPLE = 'dot(resid_post[0] @ -1, tensor("probe.safetensors", "w"))'

Tokens = tuple[int, ...]


@dataclass
class Probes:
    """Resolves the reads of nodes of a spec's metrics."""

    graph: ResidualGraph
    dataset: Dataset
    positions: Positions
    sets: Sets
    indexer: Indexer
    tensors: Tensors
    _kept: list[tree.Ref] = field(default_factory=list[tree.Ref])

    def number(self, node: tree.Ref, at: Tokens | None) -> NodeRead:
        """A number that a node has: an entry of a pattern or of scores, or one neuron."""
        site = _inner(node)
        if site in ENTRIES:
            probe, _ = self._probe(node)
            return self._entry(node, probe)
        if site is Site.POST and node.sites[-1].indices:
            probe, tokens = self._probe(node)
            return NodeRead(probe, self._at(at, tokens), neuron=self._neuron(node))
        probe, _ = self._probe(node)
        message = f"{written(node)} is a vector of {self._width(probe)} numbers; a metric is one number a prompt"
        raise NOT_A_NUMBER.error(message, fix=f"as in `dot({written(node)}, tensor(...))`", span=node.span)

    def dot(self, node: tree.Function, at: Tokens | None) -> NodeRead:
        """`dot(NODE @ POSITION, tensor(...))`."""
        target, tensor = self._arguments(node)
        if isinstance(target, tree.At):
            self.check_place(target)
            at, target = self.positions.one(target.place), target.inner
        if not isinstance(target, tree.Ref):
            fix = EXAMPLE.replace("-1", "{end - 1}") if isinstance(target, tree.Sum) else EXAMPLE
            raise WRONG_KIND.error("dot takes a node and a tensor", fix=fix, span=target.span)
        if _inner(target) in ENTRIES or (_inner(target) is Site.POST and target.sites[-1].indices):
            message = f"{written(target)} is a number already, and dot takes a vector"
            raise NOT_A_NUMBER.error(message, fix=f"write `{written(target)}`", span=target.span)
        probe, tokens = self._probe(target)
        key = self.tensors.named(tensor)
        self._check_width(probe, key, target, tensor.span)
        return NodeRead(probe, self._at(at, tokens), key=key)

    def check_place(self, node: tree.At) -> None:
        """An entry of a pattern says its positions itself."""
        if isinstance(node.inner, tree.Ref) and _inner(node.inner) in ENTRIES:
            message = f"{written(node.inner)} names its positions itself: `@` has nothing to say"
            raise WRONG_KIND.error(message, fix=f"write `{written(node.inner)}`", span=node.span)

    def _arguments(self, node: tree.Function) -> tuple[tree.Argument, tree.Function]:
        match node.arguments:
            case (target, tree.Function(tree.Name("tensor")) as tensor):
                return (target.inner if isinstance(target, tree.Parens) else target), tensor
            case _:
                raise WRONG_KIND.error("dot takes a node and a tensor", fix=EXAMPLE, span=node.span)

    # ---- the place in the model

    def _probe(self, node: tree.Ref) -> tuple[Probe, Tokens | None]:
        """The place that a selector names, and the tokens where a `let` has given them."""
        site = _inner(node)
        bare = node if site is None else replace(node, sites=node.sites[:-1])
        self._kept.append(bare)  # `sets` remembers expressions by their ids
        members = self.sets.nodes(bare, NO_LOCALS).members
        if len(members) != 1:
            message = f"a metric reads one node, and {written(node)} is {len(members) or 'none'}"
            raise NOT_A_NUMBER.error(message, fix="name one: `head[0, 1]`", span=node.span)
        member = members[0]
        probe = self._outer(member, node) if site is None else self._within(member, site, node)
        return probe, self._given(member, node.span)

    def _outer(self, member: Member, node: tree.Ref) -> Probe:
        if member.site in INNER.values():
            raise WRONG_KIND.error(f"write {member.name} itself, not by a name for it", span=node.span)
        if member.site is Site.OUT:
            if member.kv >= 0:
                raise WRONG_KIND.error(f"{member.name} has .k and .v, and no output", span=node.span)
            self._check_output(member, node)
        if member.site not in (Site.STREAM, Site.ATTN_OUT):
            self._check_one(member, node)
        return Probe(member.nodes, member.site, member.rank)

    def _check_output(self, member: Member, node: tree.Ref) -> None:
        kinds = {n.kind for n in self.graph.members(member.nodes)}
        if Kind.LOGITS in kinds:
            raise WRONG_KIND.error("logits are read by answer", fix="write `logit(answer)`", span=node.span)
        if kinds == {Kind.ATTN_BIAS}:
            message = f"{member.name} is a constant: it is the same in every run"
            fix = f"did you mean `{member.name.replace('attn_bias', 'attn_out')}`?"
            raise WRONG_KIND.error(message, fix=fix, span=node.span)

    def _check_one(self, member: Member, node: tree.Ref) -> None:
        if member.nodes.bit_count() != 1:
            names = ", ".join(n.name for n in self.graph.members(member.nodes)[:3])
            fix = "resid_pre[0]" if member.nodes == self.graph.input else "name one of them"
            message = f"a metric reads one node, and {member.name} is several ({names})"
            raise NOT_A_NUMBER.error(message, fix=fix, span=node.span)

    def _within(self, member: Member, site: Site, node: tree.Ref) -> Probe:
        kind, owner = (self.graph.heads, "a head") if site in ENTRIES else (self.graph.mlps, "an MLP")
        if member.site is not Site.OUT or member.nodes & kind != member.nodes or member.nodes.bit_count() != 1:
            message = f"{member.name} has no site .{site}: only {owner} has one"
            raise UNKNOWN_SITE.error(message, span=node.sites[-1].span)
        return Probe(member.nodes, site)

    def _given(self, member: Member, span: Span | None) -> Tokens | None:
        """The one token of each prompt at which a member stands, or None where it stands at all."""
        if member.tokens == EVERYWHERE:
            return None
        layout, n = self.dataset.layout, len(self.dataset.lengths)
        found = [layout.numbers(member.tokens & layout.prompt(i)) for i in range(n)]
        many = next((i for i, here in enumerate(found) if len(here) != 1), None)
        if many is not None:
            message = f"a metric is read at one position; {member.name} is at {len(found[many])} in prompt {many}"
            raise ONE_POSITION.error(message, span=span)
        return tuple(here[0] for here in found)

    def _at(self, at: Tokens | None, own: Tokens | None) -> Tokens:
        return at or own or self.positions.last

    # ---- entries and neurons

    def _entry(self, node: tree.Ref, probe: Probe) -> NodeRead:
        indices = node.sites[-1].indices
        if len(indices) != 2:
            what = written(node.sites[-1])
            message = f"{what} takes two positions: the one that asks and the one that is looked at"
            raise NOT_A_NUMBER.error(message, fix=f"as in `{written(node).split('[end')[0]}[-1, 0]`", span=node.span)
        tokens, sources = (self._position(i) for i in indices)
        self._check_seen(node, tokens, sources)
        return NodeRead(probe, tokens, sources)

    def _position(self, index: tree.Index) -> Tokens:
        if isinstance(index, tree.Every):
            message = "a metric is one number a prompt, and * is every position"
            raise ONE_POSITION.error(message, span=index.span)
        return self.positions.one(index)

    def _check_seen(self, node: tree.Ref, tokens: Tokens, sources: Tokens) -> None:
        layout = self.dataset.layout
        for i, (t, s) in enumerate(zip(tokens, sources, strict=True)):
            (_, asks), (_, seen) = layout.place(t), layout.place(s)
            if self.graph.causal and seen > asks:
                message = f"position {asks} never looks at position {seen}, which comes after it (prompt {i})"
                raise HIDDEN_ENTRY.error(message, span=node.span)

    def _neuron(self, node: tree.Ref) -> int:
        indices = node.sites[-1].indices
        if len(indices) != 1:
            raise WRONG_KIND.error(".post takes one index, a neuron", span=node.sites[-1].span)
        axis = Axis("neuron", self.graph.d_mlp, f"the model's MLPs have neurons 0..{self.graph.d_mlp - 1}")
        found = self.indexer.all_of(indices[0], axis, NO_LOCALS, written(node))
        if len(found) != 1:
            message = f"a metric reads one neuron, and {written(node)} is {len(found)}"
            fix = f"as in `{written(node).rpartition('[')[0]}[{found[0]}]`"
            raise NOT_A_NUMBER.error(message, fix=fix, span=node.span)
        return found[0]

    # ---- widths

    def _width(self, probe: Probe) -> int:
        if probe.site in (Site.Q, Site.K, Site.V, Site.Z):
            return self.graph.d_head
        return self.graph.d_mlp if probe.site is Site.POST else self.graph.d_model

    def _check_width(self, probe: Probe, key: str, node: tree.Ref, span: Span | None) -> None:
        shape, width = self.tensors.shapes[key], self._width(probe)
        if shape != (width,):
            message = f"tensor {key!r} has shape {list(shape)}, and {written(node)} has [{width}]"
            raise TENSOR_SHAPE.error(message, span=span)


def _inner(node: tree.Ref) -> Site | None:
    """The site inside a head or an MLP that a selector ends in, where it is one of those read here."""
    if not node.sites or len(node.sites[-1].names) != 1:
        return None
    return INNER.get(node.sites[-1].names[0].text)
