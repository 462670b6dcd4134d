"""Models, and their nodes as plain functions written out by hand, for the tests of the hooks backend.

Torch's own modules do the arithmetic; where a stream comes from and goes to is the tests' matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from patchc.execute.hooks import Oracle
from patchc.ir.experiment import Cell, Experiment, FromWorld, Metric, Patch, Prompts, Value, World
from patchc.ir.graph import Kind, Node, ResidualGraph, residual_graph
from patchc.ir.paths import Seq, Star, Step
from patchc.ir.tokens import Layout
from tests import models
from tests.models import D_VOCAB

D_HEAD = 8


def graph_of(model: str, n_heads: int, **options: Any) -> ResidualGraph:
    options = {"has_pos_embed": True, "n_layers": 2, **options}
    return residual_graph(model, n_heads=n_heads, d_model=n_heads * D_HEAD, d_head=D_HEAD, d_vocab=D_VOCAB, **options)


def gpt2(n_heads: int = 4) -> tuple[nn.Module, ResidualGraph]:
    return models.gpt2(n_embd=n_heads * D_HEAD, n_head=n_heads), graph_of("gpt2", n_heads)


def llama(n_heads: int = 4) -> tuple[nn.Module, ResidualGraph]:
    """With grouped queries: two heads share each k and v."""
    groups = n_heads // 2
    sizes = {"hidden_size": n_heads * D_HEAD, "num_attention_heads": n_heads, "num_key_value_heads": groups}
    graph = graph_of("llama", n_heads, has_pos_embed=False, has_attn_bias=False, n_kv_heads=groups)
    return models.llama(**sizes), graph


def native(n_heads: int = 4) -> tuple[nn.Module, ResidualGraph]:
    """TransformerLens' own model, attention only."""
    module = models.native(d_model=n_heads * D_HEAD, n_heads=n_heads, attn_only=True)
    return module, graph_of("native", n_heads, has_mlp=False)


MODELS = {"gpt2": gpt2, "llama": llama, "native": native}


def prompts(*lengths: int, seed: int = 0) -> Prompts:
    """Random worlds `clean`, `corrupt` and `third`."""
    generator = torch.Generator().manual_seed(seed)

    def world(name: str) -> World:
        rows = (torch.randint(0, D_VOCAB, (n,), generator=generator).tolist() for n in lengths)
        return World(name, tuple(map(tuple, rows)))

    return Prompts(Layout(lengths), (world("clean"), world("corrupt"), world("third")))


