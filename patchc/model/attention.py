"""Reading one attention block out of the graph: where its heads are projected, prepared, mixed and written.

Works on any fused layout of weights, by pushing row numbers through the operations that only move numbers.
What a block's place in the model is, `model.trace` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from patchc.model.export import Exported
from patchc.model.nodes import (
    MATMUL,
    MOVES,
    REPEATS,
    SDPA,
    SOFTMAX,
    A,
    cone,
    evaluate,
    is_pointwise,
    need,
    refusal,
    shape_of,
    single,
)
from patchc.model.outputs import Output, output_of


@dataclass(frozen=True)
class Port:
    """A projection: `linear`, and `whole`, which is split into heads: the same, or what a norm over all heads makes of
    it. Entry `first[h] + j` of `whole` is dimension j of head h.

    `head` is the projection seen as heads ([batch, pos, head, d] where `heads_last`, else [batch, head, pos,
    d]), `prepared` the same after rotary and the like, `operand` what the attention core reads, one per query
    head (both [batch, head, pos, d]).
    """

    linear: fx.Node
    whole: fx.Node
    head: fx.Node
    heads_last: bool
    first: tuple[int, ...]
    prepared: fx.Node
    operand: fx.Node

    @property
    def normed(self) -> bool:
        """Whether a head's projection depends on those of the others."""
        return self.whole is not self.linear


@dataclass(frozen=True)
class AttentionBlock:
    """`core` is z as [batch, head, pos, d], `weights` the softmax that makes the pattern, or the core itself where it
    is fused. Column `columns[h] + j` of the output weight reads dimension j of head h. `kv_head[h]` is what query
    head h reads."""

    leaf: fx.Node
    ports: tuple[Port, Port, Port]
    weights: fx.Node
    core: fx.Node
    output: Output
    columns: tuple[int, ...]
    kv_head: tuple[int, ...]
    d_head: int

    @property
    def n_heads(self) -> int:
        return len(self.columns)

    @property
    def n_kv_heads(self) -> int:
        return len(self.ports[1].first)


