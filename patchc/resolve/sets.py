"""Expressions over nodes and paths to terms: unions, differences, chains, stars, places, lets and circuits.

An expression is resolved once for each choice of the local names in it, so that the cells of a sweep share
the parts that do not depend on its variables.
"""

from __future__ import annotations

from typing import Any

from patchc.diagnostics import RULES, PatchcError, Span
from patchc.ir.graph import ResidualGraph
from patchc.parse import tree
from patchc.parse.elsewhere import node_meant
from patchc.parse.parser import MAX_DEPTH, TOO_DEEP
from patchc.resolve.bindings import NO_LOCALS, Env, Number
from patchc.resolve.circuits import circuit, less_nodes, nodes_of
from patchc.resolve.indices import UNKNOWN_NODE
from patchc.resolve.places import Places, names_in
from patchc.resolve.scope import (
    NODE_NAMES,
    NOT_SUPPORTED_YET,
    NUMBER_DOMAINS,
    UNKNOWN_NAME,
    WRONG_KIND,
    Scope,
    gathered,
    written,
)
from patchc.resolve.selectors import Selectors
from patchc.resolve.terms import (
    BAD_DIFFERENCE,
    Chain,
    Circuit,
    Difference,
    Either,
    NodeSet,
    Repeat,
    Term,
    of_nodes,
    placed,
    union,
)

RECURSIVE_LET = RULES.add("recursive-let", "a let that is defined by itself")
ARGUMENT_COUNT = RULES.add("argument-count", "a let is given more or fewer sets than it has parameters")

_OF_NAMES = (UNKNOWN_NAME.code, UNKNOWN_NODE.code, RECURSIVE_LET.code)
"""What is wrong with a let whatever its parameters are."""
TERMS = (NodeSet, Chain, Either, Repeat, Circuit)


