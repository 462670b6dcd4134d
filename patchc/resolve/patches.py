"""The patches of a cell: target and value, checked. What does not depend on a loop variable is resolved once.

In a sweep a target that no path of the model matches (a pair that is no edge) gives no cell; elsewhere it is
an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from patchc.diagnostics import RULES, Diagnostic, PatchcError, Span
from patchc.ir.experiment import FromWorld, Given, Itself, Mean, Patch, Value
from patchc.ir.graph import Kind, ResidualGraph
from patchc.ir.paths import Alt, Path, Seq, Site, Star, Step
from patchc.parse import tree
from patchc.resolve.bindings import Env
from patchc.resolve.data import Dataset
from patchc.resolve.legality import BACKWARD_EDGE, NO_POSITION, Legality, Reach
from patchc.resolve.paths import BAD_START, Paths
from patchc.resolve.scope import WRONG_KIND
from patchc.resolve.sets import Sets
from patchc.resolve.tensors import TENSOR_SHAPE, Tensors
from patchc.resolve.terms import NodeSet, Term
from patchc.resolve.values import Values

WORLDS_EQUAL = RULES.add("worlds-equal", "an experiment whose patches give every node what the run itself has there")

T = TypeVar("T")
Found = Path | None


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
        self._tensors = tensors
        self._legality = Legality(graph)

    def cells(self, clauses: Sequence[tree.Patch], run: str) -> OneExperiment:
        """The patches of one experiment, to be asked for cell by cell."""
        return OneExperiment(self, clauses, run)

    # ---- targets

    def target(self, node: tree.Target, env: Env) -> Found:
        """The paths of a target; None where loop variables make it one that the model has no path for."""
        if node.what is None:
            return self._paths.everything()
        term = self._sets.term(node.what, env)
        path = self._path(node, term)
        if not self._sets.locals_of(node.what, env):
            self._check(node, term, path)
        return path if self._legality.lowest(path) is not None else None

    def _path(self, node: tree.Target, term: Term) -> Path:
        span = node.what.span if node.what else node.span
        match node.kind:
            case "node":
                return self._paths.node(term, span)
            case "edge":
                return self._paths.edge(term, span)
            case "path":
                return self._paths.path(term, span)
            case "all":
                if isinstance(term, NodeSet):
                    message = "`patch all except` takes paths, and these are nodes"
                    fix = "write `circuit(...)` of the nodes, or `a -> b -> logits`"
                    raise WRONG_KIND.error(message, fix=fix, span=span)
                return self._paths.path(term, span)

    def _check(self, node: tree.Target, term: Term, path: Path) -> None:
        """The rank rule for every alternative as written, and that some position takes every step."""
        if fault := self.fault(node, term):
            raise PatchcError([fault])
        constants = self._graph.of(Kind.ATTN_BIAS)
        if all(not step.nodes & ~constants for step in starts(path)):
            raise BAD_START.error("a bias is the same in every run: no value changes it", span=term.span)
        reach = Reach(self._graph, self._data.layout)
        if not reach.end(path):
            message = (
                "no position takes every step of this path: a value stays at its position, except that "
                "a head's k and v move it to later ones"
            )
            raise NO_POSITION.error(message, span=node.what.span if node.what else node.span)

    def fault(self, node: tree.Target, term: Term) -> Diagnostic | None:
        """Why a target has no path in the model, in the words of the spec."""
        fault = self._legality.fault(term)
        if fault is None and self._legality.lowest(self._path(node, term)) is None:
            fault = BACKWARD_EDGE.at(None, "the model has no such path: every edge leads from a node to a later one")
        return fault.at(node.what.span if node.what else node.span) if fault else None

    def why_none(self, node: tree.Target, env: Env) -> Diagnostic | None:
        """The fault of a target that gave no cell."""
        return self.fault(node, self._sets.term(node.what, env)) if node.what else None

    # ---- values

    def value(self, node: tree.Value, env: Env, run: str) -> Value:
        return self._values.value(node, env, run)

    def check_width(self, path: Path, value: Value, span: Span | None) -> None:
        """A tensor is as wide as what it replaces."""
        keys = [source.key for _, source in value.terms if isinstance(source, Given)]
        if keys:
            self._check_one_node(path, span)
        for site in {step.site for step in starts(path)} if keys else ():
            width = self._graph.d_head if site in (Site.Q, Site.K, Site.V) else self._graph.d_model
            for key in keys:
                shape = self._tensors.shapes[key]
                if shape != (width,):
                    message = f"tensor {key!r} has shape {list(shape)}, and what it replaces has [{width}]"
                    raise TENSOR_SHAPE.error(message, span=span)

    def _check_one_node(self, path: Path, span: Span | None) -> None:
        """A tensor is the output of one node: of several together it would be unclear whether each writes it."""
        for step in starts(path):
            if step.site is Site.Z:
                fix = "patch the head itself, with what it writes: [d_model]"
                raise TENSOR_SHAPE.error("a tensor cannot stand for a head's z", fix=fix, span=span)
            if step.site is Site.OUT and step.nodes.bit_count() != 1:
                names = ", ".join(n.name for n in self._graph.members(step.nodes)[:3])
                message = f"a tensor takes the place of one node, and this start is several ({names}, ...)"
                raise TENSOR_SHAPE.error(message, fix="sweep over the nodes, or name one", span=span)

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
            case Mean(world, over_positions):
                return not over_positions and len(self._data.records) == 1 and all(self._data.same(world, run))
            case _:
                return False


class OneExperiment:
    """The patches of one experiment. A part that takes some of the loop variables is kept for each choice of
    them."""

    def __init__(self, patches: Patches, clauses: Sequence[tree.Patch], run: str):
        self._patches = patches
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
            path: Found = self._kept(target, env, lambda t=target: self._patches.target(t, env))
            if path is None:
                self.nothing = self.nothing or (target, dict(env))
                return None
            value: Value = self._kept(clause.value, env, lambda c=clause: self._value(c, env))
            self._patches.check_width(path, value, clause.value.span)
            out.append(Patch(path, value, target.kind == "all" and target.what is not None, clause.span))
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