@dataclass
class NodeFunctions:
    """A model's nodes as functions of flat streams `[token, d_model]`; prompts are kept apart by the
    attention mask."""

    model: Any
    graph: ResidualGraph
    layout: Layout

    def __post_init__(self) -> None:
        places = [self.layout.place(t) for t in range(self.layout.n_tokens)]
        self.positions = torch.tensor([p for _, p in places])
        prompt = torch.tensor([i for i, _ in places])
        same = prompt[:, None] == prompt
        self.seen = same & (self.positions[:, None] >= self.positions)

    def block(self, node: Node) -> Any:
        return self._blocks()[node.layer or 0]

    def _blocks(self) -> Any:
        match self.graph.model:
            case "gpt2":
                return self.model.transformer.h
            case "llama":
                return self.model.model.layers
            case _:
                return self.model.layers

    def embedding(self, node: Node, ids: Tensor) -> Tensor:
        match self.graph.model, node.kind:
            case "gpt2", Kind.EMBED:
                return self.model.transformer.wte(ids)
            case "gpt2", _:
                return self.model.transformer.wpe(self.positions)
            case "llama", _:
                return self.model.model.embed_tokens(ids)
            case _, Kind.EMBED:
                return self.model.tok_embed(ids)
            case _:
                return self.model.pos(self.positions)

    def attn_bias(self, node: Node) -> Tensor:
        attn = self.block(node).attn
        bias = attn.c_proj.bias if self.graph.model == "gpt2" else attn.o.bias
        return bias.expand(self.layout.n_tokens, -1)

    def project(self, node: Node, port: int, x: Tensor) -> Tensor:
        """A head's own q, k or v (before rotation) of a stream, `[token, d_head]`."""
        block, h, d = self.block(node), node.head or 0, D_HEAD
        match self.graph.model:
            case "gpt2":
                return block.attn.c_attn(block.ln_1(x)).unflatten(-1, (3, -1, d))[:, port, h]
            case "llama":
                attn = block.self_attn
                projection = (attn.q_proj, attn.k_proj, attn.v_proj)[port]
                return projection(block.input_layernorm(x)).unflatten(-1, (-1, d))[:, h if port == 0 else h // 2]
            case _:
                projection = (block.attn.q, block.attn.k, block.attn.v)[port]
                return projection(block.ln1(x)).unflatten(-1, (-1, d))[:, h]

    def scores(self, node: Node, q: Tensor, k: Tensor) -> Tensor:
        """`[token, token]`; what a token cannot look at is -inf, other prompts' tokens too."""
        if self.graph.model == "llama":
            cos, sin = self.model.model.rotary_emb(q, self.positions[None])
            q, k = (x[0, 0] for x in apply_rotary_pos_emb(q[None, None], k[None, None], cos, sin))
        return (q @ k.T / D_HEAD**0.5).masked_fill(~self.seen, -torch.inf)

    def pattern(self, scores: Tensor) -> Tensor:
        """`[token, token]`; a token that looks at nothing has a row of zeros."""
        return scores.softmax(-1).nan_to_num(0.0)

    def z(self, node: Node, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`[token, d_head]`."""
        return self.pattern(self.scores(node, q, k)) @ v

    def write(self, node: Node, z: Tensor) -> Tensor:
        """`[token, d_model]`."""
        block, columns = self.block(node), slice((node.head or 0) * D_HEAD, ((node.head or 0) + 1) * D_HEAD)
        match self.graph.model:
            case "gpt2":
                return z @ block.attn.c_proj.weight[columns]
            case "llama":
                return z @ block.self_attn.o_proj.weight[:, columns].T
            case _:
                return z @ block.attn.o.weight[:, columns].T

    def added(self, members: list[Node], written: list[Tensor]) -> Tensor:
        """What the nodes of a block together add to the stream, `[token, d_model]`."""
        return sum(written[1:], written[0])

    def mlp(self, node: Node, x: Tensor) -> Tensor:
        return self.from_neurons(node, self.neurons(node, x))

    def neurons(self, node: Node, x: Tensor) -> Tensor:
        """`[token, d_mlp]`, as the output matrix reads them."""
        block = self.block(node)
        if self.graph.model == "gpt2":
            return block.mlp.act(block.mlp.c_fc(block.ln_2(x)))
        x = block.post_attention_layernorm(x)
        return block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x)

    def from_neurons(self, node: Node, neurons: Tensor) -> Tensor:
        """`[token, d_model]`."""
        mlp = self.block(node).mlp
        return mlp.c_proj(neurons) if self.graph.model == "gpt2" else mlp.down_proj(neurons)

    def unembed(self, x: Tensor) -> Tensor:
        match self.graph.model:
            case "gpt2":
                return self.model.lm_head(self.model.transformer.ln_f(x))
            case "llama":
                return self.model.lm_head(self.model.model.norm(x))
            case _:
                return self.model.head(self.model.ln_out(x))


# ---- experiments on them

CORRUPT = Value(((1.0, FromWorld("corrupt")),))
DRIVERS = [
    ("gpt2", "transformer_lens"),
    ("gpt2", "forward_hooks"),
    ("llama", "transformer_lens"),
    ("llama", "forward_hooks"),
    ("native", "transformer_lens"),
]


def experiment(*metrics: Metric) -> Experiment:
    return Experiment("e", None, "clean", (), (), metrics)


def cell(*patches: Patch) -> Cell:
    return Cell((), patches)


def head(graph: ResidualGraph, layer: int, number: int) -> int:
    node = graph.node(Kind.HEAD, layer, number)
    assert node is not None
    return 1 << node.id


def to_logits(graph: ResidualGraph, *steps: Step) -> Seq:
    """`steps -> any* -> logits`."""
    return Seq((*steps, Star(Step(graph.all)), Step(graph.logits_set)))


def largest_difference(got: list[Tensor], want: list[Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(got, want, strict=True))


class Fixture:
    """A model, an oracle on it, and its plain runs."""

    def __init__(
        self,
        kind: str,
        driver: str = "auto",
        *,
        n_heads: int = 4,
        data: Prompts | None = None,
        double: bool = False,
        **given: Any,
    ):
        self.model, self.graph = MODELS[kind](n_heads)
        if double:
            self.model = self.model.double()
        self.data = data or prompts(5, 7, 5)
        self.oracle = Oracle(self.model, self.graph, self.data, driver=driver, **given)
        self.functions = NodeFunctions(self.model, self.graph, self.data.layout)

    def logits(self, *patches: Patch) -> list[Tensor]:
        return self.oracle.logits(experiment(), cell(*patches))

    @torch.no_grad()
    def plain(self, world: str) -> list[Tensor]:
        outs = (self.model(torch.tensor([ids])) for ids in self.data.world(world).ids)
        return [(out if isinstance(out, Tensor) else out.logits)[0] for out in outs]
