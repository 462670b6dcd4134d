"""A program in words: what will run, before anything does."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from patchc.ir.dag import Dag
from patchc.ir.experiment import Probe
from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.paths import Site
from patchc.ir.program import Program

KINDS = {
    "Const": "stored values of nodes",
    "Stream": "stored streams",
    "Core": "attention, run again",
    "Out": "heads written again",
    "Tokenwise": "MLPs, run again",
    "Sum": "sums",
    "Scale": "multiples",
    "Mix": "mixes by position",
    "Projected": "projections of heads, read by metrics",
    "HeadZ": "heads' z, read by metrics",
    "StoredZ": "stored z of heads, read by metrics",
    "Run": "suffixes: the plain model from some layer up",
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What an experiment will run. `str()` is the printed form."""

    experiment: str
    n_cells: int
    n_passes: int
    no_effect: int
    worlds: tuple[str, ...]
    variants: dict[str, int]
    rows: dict[str, int]
    """Token rows that each block computes, over all passes."""
    plain_rows: int
    """Token rows that a block computes in one plain run: a cell run alone costs this at every block."""
    columns: int | None
    measured: int
    """Tokens whose logits are read."""
    bytes: int
    probes: dict[str, int] = field(default_factory=dict[str, int])
    """Tokens read at each place in the model."""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        cells = "1 cell" if self.n_cells == 1 else f"{self.n_cells:,} cells"
        passes = "1 pass" if self.n_passes == 1 else f"{self.n_passes:,} passes"
        lines = [f"experiment {self.experiment}: {cells} in {passes} (one a cell: {self.n_cells:,})"]
        lines.append(f"  plain runs  {', '.join(self.worlds)}")
        lines.append(f"  no effect   {self.no_effect:,} cells provably equal the base run: nothing runs for them")
        lines += [f"  variants    {n:>8,}  {KINDS[kind]}" for kind, n in self.variants.items()]
        most = self.n_cells * self.plain_rows
        lines += [f"  rows        {n:>8,}  {block} (one pass a cell: {most:,})" for block, n in self.rows.items()]
        columns = "the whole vocabulary" if self.columns is None else f"{self.columns} answer columns"
        if self.measured:
            lines.append(f"  unembed     {columns} at {self.measured} tokens")
        lines += [f"  reads       {place} at {n} tokens" for place, n in self.probes.items()]
        lines.append(f"  memory      {self.bytes / 2**20:,.1f} MiB at most in a pass, estimated")
        return lines


def plan(program: Program) -> Plan:
    """Describe a program."""
    dag = program.dag
    kinds = Counter(type(op).__name__ for op in dag.ops[1:])
    rows: Counter[int] = Counter()
    for work in program.passes:
        rows.update(dict(enumerate(work.rows)))
    return Plan(
        program.experiment.name,
        len(program.roots),
        program.n_passes,
        len(program.no_effect),
        program.worlds,
        {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        {_block_name(dag, i): rows[i] for i in sorted(rows) if rows[i]},
        program.prompts.layout.n_tokens,
        None if program.columns is None else len(program.columns),
        program.measured.bit_count(),
        max((work.bytes for work in program.passes), default=0),
        {place_name(dag.graph, e.probe): e.tokens.bit_count() for e in program.ends if e.probe is not None},
    )


def place_name(graph: ResidualGraph, probe: Probe) -> str:
    """A place that a metric reads, as a spec writes it."""
    if probe.site is Site.STREAM:
        return f"the stream below rank {probe.rank}"
    node = graph.members(probe.nodes)[0]
    if probe.site is Site.ATTN_OUT:
        return f"attn_out[{node.layer}]"
    return node.name if probe.site is Site.OUT else f"{node.name}.{probe.site}"


def _block_name(dag: Dag, index: int) -> str:
    block = dag.graph.blocks[index]
    return f"attention {block.layer}" if block.kind is BlockKind.ATTENTION else f"mlp {block.layer}"
