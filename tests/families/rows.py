"""The table of model families: how a tiny random one of each is made, and what patchc should say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.families.unknown import unknown
from tests.models import D_VOCAB, gpt2, jittered, llama, native, neox

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": D_VOCAB}
"""By the names that most configs have."""
LLAMA: dict[str, Any] = {**WIDTHS, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


@dataclass(frozen=True)
class Family:
    """A row. `attention` are the kinds that it is tried with; `bridge` says whether patchc takes TransformerLens' bridge
    around one, or why there is none; `note` is for the reader. `refused` is a part of the message of one that patchc
    does not take."""

    name: str
    build: Callable[..., nn.Module]
    attention: tuple[str, ...] = ("sdpa",)
    bridge: str = "yes"
    note: str = ""
    refused: str = ""


def hf(architecture: str, sizes: dict[str, Any], attention: str = "sdpa", **more: Any) -> nn.Module:
    """A jittered model of transformers: `Llama` is `LlamaForCausalLM` with a `LlamaConfig`."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")
    torch.manual_seed(0)
    made = config(**{**SPECIAL, **sizes, **more, "attn_implementation": attention})
    return jittered(getattr(transformers, f"{architecture}ForCausalLM")(made))


def _gpt_neo(attention: str = "eager") -> nn.Module:
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": D_VOCAB, "max_position_embeddings": 64}
    return hf("GPTNeo", sizes, attention, attention_types=[[["global", "local"], 1]], window_size=4)


def _opt(attention: str = "sdpa", **more: Any) -> nn.Module:
    return hf("OPT", {**WIDTHS, "max_position_embeddings": 64, "ffn_dim": 64, "word_embed_proj_dim": 32}, attention, **more)


BERT: dict[str, Any] = {**WIDTHS, "intermediate_size": 64, "is_decoder": True, "pad_token_id": 0}
GPT_J: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, "vocab_size": D_VOCAB}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
NO_BRIDGE = "no: TransformerLens cannot bridge it"

FAMILIES: tuple[Family, ...] = (
    Family("GPT-2", gpt2, ("sdpa", "eager")),
    Family("GPT-NeoX, Pythia", lambda a: neox(attn_implementation=a), note="attention and MLP in parallel"),
    Family(
        "GPT-NeoX, sequential",
        lambda a: neox(attn_implementation=a, use_parallel_residual=False),
        ("eager",),
        note="`use_parallel_residual=False`",
    ),
    Family("Llama", llama, ("sdpa", "eager"), note="grouped keys and values"),
    Family("Llama, one key-value head", partial(llama, num_key_value_heads=1), note="multi-query attention"),
    Family("Mistral", partial(hf, "Mistral", {**LLAMA, "head_dim": 8}, sliding_window=4), note="sliding window"),
    Family("Qwen2", partial(hf, "Qwen2", LLAMA), note="biases on q, k and v"),
    Family("Qwen3", partial(hf, "Qwen3", {**LLAMA, "head_dim": 8}), ("eager",), note="norms of q and k within a head"),
    Family("Gemma", partial(hf, "Gemma", {**LLAMA, "head_dim": 8}), note="scaled embedding"),
    Family("Phi", partial(hf, "Phi", LLAMA), note="parallel, one norm; partial rotary"),
    Family("Phi-3", partial(hf, "Phi3", LLAMA), ("eager",), note="fused projections"),
    Family("GPT-Neo", _gpt_neo, ("eager",), note="local attention"),
    Family("GPT-J", partial(hf, "GPTJ", GPT_J), ("eager",), note="parallel, one norm; interleaved rotary"),
    Family("OPT", _opt, ("sdpa", "eager"), note="pre-norm sizes, all but 350m"),
    Family("Falcon", partial(hf, "Falcon", WIDTHS), ("sdpa", "eager"), note="multi-query, parallel (7b)"),
    Family(
        "Falcon, ALiBi",
        partial(hf, "Falcon", WIDTHS, alibi=True, multi_query=False, parallel_attn=False, bias=True),
        ("eager",),
        note="sequential (rw)",
    ),
    Family("Bloom", partial(hf, "Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": D_VOCAB}), ("eager",), note="ALiBi"),
    Family("StableLM", partial(hf, "StableLm", LLAMA), note="partial rotary"),
    Family("OLMo", partial(hf, "Olmo", LLAMA), note="norms without weights; `clip_qkv`"),
    Family("Cohere", partial(hf, "Cohere", LLAMA), note="parallel, one norm; scaled logits"),
    Family(
        "Granite",
        partial(hf, "Granite", LLAMA, residual_multiplier=0.5, embedding_multiplier=3.0),
        ("eager",),
        note="scaled writes",
    ),
    Family("Mixtral", partial(hf, "Mixtral", LLAMA, num_local_experts=4, num_experts_per_tok=2), note="experts: one `mlp` node"),
    Family(
        "Qwen2-MoE",
        partial(hf, "Qwen2Moe", LLAMA, num_experts=4, shared_expert_intermediate_size=32, **EXPERTS),
        ("eager",),
        note="experts and a shared one: one `mlp` node",
    ),
    Family("TransformerLens native", lambda _: native(), note="and with RMSNorm, rotary, attention alone"),
    Family("any decoder of this shape", lambda _: unknown(), bridge="no: TransformerLens does not know it", note="tried on one written by hand"),
)
