"""The proof that goes with every trace: the pieces are the model, and its structure is what the graph says.

Equal logits alone prove nothing about structure, so each block is compared with the traced graph by itself,
on the traced graph's own values, and positions, heads and causality are tried out. The first difference is
named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from patchc.diagnostics import RULES, PatchcError
from patchc.ir.graph import BlockKind, ResidualGraph
from patchc.ir.tokens import Layout
from patchc.model.attention import AttentionReader
from patchc.model.export import Logits
from patchc.model.nodes import NOT_UNDERSTOOD, path_of
from patchc.model.pieces import TracedPieces

NOT_THE_MODEL = RULES.add("trace-differs", "a traced part does not compute what the model computes", exit=3)
NOT_FINITE = RULES.add("model-not-finite", "the model's own logits hold NaN or infinity", exit=3)

SHAPES = ((1, 2), (3, 5), (2, 11))
"""Shapes of the ids that are tried, none the traced one; cut to the model's context."""
CROWDS = ((3, 1.0), (64, 1.0), (17, 1e-3), (128, 1e-3))
"""Lists of tokens that experts are tried on: how many, and how unlike."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of a part, as a share of the largest value; float32 parts measure 1e-6."""


def prove(pieces: TracedPieces, model: nn.Module, config_layers: int | None) -> None:
    """Check pieces against the model in eval mode; raises at the first difference."""
    count_layers(pieces, config_layers)
    Prover(pieces, model).run()


def count_layers(pieces: TracedPieces, config_layers: int | None) -> None:
    """As many layers as the config says and as many attention cores as the whole graph has."""
    structure = pieces.structure
    layers, cores = len(structure.layers), len(_cores(pieces))
    if layers != cores:
        raise NOT_UNDERSTOOD.error(
            f"the model has {cores} attention cores, but {layers} write into its residual stream"
        )
    if config_layers is not None and layers != config_layers:
        raise NOT_UNDERSTOOD.error(
            f"the model's config says {config_layers} layers, but {layers} write into its residual stream"
        )


def _cores(pieces: TracedPieces) -> list[fx.Node]:
    s = pieces.structure
    return AttentionReader(s.exported, s.dynamic, set(s.tree)).cores(set(s.exported.nodes))


def is_causal(pieces: TracedPieces) -> bool:
    """Whether no attention reads a later position: by its masks, and by trying random values."""
    return all(_layer_is_causal(pieces, layer) for layer in range(len(pieces.structure.layers)))


@torch.no_grad()
def _layer_is_causal(pieces: TracedPieces, layer: int) -> bool:
    return all(
        _looks_back(pieces, layer, n) and _ignores_later(pieces, layer, n) for n in _lengths(pieces.graph, (2, 9, 33))
    )


def _lengths(graph: ResidualGraph, wanted: Sequence[int]) -> list[int]:
    return sorted({min(n, graph.n_ctx) if graph.n_ctx else n for n in wanted})


def _looks_back(pieces: TracedPieces, layer: int, n: int) -> bool:
    """With equal scores the weights are the mask's alone, and none may lie above the diagonal."""
    q, values = _zeros(pieces, n, n), _zeros(pieces, n, n)
    values[torch.arange(n), torch.arange(n)] = 1  # computation c shows the weight that every query gives to key c
    weights = _attend(pieces, layer, q, q, values, n)[..., 0].permute(2, 1, 0)  # [head, query, key]
    return bool((weights.triu(1) == 0).all())


