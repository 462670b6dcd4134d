"""Unembeds only what metrics read: the columns of answer tokens, where every metric is made of their logits, and only
at measured tokens.

Before    50,257 logits a measured token        After    the logits of ` Mary` and ` John`
A probability, a loss or a KL divergence needs the whole vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from patchc.ir.experiment import Experiment, Measure, NodeRead, Read
from patchc.ir.leaves import leaves
from patchc.ir.program import Program
from patchc.optimise import reads
from patchc.optimise.facts import Facts


def apply(program: Program) -> Program:
    columns = reads.columns(program.experiment.metrics)
    return program if columns == program.columns else replace(program, columns=columns)


def remark(facts: Facts) -> tuple[bool, str]:
    vocabulary, columns = facts.dag.graph.d_vocab, facts.program.columns
    measured = facts.program.measured.bit_count()
    if not measured:
        return True, "no metric reads logits: none are computed"
    tokens = f"at {measured} of {facts.dag.layout.n_tokens} tokens"
    if columns is not None:
        return True, f"{len(columns)} of {vocabulary:,} logits are computed, {tokens}"
    return False, f"{_whole_vocabulary(facts.program.experiment)} needs all {vocabulary:,} logits, {tokens}"


def _whole_vocabulary(experiment: Experiment) -> str:
    """The first metric that reads more than logits of answers."""
    for metric in experiment.metrics:
        for leaf in leaves(metric.expression):
            if not isinstance(leaf, NodeRead) and not (isinstance(leaf, Read) and leaf.measure is Measure.LOGIT):
                return f"`{metric.name}`"
    return "a metric"
