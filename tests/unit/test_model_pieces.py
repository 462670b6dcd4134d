"""The pieces of a model compute what the model computes, however its tokens are packed and cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from patchc.ir.tokens import Layout
from patchc.model.load import LoadedModel, load
from tests.composed import packed_embedding, packed_qkv, streams
from tests.models import D_VOCAB, TRACED, loaded_model, logits_of, neox

CLOSE = 5e-6
RAGGED = (5, 9, 1, 5)


@pytest.fixture(scope="module", params=sorted(TRACED))
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return loaded_model(request.param)


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, D_VOCAB, (n,), generator=generator).tolist() for n in lengths]


def eager_rows(loaded: LoadedModel, prompts: list[list[int]]) -> Tensor:
    return torch.cat([logits_of(loaded.eager, torch.tensor([ids]))[0] for ids in prompts])


@pytest.mark.parametrize("lengths", [(1,), (2,), (7,), (6, 6, 6), RAGGED, (32,)])
def test_composed_pieces_are_the_model(loaded: LoadedModel, lengths: tuple[int, ...]) -> None:
    prompts = prompts_of(lengths)
    got = loaded.pieces.unembed(streams(loaded.pieces, prompts)[-1])
    assert torch.allclose(got, eager_rows(loaded, prompts), atol=CLOSE)


def test_graph_counts_what_the_model_has(loaded: LoadedModel) -> None:
    graph = loaded.graph
    assert (graph.n_layers, graph.n_heads, graph.d_model, graph.d_head, graph.d_vocab) == (
        2,
        4,
        32,
        8,
        D_VOCAB,
    )
    assert graph.n_kv_heads == len({loaded.pieces.kv_head(h) for h in range(4)})
    assert graph.causal
    assert graph.n_ctx in (32, 64)


def test_a_later_token_changes_no_earlier_stream(loaded: LoadedModel) -> None:
    ids = prompts_of((8,))[0]
    other = [*ids[:5], *((i + 1) % D_VOCAB for i in ids[5:])]
    for a, b in zip(streams(loaded.pieces, [ids])[1:], streams(loaded.pieces, [other])[1:], strict=True):
        assert torch.equal(a[:5], b[:5])
        assert not torch.allclose(a[5:], b[5:])


def test_embedding_nodes_are_in_the_graphs_order(loaded: LoadedModel) -> None:
    ids = torch.tensor(prompts_of((6,)))
    parts = loaded.pieces.embed(ids)
    assert parts.shape == (loaded.graph.blocks[0].size, 1, 6, 32)
    again = loaded.pieces.embed(ids.flip(1))
    assert torch.equal(parts[0].flip(1), again[0])  # a token's embedding does not know its position
    for part, other in zip(parts[1:], again[1:], strict=True):  # and a position's does not know its token
        assert torch.equal(part, other)


@pytest.mark.parametrize("layer", [0, 1])
def test_packed_rows_are_prepared_as_in_their_prompts(loaded: LoadedModel, layer: int) -> None:
    pieces, prompts = loaded.pieces, prompts_of(RAGGED)
    x, layout = packed_embedding(pieces, prompts), Layout(RAGGED)
    packed = packed_qkv(pieces, layer, x, pieces.tables(layout))
    alone = [
        packed_qkv(pieces, layer, x[o : o + n], pieces.tables(Layout((n,))))
        for o, n in zip(layout.offsets, RAGGED, strict=False)
    ]
    for port in range(3):
        assert torch.allclose(packed[port], torch.cat([a[port] for a in alone]), atol=CLOSE)


def test_tokens_may_come_in_any_order_and_number(loaded: LoadedModel) -> None:
    pieces, tokens = loaded.pieces, torch.tensor([11, 3, 3, 18, 0])
    x, tables = packed_embedding(pieces, prompts_of(RAGGED)), pieces.tables(Layout(RAGGED))
    for port in range(3):
        rows = pieces.project(1, port, pieces.norm(1, port, x))
        every = pieces.prepare(1, port, rows, torch.arange(20), tables)
        some = pieces.prepare(1, port, rows[tokens], tokens, tables)
        assert torch.allclose(some, every[tokens], atol=CLOSE)


def test_heads_can_be_computed_one_by_one(loaded: LoadedModel) -> None:
    pieces, heads = loaded.pieces, [2, 0]
    x, tables = packed_embedding(pieces, prompts_of((7,))), pieces.tables(Layout((7,)))
    kv = [pieces.kv_head(h) for h in heads]
    for port, chosen in enumerate((heads, kv, kv)):
        y = pieces.norm(0, port, x)
        every = pieces.prepare(0, port, pieces.project(0, port, y), torch.arange(7), tables)
        some = pieces.prepare(0, port, pieces.project(0, port, y, chosen), torch.arange(7), tables)
        assert torch.allclose(some, every[:, chosen], atol=CLOSE)
    q, k, v = (a[None] for a in packed_qkv(pieces, 0, x, tables))
    z = pieces.attend(0, q, k, v, torch.arange(7)[None], 7, tables)
    some = pieces.attend(0, q[:, :, heads], k[:, :, heads], v[:, :, heads], torch.arange(7)[None], 7, tables, heads)
    assert torch.allclose(some, z[:, :, heads], atol=CLOSE)
    written = torch.stack([pieces.write(0, z[0, :, [h]], [h]) for h in range(4)])
    assert torch.allclose(pieces.write(0, z[0]), written.sum(0), atol=CLOSE)
    assert torch.allclose(pieces.write(0, z[0, :, heads], heads), written[heads].sum(0), atol=CLOSE)
    assert not torch.allclose(written[0], written[1], atol=1e-2)


def test_some_queries_over_a_prefix_of_the_keys(loaded: LoadedModel) -> None:
    pieces, n = loaded.pieces, 9
    x, tables = packed_embedding(pieces, prompts_of((n,))), pieces.tables(Layout((n,)))
    q, k, v = (a[None] for a in packed_qkv(pieces, 1, x, tables))
    full = pieces.attend(1, q, k, v, torch.arange(n)[None], n, tables)
    positions = torch.tensor([[4, 6], [5, 0]])  # each computation has queries of its own
    some = pieces.attend(
        1,
        q[0, positions],
        k[:, :7].expand(2, -1, -1, -1),
        v[:, :7].expand(2, -1, -1, -1),
        positions,
        n,
        tables,
    )
    assert torch.allclose(some, full[0, positions], atol=CLOSE)
    same = torch.tensor([[2, 6]]).expand(3, 2)
    some = pieces.attend(1, q[0, same], k[:, :7].expand(3, -1, -1, -1), v[:, :7].expand(3, -1, -1, -1), same, n, tables)
    assert torch.allclose(some, full[0, same], atol=CLOSE)


def test_overlaid_keys_and_values_are_what_the_queries_see(loaded: LoadedModel) -> None:
    pieces, n = loaded.pieces, 8
    tables = pieces.tables(Layout((n,)))
    x, y = (packed_embedding(pieces, prompts_of((n,), seed)) for seed in (0, 1))
    q, k, v = packed_qkv(pieces, 1, x, tables)
    _, other_k, other_v = packed_qkv(pieces, 1, y, tables)
    k, v = k.clone(), v.clone()
    k[3], v[3] = other_k[3], other_v[3]
    mixed = torch.cat([x[:3], y[3:4], x[4:]])
    want = packed_qkv(pieces, 1, mixed, tables)
    whole = pieces.attend(1, q[None], want[1][None], want[2][None], torch.arange(n)[None], n, tables)
    late = torch.tensor([[5, 7]])
    got = pieces.attend(1, q[None, late[0]], k[None], v[None], late, n, tables)
    assert torch.allclose(got[0], whole[0, late[0]], atol=CLOSE)


def test_only_the_logits_that_are_asked_for(loaded: LoadedModel) -> None:
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    columns = torch.tensor([7, 49, 7, 0])
    assert torch.allclose(loaded.pieces.unembed(x, columns), loaded.pieces.unembed(x)[:, columns], atol=CLOSE)


def test_gradients_reach_the_stream_and_no_weight(loaded: LoadedModel) -> None:
    pieces, prompts = loaded.pieces, prompts_of((6,))
    x = packed_embedding(pieces, prompts).requires_grad_()
    tables = pieces.tables(Layout((6,)))
    q, k, v = (a[None] for a in packed_qkv(pieces, 0, x, tables))
    z = pieces.attend(0, q, k, v, torch.arange(6)[None], 6, tables)[0]
    x = x + pieces.write(0, z)
    x = x + pieces.mlp(0, x) if loaded.graph.mlps else x
    logit = pieces.unembed(x, torch.tensor([3]))[-1, 0]
    (gradient,) = torch.autograd.grad(logit, x, retain_graph=True)
    (at_bottom,) = torch.autograd.grad(logit, q)
    assert gradient[-1].abs().max() > 1e-3
    assert at_bottom.abs().max() > 1e-6
    assert all(p.grad is None and p.requires_grad for p in loaded.eager.parameters())


def test_tables_made_in_inference_mode_serve_autograd(loaded: LoadedModel) -> None:
    length = 17  # no other test has prompts of this length: the tables are made here
    with torch.inference_mode():
        tables = loaded.pieces.tables(Layout((length,)))
    r = torch.randn(length, 4, 8, requires_grad=True)
    q = loaded.pieces.prepare(0, 0, r, torch.arange(length), tables)[None]
    loaded.pieces.attend(0, q, q, q, torch.arange(length)[None], length, tables).sum().backward()
    assert r.grad is not None
    assert r.grad.abs().max() > 0


def test_weights_are_views_of_the_models_own(loaded: LoadedModel) -> None:
    tensors = [*loaded.eager.parameters(), *loaded.eager.buffers()]
    own = {t.untyped_storage().data_ptr() for t in tensors}
    held = [t for t in loaded.pieces.weights.values() if t.numel() > 1]
    assert held
    assert {t.untyped_storage().data_ptr() for t in held} <= own


def test_parallel_blocks_share_a_rank() -> None:
    graph = load(neox()).graph
    assert [b.rank for b in graph.blocks] == [0, 1, 1, 2, 2]