@dataclass
class AttentionReader:
    """Reads the attention block that ends in a leaf of the residual tree.

    `dynamic` says which nodes depend on the residual stream, `tree` which are sums of it.
    """

    exported: Exported
    dynamic: dict[fx.Node, bool]
    tree: set[fx.Node]

    def cores(self, inside: set[fx.Node]) -> list[fx.Node]:
        """Every attention pattern (a softmax over positions, or fused attention) among some nodes."""
        pos = self.exported.pos
        return [n for n in inside if n.target is SDPA or (n.target in SOFTMAX and pos in shape_of(n)[-1])]

    def read(self, leaf: fx.Node) -> AttentionBlock:
        weights, core, query, key, value = self._core(leaf)
        n_heads, d_head = int(shape_of(core)[1]), int(shape_of(core)[3])
        need(
            shape_of(core) == self._heads(n_heads, d_head),
            "attention whose output is not [batch, head, pos, d]",
            core,
        )
        q, k, v = (self._port(o, d_head) for o in (query, key, value))
        need(len(q[0].first) == n_heads, "attention with another number of queries than of outputs", core)
        need(
            k[1] == v[1] and len(k[0].first) == len(v[0].first),
            "keys and values are shared out differently",
            core,
        )
        need(q[1] == tuple(range(n_heads)), "queries that are shared by heads", core)
        kv_head = k[1] if len(k[1]) == n_heads else k[1] * n_heads  # one key/value head is broadcast
        need(len(kv_head) == n_heads, "keys are not one per query head", core)
        output = self._output(leaf)
        columns = self._columns(output.linear, core, n_heads, d_head)
        return AttentionBlock(leaf, (q[0], k[0], v[0]), weights, core, output, columns, kv_head, d_head)

    def _heads(self, heads: int, d_head: int) -> tuple[str, ...]:
        return (self.exported.batch, str(heads), self.exported.pos, str(d_head))

    def _back(self, node: fx.Node) -> fx.Node:
        """The only residual-dependent input."""
        return single((a for a in node.all_input_nodes if self.dynamic[a]), "two paths lead into attention here", node)

    # ---- the core
    def _core(self, leaf: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node, fx.Node]:
        """What makes the pattern, z and the core's three operands, these all [batch, head, pos, d]."""
        found = self.cores(cone(leaf, self.tree))
        need(len(found) == 1, f"{len(found)} attention patterns feed one write to the stream", leaf)
        node: Any = found[0]
        if node.target is SDPA:
            return node, node, node.args[0], node.args[1], node.args[2]
        after = self._applied(node)
        before = self._scores(node)
        need(
            self.dynamic[after.args[0]] and not self.cores(cone(after.args[1], self.tree)),
            "a pattern that is not applied from the left",
            after,
        )
        return node, after, before.args[0], self._untransposed(before.args[1]), after.args[1]

    def _applied(self, pattern: fx.Node) -> Any:
        """The product of a pattern, after whatever is done to each of its entries, with the values."""
        products, todo, seen = set[fx.Node](), [pattern], set[fx.Node]()
        while todo:
            for user in todo.pop().users:
                if user.target in MATMUL:
                    products.add(user)
                elif user not in seen:
                    need(is_pointwise(user), "between the attention pattern and its values stands", user)
                    seen.add(user)
                    todo.append(user)
        return single(products, "an attention pattern that is applied to more than one set of values", pattern)

    def _scores(self, pattern: fx.Node) -> Any:
        """The product of queries and keys that a pattern is the softmax of, query by query."""
        products, todo, seen = set[fx.Node](), [pattern], set[fx.Node]()
        while todo:
            for a in todo.pop().all_input_nodes:
                if a.target in MATMUL and self.dynamic[a]:
                    products.add(a)
                elif self.dynamic[a] and a not in seen:
                    need(is_pointwise(a) or _over_keys(a), "between the scores and the softmax stands", a)
                    seen.add(a)
                    todo.append(a)
        return single(products, "scores that are not one product of queries and keys", pattern)

    def _untransposed(self, keys: fx.Node) -> fx.Node:
        """Keys as [batch, head, pos, d], from the transposed right operand of the scores."""
        shape = shape_of(keys)
        swap = keys.target is A.transpose.int and {int(a) % 4 for a in keys.args[1:]} == {2, 3}  # type: ignore[arg-type]
        swap = swap or (keys.target is A.permute.default and keys.args[1] == [0, 1, 3, 2])
        source = keys.args[0] if keys.args else None
        need(
            len(shape) == 4 and swap and isinstance(source, fx.Node),
            "scores are not a product of queries and transposed keys",
            keys,
        )
        assert isinstance(source, fx.Node)
        return source

    # ---- the projections
    def _port(self, operand: fx.Node, d_head: int) -> tuple[Port, tuple[int, ...]]:
        """A projection, and for each head of the operand the head of the projection that it is."""
        linear, between = self._linear(operand)
        whole, head, first = self._head(linear, between, operand, d_head)
        prepared = self._prepared(operand, head, d_head)
        need(
            shape_of(prepared) == self._heads(len(first), d_head),
            "a projection that is not [batch, head, pos, d] in the end",
            prepared,
        )
        heads_last = shape_of(head)[1] == self.exported.pos
        return Port(linear, whole, head, heads_last, first, prepared, operand), self._shared(
            prepared, operand, len(first), d_head
        )

    def _linear(self, operand: fx.Node) -> tuple[fx.Node, set[fx.Node]]:
        """The one projection that an operand comes from, and the nodes between."""
        between, linears, todo = {operand}, set[fx.Node](), [operand]
        while todo:
            node = todo.pop()
            for a in node.all_input_nodes:
                if self.dynamic[a] and a not in between:
                    need(a not in self.tree, "attention reads the stream without a linear projection", node)
                    between.add(a)
                    if a.target is A.linear.default:
                        linears.add(a)
                    else:
                        todo.append(a)
        if len(linears) != 1:
            last = max(linears, key=self.exported.nodes.index, default=operand)
            need(
                False,
                f"an attention operand is made by {len(linears)} linear projections, not one; the last is",
                last,
            )
        return linears.pop(), between

    def _head(
        self, linear: fx.Node, between: set[fx.Node], operand: fx.Node, d_head: int
    ) -> tuple[fx.Node, fx.Node, tuple[int, ...]]:
        """What is split into heads, the last node at which it is just seen as heads, each head's first entry in it."""
        whole, path = linear, self._moved(linear, between)
        seen = [n for n in path if self._is_heads(n, d_head)]
        if not seen and (normed := self._normed(linear, between, operand)) is not None:
            whole = normed
            seen = [n for n in self._moved(whole, between) if self._is_heads(n, d_head)]
        blocking = next((u for u in path[-1].users if u in between), linear)
        need(seen, "a projection is used before it is split into heads", blocking)
        head = seen[-1]
        rows = self._labels(head, whole, int(shape_of(whole)[-1])).reshape(-1, d_head)
        need(bool((rows.diff(dim=1) == 1).all()), "the weight rows of a head do not stand together", head)
        need(rows.unique().numel() == rows.numel(), "heads share weight rows", head)
        return whole, head, tuple(int(r) for r in rows[:, 0])

    def _moved(self, node: fx.Node, between: set[fx.Node]) -> list[fx.Node]:
        """A node and what merely moves its numbers, one after the other."""
        path = [node]
        while len(nexts := [u for u in path[-1].users if u in between]) == 1 and nexts[0].target in MOVES:
            path.append(nexts[0])
        return path

    def _normed(self, linear: fx.Node, between: set[fx.Node], operand: fx.Node) -> fx.Node | None:
        """The last [batch, pos, width] through which alone an operand depends on its projection, where there is one."""
        inside = between & cone(operand, {linear})
        widths = (n for n in reversed(self.exported.nodes) if n in inside and n is not linear and self._is_rows(n))
        return next((n for n in widths if linear not in cone(operand, {n})), None)

    def _is_rows(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        return len(shape) == 3 and shape[:2] == (self.exported.batch, self.exported.pos) and shape[2].isdigit()

    def _is_heads(self, node: fx.Node, d_head: int) -> bool:
        shape, (b, s) = shape_of(node), (self.exported.batch, self.exported.pos)
        if len(shape) != 4 or shape[0] != b or shape[3] != str(d_head):
            return False
        return (shape[1] == s and shape[2].isdigit()) or (shape[2] == s and shape[1].isdigit())

    def _labels(self, node: fx.Node, source: fx.Node, count: int) -> Tensor:
        """Which entry of the last axis of `source` [1, 1, count] each entry of `node` is."""
        labels = torch.arange(count).reshape(1, 1, count)
        return evaluate(node, {source: labels, **self._ones()}, self.exported.module)

    def _ones(self) -> dict[fx.Node, Any]:
        """Every size of the input as 1."""
        return {n: 1 for n in self.exported.nodes if n.target is A.sym_size.int}

    def _prepared(self, operand: fx.Node, head: fx.Node, d_head: int) -> fx.Node:
        """Where keys and values are last one per key/value head: before they are repeated, if they are."""
        node = operand
        while node is not head and node.target in REPEATS:
            node = self._back(node)
            shape = shape_of(node)
            if len(shape) == 4 and shape == self._heads(int(shape[1]) if shape[1].isdigit() else -1, d_head):
                return node
        return operand

    def _shared(self, prepared: fx.Node, operand: fx.Node, heads: int, d_head: int) -> tuple[int, ...]:
        """For each head of `operand` the head of `prepared` that it is."""
        labels = torch.arange(heads * d_head).reshape(1, heads, 1, d_head)
        out = evaluate(operand, {prepared: labels, **self._ones()}, self.exported.module).reshape(-1, d_head)
        need(
            bool((out % d_head == torch.arange(d_head)).all()),
            "repeating keys changes their dimensions",
            operand,
        )
        return tuple(int(h) for h in out[:, 0] // d_head)

    # ---- the output
    def _output(self, leaf: fx.Node) -> Output:
        """The output projection, and what stands between it and the stream."""
        output = output_of(leaf, self.dynamic, self.tree)
        if isinstance(output, Output):
            return output
        raise refusal("between attention's output projection and the stream stands", output)

    def _columns(self, out: fx.Node, core: fx.Node, n_heads: int, d_head: int) -> tuple[int, ...]:
        """The first column of the output weight that reads each head."""
        node: Any = out.args[0]
        while node is not core:
            need(node.target in MOVES, "between attention and its output projection stands", node)
            node = self._back(node)
        labels = torch.arange(n_heads * d_head).reshape(1, n_heads, 1, d_head)
        flat: Any = out.args[0]
        order = evaluate(flat, {core: labels, **self._ones()}, self.exported.module)
        need(
            order.shape[:2] == (1, 1) and order.numel() == n_heads * d_head,
            "attention's output projection does not read every head",
            out,
        )
        column = order.flatten().argsort().reshape(n_heads, d_head)
        need(bool((column.diff(dim=1) == 1).all()), "the columns of a head do not stand together", out)
        return tuple(int(c) for c in column[:, 0])


def _over_keys(node: fx.Node) -> bool:
    """A reduction of each query's scores to one number."""
    return node.target in {A.all.dim, A.any.dim, A.amax.default} and node.args[1] in (-1, 3, [-1], [3])