def _ignores_later(pieces: TracedPieces, layer: int, n: int) -> bool:
    """Large changes of q, k and v after a position leave z before it as it was, to the bit."""
    generator = torch.Generator().manual_seed(n)
    shape = (1, n, pieces.graph.n_heads, pieces.graph.d_head)
    q, k, v = (3 * torch.randn(shape, generator=generator).to(pieces.device, pieces.dtype) for _ in range(3))
    at = max(1, n // 2)
    before = _attend(pieces, layer, q, k, v, n)[:, :at]
    for x in (q, k, v):
        x[:, at:] = 50 * torch.randn(x[:, at:].shape, generator=generator).to(x)
    return bool(torch.equal(before, _attend(pieces, layer, q, k, v, n)[:, :at]))


@torch.no_grad()
def prove_parts(pieces: TracedPieces) -> None:
    """Attention of some heads, queries and keys gives the rows that the whole gives: what sweeps rely on."""
    (n,) = _lengths(pieces.graph, (7,))
    generator = torch.Generator().manual_seed(0)
    shape = (2, n, pieces.graph.n_heads, pieces.graph.d_head)
    q, k, v = (torch.randn(shape, generator=generator).to(pieces.device, pieces.dtype) for _ in range(3))
    some, tables = max(1, n // 2), pieces.tables(Layout((n,)))
    positions = torch.arange(some, device=pieces.device).repeat(2, 1)
    n_keys = some if pieces.graph.causal else n
    for layer in range(len(pieces.structure.layers)):
        whole = _attend(pieces, layer, q, k, v, n)[:, :some]
        for h in range(pieces.graph.n_heads):
            parts = (q[:, :some, [h]], k[:, :n_keys, [h]], v[:, :n_keys, [h]])
            try:
                part = pieces.attend(layer, *parts, positions, n, tables, [h])
            except RuntimeError as error:
                message = f"attention {layer} cannot be computed for some heads and keys: {error}"
                raise NOT_UNDERSTOOD.error(message) from None
            if not torch.allclose(part, whole[:, :, [h]], rtol=0, atol=TOLERANCE.get(pieces.dtype, 1e-1) * 10):
                raise NOT_UNDERSTOOD.error(f"attention {layer} differs where only head {h} and some keys are computed")


@torch.no_grad()
def prove_insides(pieces: TracedPieces) -> None:
    """What a spec may reach inside nodes gives the whole node again; where it does not, `pieces.not_apart` says so."""
    (n,) = _lengths(pieces.graph, (7,))
    for layer in range(len(pieces.structure.layers)):
        for what, check in (("scores", _scores_give_z), ("neurons", _neurons_give_the_mlp)):
            if (what, layer) in pieces.not_apart:
                continue
            try:
                if not check(pieces, layer, n):
                    pieces.not_apart[what, layer] = "put together again they do not give what it computes"
            except (RuntimeError, PatchcError) as error:
                pieces.not_apart[what, layer] = str(error).splitlines()[0]


def _scores_give_z(pieces: TracedPieces, layer: int, n: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    shape = (2, n, pieces.graph.n_heads, pieces.graph.d_head)
    q, k, v = (torch.randn(shape, generator=generator).to(pieces.device, pieces.dtype) for _ in range(3))
    positions = torch.arange(n, device=pieces.device).expand(2, n)
    scores = pieces.scores(layer, q, k, positions, n, pieces.tables(Layout((n,))))
    z = torch.einsum("chqk,ckhd->cqhd", scores.softmax(-1), v)
    return _close(pieces, z, _attend(pieces, layer, q, k, v, n))


def _neurons_give_the_mlp(pieces: TracedPieces, layer: int, n: int) -> bool:
    if pieces.structure.layers[layer].mlp is None:
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((n, pieces.graph.d_model), generator=generator).to(pieces.device, pieces.dtype)
    post = pieces.mlp_post(layer, x)
    every = range(post.shape[1])
    bias = pieces.mlp_down(layer, torch.zeros_like(post))
    whole = pieces.mlp(layer, x)
    adds_up = not pieces.neurons_add_up(layer) or _close(pieces, pieces.neurons(layer, post, every) + bias, whole)
    return adds_up and _close(pieces, pieces.mlp_down(layer, post), whole)


def _close(pieces: TracedPieces, got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=0, atol=TOLERANCE.get(pieces.dtype, 1e-1) * 10)


def _zeros(pieces: TracedPieces, c: int, n: int) -> Tensor:
    return torch.zeros((c, n, pieces.graph.n_heads, pieces.graph.d_head), device=pieces.device, dtype=pieces.dtype)


def _attend(pieces: TracedPieces, layer: int, q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
    positions = torch.arange(n, device=pieces.device).expand(q.shape[0], n)
    return pieces.attend(layer, q, k, v, positions, n, pieces.tables(Layout((n,))))


class _Trace(fx.Interpreter):
    """Runs the canonical graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted, self.values = wanted, dict[fx.Node, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.values[n] = value
        return value


class Prover:
    """Compares pieces with the traced graph, block by block, and that with the model."""

    def __init__(self, pieces: TracedPieces, model: nn.Module) -> None:
        self.pieces, self.model = pieces, model
        self.tolerance = TOLERANCE.get(pieces.dtype, 1e-1)
        self.generator = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def run(self) -> None:
        for batch, length in SHAPES:
            length = min(length, self.pieces.graph.n_ctx) if self.pieces.graph.n_ctx else length
            ids = torch.randint(0, self.pieces.graph.d_vocab, (batch, length), generator=self.generator)
            self._one(ids.to(self.pieces.device))
        self._rows_are_independent()

    def _one(self, ids: Tensor) -> None:
        values = self._traced(ids)
        logits = values[self.pieces.structure.exported.logits]
        want = Logits(self.model)(ids)
        if not bool(torch.isfinite(want).all()):
            raise NOT_FINITE.error(
                "the model gives logits that are NaN or infinite for some token ids of its vocabulary"
            )
        self._compare(logits, want, "the traced graph's logits")
        self._blocks(ids, values)
        stream = self._composed(ids)
        self._compare(stream, values[self.pieces.structure.final].flatten(0, 1), "the sum of all writers")
        self._compare(self.pieces.unembed(stream), logits.flatten(0, 1), "the composed model's logits")

    def _traced(self, ids: Tensor) -> dict[fx.Node, Tensor]:
        s = self.pieces.structure
        wanted = {s.exported.logits, s.final, *s.embeddings}
        for layer in s.layers:
            wanted |= {layer.entry, layer.attention.leaf, layer.attention.output.linear}
            if layer.mlp is not None and layer.mlp_entry is not None:
                wanted |= {layer.mlp, layer.mlp_entry}
        trace = _Trace(s.exported.module, wanted)
        trace.run(ids)
        return trace.values

    def _compare(self, got: Tensor, want: Tensor, what: str) -> None:
        got, want = got.float(), want.float()
        difference = (got - want).abs().max().item()
        allowed = self.tolerance * max(want.abs().max().item(), 1e-6)
        if not difference <= allowed:  # also where it is NaN
            raise NOT_THE_MODEL.error(
                f"{what} differ from the model's by {difference:.2e}, where {allowed:.2e} is allowed"
            )

    # ---- block by block, on the traced graph's own values
    def _blocks(self, ids: Tensor, values: dict[fx.Node, Tensor]) -> None:
        s = self.pieces.structure
        for node, mine in zip(s.embeddings, self.pieces.embed(ids), strict=True):
            self._compare(mine, values[node].expand_as(mine), f"the outputs of `{path_of(node)}`")
        for i, layer in enumerate(s.layers):
            x = values[layer.entry].expand(*ids.shape, -1).flatten(0, 1)
            self._attention_block(i, x, ids.shape, values)
            if layer.mlp is not None and layer.mlp_entry is not None:
                x = values[layer.mlp_entry].expand(*ids.shape, -1).flatten(0, 1)
                self._compare(
                    self.pieces.mlp(i, x),
                    values[layer.mlp].flatten(0, 1),
                    f"the outputs of MLP {i} (`{path_of(layer.mlp)}`)",
                )

    def _attention_block(self, i: int, x: Tensor, shape: Sequence[int], values: dict[fx.Node, Tensor]) -> None:
        block = self.pieces.structure.layers[i].attention
        path = path_of(block.output.linear)
        together = self.heads_and_bias(i, x, shape)
        if block.output.post_norm:
            raw = values[block.output.linear].flatten(0, 1)
            self._compare(together, raw, f"what the heads of attention {i} write (`{path}`)")
        mine = self.pieces.post_norm(i, together)
        self._compare(mine, values[block.leaf].flatten(0, 1), f"the outputs of attention {i} (`{path}`)")

    def attention(self, layer: int, x: Tensor, shape: Sequence[int]) -> Tensor:
        """What an attention block adds to the stream, [n, D], for the tokens of some equally long prompts."""
        return self.pieces.post_norm(layer, self.heads_and_bias(layer, x, shape))

    def heads_and_bias(self, layer: int, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same before a post-norm."""
        p, (batch, length) = self.pieces, shape
        tables = p.tables(Layout((length,) * batch))
        tokens = torch.arange(batch * length, device=p.device)
        q, k, v = (
            p.prepare(layer, port, p.project(layer, port, p.norm(layer, port, x)), tokens, tables).unflatten(
                0, (batch, length)
            )
            for port in range(3)
        )
        shared = [p.kv_head(h) for h in range(p.graph.n_heads)]
        positions = torch.arange(length, device=p.device).expand(batch, length)
        z = p.attend(layer, q, k[:, :, shared], v[:, :, shared], positions, length, tables).flatten(0, 1)
        bias = p.attn_bias(layer)
        return p.write(layer, z) if bias is None else p.write(layer, z) + bias

    def _composed(self, ids: Tensor) -> Tensor:
        """The final stream, [n, D], by the pieces alone."""
        p, graph = self.pieces, self.pieces.graph
        written = p.embed(ids).sum(0).flatten(0, 1)
        stream, rank = written, 0
        for block in graph.blocks:
            if block.kind is BlockKind.EMBED or block.layer is None:
                continue
            if block.rank != rank:
                stream, rank = written, block.rank
            attention = block.kind is BlockKind.ATTENTION
            out = self.attention(block.layer, stream, ids.shape) if attention else p.mlp(block.layer, stream)
            written = written + out
        return written

    # ---- what the compiler takes for granted besides
    def _rows_are_independent(self) -> None:
        p, n = self.pieces, 6
        x = torch.randn((n, p.graph.d_model), generator=self.generator).to(p.device, p.dtype)
        other = x.clone()
        other[n // 2] = 10 * torch.randn(p.graph.d_model, generator=self.generator).to(x)
        keep = torch.arange(n, device=p.device) != n // 2
        tables, tokens = p.tables(Layout((n,))), torch.arange(n, device=p.device)
        for i, layer in enumerate(p.structure.layers):
            for port, name in enumerate("qkv"):
                a, b = (p.norm(i, port, y) for y in (x, other))
                self._same_rows(a[keep], b[keep], f"the norm before {name} of attention {i} mixes positions")
                a, b = (p.prepare(i, port, p.project(i, port, y), tokens, tables) for y in (x, other))
                self._same_rows(a[keep], b[keep], f"what is done to {name} of attention {i} mixes positions")
                self._same_heads(i, port, x, tokens, a)
            a, b = (p.post_norm(i, y) for y in (x, other))
            self._same_rows(a[keep], b[keep], f"the norm after attention {i} mixes positions")
            if layer.mlp is not None and layer.listed:
                self._rows_alone(i, f"MLP {i} (`{path_of(layer.mlp)}`) mixes positions")
            elif layer.mlp is not None:
                a, b = (p.mlp(i, y) for y in (x, other))
                self._same_rows(a[keep], b[keep], f"MLP {i} (`{path_of(layer.mlp)}`) mixes positions")
        a, b = (p.unembed(y) for y in (x, other))
        self._same_rows(a[keep], b[keep], "the unembedding mixes positions")

    def _rows_alone(self, layer: int, what: str) -> None:
        """An MLP gives each token of a list what it gives that token alone: of unlike tokens, and of tokens so alike
        that all go to the same experts, who then have more than their share."""
        width = self.pieces.graph.d_model
        for n, spread in CROWDS:
            x = torch.randn((1, width), generator=self.generator).repeat(n, 1)
            x = x + spread * torch.randn((n, width), generator=self.generator)
            x = x.to(self.pieces.device, self.pieces.dtype)
            alone = torch.cat([self.pieces.mlp(layer, row) for row in x.split(1)])
            among = self.pieces.mlp(layer, x)
            if not torch.allclose(among, alone, rtol=0, atol=self.tolerance * max(alone.abs().max().item(), 1e-6)):
                raise NOT_UNDERSTOOD.error(f"{what}; only attention may")

    def _same_rows(self, a: Tensor, b: Tensor, what: str) -> None:
        if not torch.equal(a, b):
            raise NOT_UNDERSTOOD.error(f"{what}; only attention may")

    def _same_heads(self, layer: int, port: int, x: Tensor, tokens: Tensor, all_heads: Tensor) -> None:
        """The last head alone comes out as it does among all."""
        p, head = self.pieces, all_heads.shape[1] - 1
        tables = p.tables(Layout((x.shape[0],)))
        alone = p.prepare(layer, port, p.project(layer, port, x, [head]), tokens, tables)
        self._compare(alone[:, 0], all_heads[:, head], f"{'qkv'[port]} of one head alone of attention {layer}")