class Sets:
    """The set expressions of a spec."""

    def __init__(
        self,
        scope: Scope,
        graph: ResidualGraph,
        selectors: Selectors,
        places: Places,
        difference: Difference,
    ):
        self._scope = scope
        self._graph = graph
        self._selectors = selectors
        self._places = places
        self._difference = difference
        self._names: dict[int, tuple[str, ...]] = {}
        self._memo: dict[tuple[int, ...], tuple[Term, tuple[Any, ...]]] = {}
        self._open: list[str] = []
        self._circles: list[set[str]] = []
        """Lets that are defined by one another, which has been reported."""

    def term(self, node: tree.Set, env: Env) -> Term:
        """What an expression stands for."""
        local = tuple(env[name] for name in self.locals_of(node, env))
        key = (id(node), *map(id, local))
        found = self._memo.get(key)
        if found is None:
            # The bindings are kept with the result: a key holds their ids.
            found = self._memo[key] = (self._resolve(node, env), local)
        return found[0]

    def once(self, node: tree.Set, env: Env) -> Term:
        """The same of an expression that is asked for once with these local names: only its parts are kept."""
        return self._resolve(node, env) if env else self.term(node, env)

    def nodes(self, node: tree.Set, env: Env, what: str = "a set of nodes") -> NodeSet:
        """What an expression stands for, where only nodes will do."""
        term = self.term(node, env)
        if isinstance(term, NodeSet):
            return term
        raise WRONG_KIND.error(f"this is a path, and {what} is needed here", span=node.span)

    def locals_of(self, node: Any, env: Env) -> tuple[str, ...]:
        """The local names that an expression has in it."""
        names = self._names.get(id(node))
        if names is None:
            names = self._names[id(node)] = tuple(sorted({n for n in names_in(node) if n in env}))
        return names

    def check_let(self, let: tree.Let) -> None:
        """Resolve a let for its errors; of one with parameters, for the names in it that mean nothing."""
        if not let.parameters:
            self._of_let(let, let.name)
            return
        anything = NodeSet(of_nodes(self._graph, self._graph.all))
        try:
            self._inside(let, let.name, {p.text: anything for p in let.parameters})
        except PatchcError as error:
            raise PatchcError(d for d in error.diagnostics if d.code in _OF_NAMES) from None

    # ---- by construct

    def _resolve(self, node: tree.Set, env: Env) -> Term:
        match node:
            case tree.Ref():
                return self._ref(node, env)
            case tree.Group():
                return self._sited(self.term(node.inner, env), node.sites, env, node.span)
            case tree.Call():
                return self._call(node, env)
            case tree.Star():
                return Repeat(self.term(node.inner, env), node.span)
            case tree.Placed():
                return self._placed(node, env)
            case tree.Sequence():
                return Chain(tuple(gathered(node.steps, lambda step: self.term(step, env))), node.span)
            case tree.Union():
                return self._union(gathered(node.parts, lambda part: self.term(part, env)), node.span)
            case tree.Difference():
                return self._without(node, env)

    def _sited(self, term: Term, sites: tuple[tree.Site, ...], env: Env, span: Span | None) -> Term:
        if not sites:
            return term
        if isinstance(term, NodeSet):
            return self._selectors.at_sites(term, sites, env, span)
        raise WRONG_KIND.error("a path has no site; write the site at one of its steps", span=sites[0].span)

    def _placed(self, node: tree.Placed, env: Env) -> NodeSet:
        inner = self.nodes(node.inner, env, "`@` belongs to one step; a set of nodes")
        return placed(inner, self._places.tokens(node.place, env), node.span)

    def _union(self, parts: list[Term], span: Span | None) -> Term:
        sets = [p for p in parts if isinstance(p, NodeSet)]
        if len(sets) == len(parts):
            return union(sets, span)
        distinct = {id(p): p for p in parts}  # what a let stands for is one object: lets that double stay small
        return Either(tuple(distinct.values()), span) if len(distinct) > 1 else parts[0]

    def _without(self, node: tree.Difference, env: Env) -> NodeSet | Circuit:
        terms = gathered(node.parts, lambda part: self.term(part, env))
        sets = [t for t in terms if isinstance(t, NodeSet)]
        if isinstance(terms[0], Circuit) and len(sets) == len(terms) - 1:
            return self._less(terms[0], sets, node.span)
        if len(sets) != len(terms):
            less = written(node.parts[1]) if len(node.parts) == 2 else "(...) | (...)"
            message = "paths are not taken out of paths; `patch all except` is every path but those that it names"
            raise BAD_DIFFERENCE.error(message, fix=f"write `patch all except {less}`", span=node.span)
        whole = sets[0]
        for less in sets[1:]:
            whole = self._difference.of(whole, less, node.span)
        return whole

    def _less(self, of: Circuit, sets: list[NodeSet], span: Span | None) -> Circuit:
        for less in sets:
            of = less_nodes(self._difference, of, less, span)
        return of

    # ---- names

    def _ref(self, node: tree.Ref, env: Env) -> Term:
        name = node.name.text
        if name in env:
            self._no_indices(node)
            return self._sited(self._of_local(node, env), node.sites, env, node.span)
        if name in self._scope.lets:
            self._no_indices(node)
            return self._sited(self._of_let(self._scope.lets[name], node.name), node.sites, env, node.span)
        if name in NODE_NAMES:
            return self._selectors.at_sites(self._selectors.select(node, env), node.sites, env, node.span)
        if name in NUMBER_DOMAINS:
            message = f"{name!r} are numbers to range over (`for l in {name}`), not nodes"
            raise WRONG_KIND.error(message, fix="did you mean `head`?" if name == "heads" else None, span=node.span)
        known = [*(n for n, b in env.items() if isinstance(b, TERMS)), *self._scope.lets, *NODE_NAMES]
        raise self._scope.not_a("a set of nodes", node.name, known, _meant(node))

    def _no_indices(self, node: tree.Ref) -> None:
        if node.indices:
            raise WRONG_KIND.error(f"{node.name.text!r} takes no index", span=node.span)

    def _of_local(self, node: tree.Ref, env: Env) -> Term:
        bound = env[node.name.text]
        if isinstance(bound, TERMS):
            return bound
        name = node.name.text
        fix = _of_number(name, bound.unit) if isinstance(bound, Number) else None
        message = f"{name!r} ranges over {type(bound).__name__.lower()}s, not nodes"
        raise WRONG_KIND.error(message, fix=fix, span=node.span)

    def _of_let(self, let: tree.Let, name: tree.Name) -> Term:
        if let.parameters:
            takes = ", ".join(p.text for p in let.parameters)
            raise ARGUMENT_COUNT.error(
                f"{let.name.text!r} takes {takes}", fix=f"write `{let.name.text}({takes})`", span=name.span
            )
        return self._inside(let, name, NO_LOCALS)

    def _inside(self, let: tree.Let, name: tree.Name, env: Env) -> Term:
        if let.name.text in self._open:
            circle = self._open[self._open.index(let.name.text) :]
            if set(circle) in self._circles:
                raise PatchcError(())
            self._circles.append(set(circle))
            chain = " -> ".join([*circle, let.name.text])
            raise RECURSIVE_LET.error(f"{let.name.text!r} is defined by itself ({chain})", span=name.span)
        if len(self._open) >= MAX_DEPTH:
            raise TOO_DEEP.error(f"lets stand in one another deeper than {MAX_DEPTH} here", span=name.span)
        self._open.append(let.name.text)
        try:
            return self.term(let.value, env)
        finally:
            self._open.pop()

    # ---- calls

    def _call(self, node: tree.Call, env: Env) -> Term:
        name = node.name.text
        if name == "circuit":
            return self._circuit(node, env)
        if name == "nodes":
            return self._nodes_of(node, env)
        if name == "edges":
            raise NOT_SUPPORTED_YET.error("edges(...) of a circuit is not supported yet", span=node.span)
        let = self._scope.lets.get(name)
        if let is None:
            known = [n for n, other in self._scope.lets.items() if other.parameters] + ["circuit"]
            raise self._scope.not_a("a let with parameters", node.name, known)
        if len(node.arguments) != len(let.parameters):
            takes = f"takes {len(let.parameters)} sets" if let.parameters else "takes no sets"
            raise ARGUMENT_COUNT.error(f"{name!r} {takes}, not {len(node.arguments)}", span=node.span)
        given = [self._argument(a, env) for a in node.arguments]
        return self._inside(let, node.name, dict(zip((p.text for p in let.parameters), given, strict=True)))

    def _argument(self, node: tree.Set | tree.Text | tree.Parameter, env: Env) -> Term:
        if isinstance(node, tree.Text | tree.Parameter):
            raise WRONG_KIND.error("a set of nodes or a path is needed here, not a text", span=node.span)
        return self.term(node, env)

    def _nodes_of(self, node: tree.Call, env: Env) -> NodeSet:
        terms = [self._argument(a, env) for a in node.arguments]
        if len(terms) == 1 and isinstance(terms[0], Circuit):
            return nodes_of(self._graph, terms[0], node.span)
        raise WRONG_KIND.error("nodes(...) takes one circuit", fix="as in `nodes(circuit(...))`", span=node.span)

    def _circuit(self, node: tree.Call, env: Env) -> Term:
        for argument in node.arguments:
            if isinstance(argument, tree.Text | tree.Parameter):
                raise NOT_SUPPORTED_YET.error("circuit files are not supported yet; list the edges", span=node.span)
        return circuit(self._graph, [self._argument(a, env) for a in node.arguments], node.span)


def _meant(node: tree.Ref) -> str | None:
    """The fix for a node in another tool's spelling: `hook_z[3, 1]`, `blocks[3].attn`, `L3H1`."""
    names = [node.name.text, *(name.text for site in node.sites for name in site.names)]
    indices = [*node.indices, *(index for site in node.sites for index in site.indices)]
    meant = node_meant(".".join(names), [written(index) for index in indices])
    return f"write `{meant}`" if meant else None


def _of_number(name: str, unit: str | None) -> str | None:
    """The fix for a number that stands for a node."""
    if unit == "head":
        return f"write `for {name} in head` to range over heads, or `head[l, {name}]` for one of a layer"
    if unit == "layer":
        return f"as in `mlp[{name}]` or `resid_pre[{name}]`"
    return f"as in `head[3, 1] @ {name}`" if unit == "position" else None
