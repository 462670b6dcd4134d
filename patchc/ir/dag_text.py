"""A variant DAG as text: one variant a line, what it is made of, and the tokens at which it may differ from the base
run.

Token sets are printed as positions of each prompt; `all` is every token.
"""

from __future__ import annotations

from collections.abc import Iterable

from patchc.ir.bits import bits
from patchc.ir.dag import Dag
from patchc.ir.graph import PORTS
from patchc.ir.ops import (
    SCORES,
    Const,
    Core,
    Entries,
    HeadZ,
    Masked,
    Mix,
    Neurons,
    Op,
    Out,
    PostNorm,
    Projected,
    Replaced,
    ReplacedNeurons,
    Run,
    Scale,
    StoredZ,
    Stream,
    Sum,
    Tokenwise,
    VariantId,
)
from patchc.ir.paths import Site
from patchc.ir.tokens import Tokens
from patchc.ir.value_text import ValueText
from patchc.ir.wording import Wording


def dag_text(dag: Dag, roots: Iterable[VariantId]) -> str:
    """Every variant in order, then the cells' roots."""
    lines = [f"v{i} = {_op(dag, op)}  @ {positions(dag, dag.changed[i])}" for i, op in enumerate(dag.ops) if i]
    lines += [f"root = {_name(r)}" for r in roots]
    return "\n".join(lines)


def positions(dag: Dag, tokens: Tokens) -> str:
    """A token set: `all`, or the positions of each prompt that has some."""
    if tokens == dag.layout.all:
        return "all"
    parts = [(prompt, ",".join(map(str, bits(here)))) for prompt, here in dag.layout.split(tokens)]
    if dag.layout.n_prompts == 1:
        return parts[0][1] if parts else "nowhere"
    return "; ".join(f"{prompt}: {here}" for prompt, here in parts) or "nowhere"


def _name(variant: VariantId) -> str:
    return f"v{variant}" if variant else "base"


def _op(dag: Dag, op: Op) -> str:
    match op:
        case Const(block, members, value, _, site):
            where = "" if site is Site.OUT else f".{site}"
            return f"stored {_members(dag, block, members)}{where} of {_value(dag, value)}"
        case Stream(rank, value, _):
            return f"stored stream below rank {rank} of {_value(dag, value)}"
        case Core(block, q, k, v, replaced):
            inputs = ", ".join(f"{p}: {_name(x)}" for p, x in zip(PORTS, (q, k, v), strict=True))
            return f"attention {dag.graph.blocks[block].layer}({inputs})" + "".join(_replaced(dag, r) for r in replaced)
        case Out(core, heads):
            block = dag.ops[core]
            assert isinstance(block, Core)
            return f"{_members(dag, block.block, heads)} of {_name(core)}"
        case Projected(block, port, head, x, replaced):
            return f"{_members(dag, block, 1 << head)}.{PORTS[port]}({_name(x)})" + "".join(
                _replaced(dag, r) for r in replaced
            )
        case Entries(block, head, port, q, k, replaced):
            name = f"{_members(dag, block, 1 << head)}.{'scores' if port == SCORES else 'pattern'}"
            return f"{name}(q: {_name(q)}, k: {_name(k)})" + "".join(_replaced(dag, r) for r in replaced)
        case Neurons(block, x, replaced):
            layer = dag.graph.blocks[block].layer
            return f"mlp[{layer}].post({_name(x)})" + "".join(_neurons(dag, r) for r in replaced)
        case HeadZ(core, head):
            block = dag.ops[core]
            assert isinstance(block, Core)
            return f"{_members(dag, block.block, 1 << head)}.z of {_name(core)}"
        case StoredZ(block, head, value, _):
            return f"stored {_members(dag, block, 1 << head)}.z of {_value(dag, value)}"
        case Tokenwise(block, x, replaced):
            return f"mlp[{dag.graph.blocks[block].layer}]({_name(x)})" + "".join(_neurons(dag, r) for r in replaced)
        case PostNorm(block, x):
            return f"norm of attn_out[{dag.graph.blocks[block].layer}]({_name(x)})"
        case Sum(parts):
            return " + ".join(map(_name, parts))
        case Scale(factor, x):
            return f"{factor:g} * {_name(x)}"
        case Mix(parts):
            return " | ".join(f"{_name(x)} @ {positions(dag, tokens)}" for tokens, x in parts)
        case Masked(x, starts):
            return _name(x) + "".join(f" -> {_name(v)} by mask {m}" for m, _, v in starts)
        case Run(rank, x):
            return f"run from rank {rank}({_name(x)})"


def _members(dag: Dag, block: int, members: int) -> str:
    first = dag.graph.blocks[block].first
    return " ".join(dag.graph.nodes[first + i].name for i in bits(members))


def _replaced(dag: Dag, r: Replaced) -> str:
    site = f"{(*PORTS, 'scores', 'pattern')[r.port]} of heads {_numbers(r.heads)}"
    looking = f", looking at {positions(dag, r.sources)}" if r.port >= SCORES else ""
    return f" with {site} = {_value(dag, r.value)} @ {positions(dag, r.tokens)}{looking}"


def _neurons(dag: Dag, r: ReplacedNeurons) -> str:
    every = r.neurons == (1 << dag.graph.d_mlp) - 1
    which = "all neurons" if every else f"neurons {_numbers(r.neurons)}"
    return f" with {which} = {_value(dag, r.value)} @ {positions(dag, r.tokens)}"


def _numbers(members: int) -> str:
    return ",".join(map(str, bits(members)))


def _value(dag: Dag, value: int) -> str:
    return ValueText(Wording(dag.layout)).value(dag.values[value])
