"""What the paths of an experiment end at: the logits, and the places in the model that its metrics read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from patchc.ir.bits import bits
from patchc.ir.experiment import Metric, NodeRead, Probe
from patchc.ir.graph import QKV, K, Q, ResidualGraph, V
from patchc.ir.leaves import leaves
from patchc.ir.paths import Site, Step
from patchc.resolve.terms import Member

PORTS_READ = {
    Site.Q: 1 << Q,
    Site.K: 1 << K,
    Site.V: 1 << V,
    **dict.fromkeys((Site.PATTERN, Site.SCORES), 1 << Q | 1 << K),
}
"""The ports of a head that what is read inside it depends on, where that is not all of them."""

_OUT = (Site.OUT, Site.ATTN_OUT)
FOLLOWS: dict[Site, tuple[Site, ...]] = {
    Site.Q: (Site.SCORES, Site.PATTERN, Site.Z, *_OUT),
    Site.K: (Site.SCORES, Site.PATTERN, Site.Z, *_OUT),
    Site.SCORES: (Site.PATTERN, Site.Z, *_OUT),
    Site.PATTERN: (Site.Z, *_OUT),
    Site.V: (Site.Z, *_OUT),
    Site.Z: _OUT,
    Site.OUT: (Site.ATTN_OUT,),
    Site.IN: (Site.POST, Site.OUT),
    Site.POST: (Site.OUT,),
}
"""What else in the same node, or in the same layer's attention, a value that is put in at a site changes."""


@dataclass(frozen=True, slots=True)
class Ends:
    """`logits`: whether some metric reads them; `probes`: what is read elsewhere. Not `certain` where a metric has an
    error, so that nothing is known to be no end."""

    logits: bool = True
    probes: tuple[Probe, ...] = ()
    certain: bool = True

    def told(self, graph: ResidualGraph) -> str:
        """`the logits, mlp[2] and head[3, 1].pattern`."""
        names = [*(["the logits"] if self.logits else []), *(probe_name(graph, p) for p in self.probes)]
        *most, last = dict.fromkeys(names)
        return f"{', '.join(most)} and {last}" if most else last

    def example(self, graph: ResidualGraph) -> str:
        """What a path can end with: `logits`, `head[3, 1].{q, k}`."""
        if self.logits:
            return "logits"
        probe = self.probes[0]
        name = probe_name(graph, probe)
        if probe.site in (Site.PATTERN, Site.SCORES):
            return name.removesuffix(str(probe.site)) + "{q, k}"
        return name.removesuffix(f".{probe.site}") if probe.site in (Site.Z, Site.IN, Site.POST) else name

    def steps(self, graph: ResidualGraph) -> tuple[Step, ...]:
        """The last steps of every path: the logits and each place that is read."""
        found = [Step(graph.logits_set)] if self.logits else []
        return (*found, *dict.fromkeys(_step(graph, p) for p in self.probes))

    def is_end(self, graph: ResidualGraph, member: Member) -> bool:
        """Whether what is measured is read where a path that ends at `member` arrives."""
        if member.nodes & graph.logits_set:
            return self.logits or not self.certain
        return not self.certain or any(_reads(p, member) for p in self.probes)

    def read_at(self, start: Step) -> Step | None:
        """A start, cut to the nodes at which a value that enters there is read without any step between."""
        nodes = 0
        for probe in self.probes:
            if Site.STREAM in (start.site, probe.site):
                continue  # a stream that is read is a step of its own, also where a value has just entered it
            if start.site is probe.site or probe.site in FOLLOWS.get(start.site, ()):
                nodes |= start.nodes & probe.nodes
        if not nodes:
            return None
        return Step(nodes, start.ports, start.tokens, None, start.site, start.rank, start.sources, start.neurons)


LOGITS = Ends()
"""The ends where only the logits are read."""


def ends_of(metrics: Iterable[Metric], certain: bool = True) -> Ends:
    """What some metrics read. `certain`: whether they are all of an experiment's."""
    read = [leaf for m in metrics for leaf in leaves(m.expression)]
    probes = tuple(dict.fromkeys(leaf.probe for leaf in read if isinstance(leaf, NodeRead)))
    return Ends(not probes or not all(isinstance(leaf, NodeRead) for leaf in read), probes, certain)


def _step(graph: ResidualGraph, probe: Probe) -> Step:
    if probe.site is Site.STREAM:
        return Step(graph.below(probe.rank), site=Site.STREAM, rank=probe.rank)
    return Step(probe.nodes, PORTS_READ.get(probe.site, QKV))


def _reads(probe: Probe, member: Member) -> bool:
    if Site.STREAM in (probe.site, member.site):
        return (probe.site, probe.rank) == (member.site, member.rank)
    return not member.nodes & ~probe.nodes and bool(member.ports & PORTS_READ.get(probe.site, QKV))


def probe_name(graph: ResidualGraph, probe: Probe) -> str:
    """A probe as a spec writes it."""
    if probe.site is Site.STREAM:
        return graph.stream_name(probe.rank)
    node = graph.nodes[next(bits(probe.nodes))]
    if probe.site is Site.ATTN_OUT:
        return f"attn_out[{node.layer}]"
    return node.name if probe.site is Site.OUT else f"{node.name}.{probe.site}"
