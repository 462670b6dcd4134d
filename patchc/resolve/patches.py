"""The patches of a cell: target and value, checked. What does not depend on a loop variable is resolved once.

In a sweep a target that no path of the model matches (a pair that is no edge) gives no cell; elsewhere it is
an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any, TypeVar

from patchc.diagnostics import RULES, Diagnostic, PatchcError
from patchc.ir.experiment import FromWorld, Itself, Mean, Patch, Value
from patchc.ir.graph import Kind, ResidualGraph
from patchc.ir.paths import Alt, Path, Seq, Star, Step
from patchc.parse import tree
from patchc.resolve.bindings import Env
from patchc.resolve.data import Dataset
from patchc.resolve.ends import LOGITS, Ends
from patchc.resolve.entry import ENTRIES, Entry
from patchc.resolve.legality import BACKWARD_EDGE, HIDDEN_ENTRY, NO_POSITION, Legality, Reach
from patchc.resolve.paths import BAD_START, Paths
from patchc.resolve.scope import WRONG_KIND
from patchc.resolve.sets import Sets
from patchc.resolve.tensors import Tensors
from patchc.resolve.terms import Circuit, NodeSet, Term
from patchc.resolve.values import Values

WORLDS_EQUAL = RULES.add("worlds-equal", "an experiment whose patches give every node what the run itself has there")

T = TypeVar("T")
Found = Path | None

ANYWHERE = Ends(certain=False)
"""For what has to hold wherever a path ends."""


class Patches:
    """The `patch` clauses of a spec."""

    def __init__(
        self,
        graph: ResidualGraph,
        dataset: Dataset,
        sets: Sets,
        paths: Paths,
        values: Values,
        tensors: Tensors,
    ):
        self._graph = graph
        self._data = dataset
        self._sets = sets
        self._paths = paths
        self._values = values
        self._entry = Entry(graph, tensors, dataset, values.other.worlds)
        self._legality = Legality(graph)

    def cells(self, clauses: Sequence[tree.Patch], run: str, ends: Ends) -> OneExperiment:
        """The patches of one experiment, to be asked for cell by cell."""
        return OneExperiment(self, clauses, run, ends)

    # ---- targets

    def target(self, node: tree.Target, env: Env, ends: Ends) -> Found:
        """The paths of a target; None where loop variables make it one that the model has no path for."""
        if node.what is None:
            return self._paths.everything(ends)
        term = self._sets.once(node.what, env)
        path = self._path(node, term, ends)
        if not self._sets.locals_of(node.what, env):
            self._check(node, term, path, ends)
        return path if self._is_legal(node, term, path, ends) else None

    def _path(self, node: tree.Target, term: Term, ends: Ends) -> Path:
        span = node.what.span if node.what else node.span
        match node.kind:
            case "node":
                return self._paths.node(term, span, ends)
            case "edge":
                return self._paths.edge(term, span, ends)
            case "path":
                return self._paths.path(term, span, ends)
            case "all":
                if isinstance(term, NodeSet):
                    message = "`patch all except` takes paths, and these are nodes"
                    fix = "write `circuit(...)` of the nodes, or `a -> b -> logits`"
                    raise WRONG_KIND.error(message, fix=fix, span=span)
                return self._paths.path(term, span, ends)

    def _is_legal(self, node: tree.Target, term: Term, path: Path, ends: Ends) -> bool:
        """Whether the model has such a path. A node or an edge above all that is measured is one without effect."""
        if self._legality.lowest(path) is not None:
            return True
        if not ends.probes or node.kind not in ("node", "edge"):
            return False
        return self._legality.lowest(self._path(node, term, LOGITS)) is not None

    def _check(self, node: tree.Target, term: Term, path: Path, ends: Ends) -> None:
        """The rank rule for every alternative as written, and that some position takes every step."""
        span = node.what.span if node.what else node.span
        if fault := self.fault(node, term):
            raise PatchcError([fault])
        if isinstance(term, Circuit):
            self._paths.check_edges(term, ends)
        if not starts(path):
            raise self._paths.not_an_end(None, span, ends)
        constants = self._graph.of(Kind.ATTN_BIAS)
        if all(not step.nodes & ~constants for step in starts(path)):
            raise BAD_START.error("a bias is the same in every run: no value changes it", span=term.span)
        reach = Reach(self._graph, self._data.layout)
        if self._legality.lowest(path) is not None and not reach.end(path):
            message = (
                "no position takes every step of this path: a value stays at its position, except that "
                "a head's k and v move it to later ones"
            )
            raise NO_POSITION.error(message, span=span)
        if all(self._is_hidden(step) for step in starts(path)):
            message = (
                "no position looks at a later one, and here each would: "
                "the one that asks stands first, [asks, looked at]"
            )
            raise HIDDEN_ENTRY.error(message, span=span)

    def _is_hidden(self, step: Step) -> bool:
        """Whether a start is entries of a pattern or of scores that stand above the diagonal in every prompt."""
        if step.site not in ENTRIES or not self._graph.causal:
            return False
        layout = self._data.layout
        return not layout.upto(step.tokens & layout.all) & step.sources

    def fault(self, node: tree.Target, term: Term) -> Diagnostic | None:
        """Why a target has no path in the model, in the words of the spec."""
        fault = self._legality.fault(term)
        if fault is None and self._legality.lowest(self._path(node, term, ANYWHERE)) is None:
            fault = BACKWARD_EDGE.at(None, "the model has no such path: every edge leads from a node to a later one")
        return fault.at(node.what.span if node.what else node.span) if fault else None

    def why_none(self, node: tree.Target, env: Env) -> Diagnostic | None:
        """The fault of a target that gave no cell."""
        return self.fault(node, self._sets.term(node.what, env)) if node.what else None

    # ---- values

    def value(self, node: tree.Value, env: Env, run: str) -> Value:
        return self._values.value(node, env, run)

    def check_value(self, clause: tree.Patch, path: Path, value: Value, ends: Ends) -> None:
        """A value can enter wherever a path starts, or that of a complement wherever none of its paths goes on."""
        if not all(isinstance(source, FromWorld | Itself) for _, source in value.terms):
            for step in self._outside(path, ends) if _is_complement(clause) else starts(path):
                self._entry.check(step, value, clause.value.span)

    def _outside(self, path: Path, ends: Ends) -> list[Step]:
        """Where the value of a complement enters: every node's output, and what is read in a head at which no path
        ends."""
        ended = reduce(or_, (step.nodes for step in stops(path)), 0)
        read = [p for p in ends.probes if p.site in ENTRIES and not p.nodes & ended]
        return [Step(self._graph.all), *(Step(p.nodes, site=p.site) for p in read)]

    def locals_of(self, node: Any, env: Env) -> tuple[str, ...]:
        return self._sets.locals_of(node, env)

    # ---- values that change nothing

    def is_run_itself(self, value: Value, run: str) -> bool:
        """Whether a value is, in every prompt, what the run itself has there."""
        whole = math.isclose(sum(c for c, _ in value.terms), 1)
        return whole and all(self._same(source, run) for _, source in value.terms)

    def _same(self, source: Any, run: str) -> bool:
        match source:
            case Itself():
                return True
            case FromWorld(world):
                return all(self._data.same(world, run))
            case Mean(world, over_positions, groups) if world not in self._values.other.worlds:
                n = len(self._data.records)
                is_alone = n == 1 or (groups is not None and len(set(groups)) == n)
                return not over_positions and is_alone and all(self._data.same(world, run))
            case _:
                return False


class OneExperiment:
    """The patches of one experiment. A part that takes some of the loop variables is kept for each choice of
    them."""

    def __init__(self, patches: Patches, clauses: Sequence[tree.Patch], run: str, ends: Ends):
        self._patches = patches
        self._ends = ends
        self._clauses = clauses
        self._run = run
        self._memo: dict[tuple[int, ...], tuple[Any, tuple[Any, ...]]] = {}
        self.values: set[Value] = set()
        """Every value that some cell has."""
        self.nothing: tuple[tree.Target, dict[str, Any]] | None = None
        """The first target that gave no cell, and the variables' values there."""

    def of_cell(self, env: Env) -> tuple[Patch, ...] | None:
        """A cell's patches, or None where it is none."""
        out: list[Patch] = []
        for clause in self._clauses:
            target = clause.target
            path: Found = self._kept(target, env, lambda t=target: self._patches.target(t, env, self._ends))
            if path is None:
                self.nothing = self.nothing or (target, dict(env))
                return None
            value: Value = self._kept(clause.value, env, lambda c=clause: self._value(c, env))
            self._patches.check_value(clause, path, value, self._ends)
            out.append(Patch(path, value, _is_complement(clause), clause.span))
        return tuple(out)

    def _value(self, clause: tree.Patch, env: Env) -> Value:
        found = self._patches.value(clause.value, env, self._run)
        self.values.add(found)
        return found

    def _kept(self, node: Any, env: Env, make: Callable[[], T]) -> T:
        local = tuple(env[name] for name in self._patches.locals_of(node, env))
        if len(local) == len(env) and local:
            return make()  # each choice of all the variables comes once
        key = (id(node), *map(id, local))
        if key not in self._memo:
            self._memo[key] = (make(), local)
        return self._memo[key][0]


def _is_complement(clause: tree.Patch) -> bool:
    """`patch all except ...`."""
    return clause.target.kind == "all" and clause.target.what is not None


def starts(path: Path) -> list[Step]:
    """The steps that a path can start with."""
    match path:
        case Step():
            return [path]
        case Seq(parts):
            return starts(parts[0]) if parts else []
        case Alt(parts):
            return [step for p in parts for step in starts(p)]
        case Star(part):
            return starts(part)


def stops(path: Path) -> list[Step]:
    """The steps that a path can end with."""
    match path:
        case Step():
            return [path]
        case Seq(parts):
            return stops(parts[-1]) if parts else []
        case Alt(parts):
            return [step for p in parts for step in stops(p)]
        case Star(part):
            return stops(part)
