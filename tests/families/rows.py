"""The table of model families: how a tiny random one of each is made, and what patchc should say of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.families.unknown import unknown
from tests.models import D_VOCAB, gemma2, gemma3, gpt2, jittered, llama, native, neox, olmo2

WIDTHS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": D_VOCAB}
"""By the names that most configs have."""
LLAMA: dict[str, Any] = {**WIDTHS, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
SPECIAL: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))


class Bridged(StrEnum):
    """How a bridge around a model is tried; compatibility mode folds norms into weights and centres them."""

    COMPATIBLE = "yes (compatibility mode)"
    RAW = "yes (raw)"
    """Of those whose norms TransformerLens does not fold."""
    SAME = "yes (as above)"
    """It is the bridge of the row before."""


@dataclass(frozen=True)
class Family:
    """A row. `attention` is the kind that it is tried with, empty where it has none; `bridge`: how a TransformerBridge
    around one is tried, or else `no_bridge` says why patchc does not take it; `note` is for the reader. `refused` is a
    part of the message of one that patchc does not take; `driver`: how the hooks backend hooks it.
    """

    name: str
    build: Callable[..., nn.Module]
    attention: str = "sdpa"
    no_bridge: str = ""
    note: str = ""
    refused: str = ""
    driver: str = "forward_hooks"
    bridge: Bridged = Bridged.COMPATIBLE


def hf(
    architecture: str, sizes: dict[str, Any], attention: str = "sdpa", kind: str = "ForCausalLM", **more: Any
) -> nn.Module:
    """A jittered model of transformers: `Llama` is `LlamaForCausalLM` with a `LlamaConfig`."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")
    torch.manual_seed(0)
    made = config(**{**SPECIAL, **sizes, **more})
    made._attn_implementation = attention
    return jittered(getattr(transformers, f"{architecture}{kind}")(made))


def _neox(attention: str, **more: Any) -> nn.Module:
    return neox(attn_implementation=attention, **more)


PHI = {**LLAMA, "num_key_value_heads": 4}
WIDE_HEADS = {**LLAMA, "head_dim": 8}
GPT_NEO = {**WIDTHS, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4}
GPT_J = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64, "vocab_size": D_VOCAB}
OPT = {**WIDTHS, "max_position_embeddings": 64, "ffn_dim": 64, "word_embed_proj_dim": 32}
FALCON_RW = {**WIDTHS, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}
FALCON_NEW = {**WIDTHS, "new_decoder_architecture": True, "num_kv_heads": 2}
BLOOM = {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": D_VOCAB}
GRANITE = {**LLAMA, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}
MIXTRAL = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
QWEN_MOE = {
    **LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}  # fmt: skip
BERT = {**WIDTHS, "intermediate_size": 64, "pad_token_id": 0}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": D_VOCAB}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": D_VOCAB}
XLNET = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": D_VOCAB}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "vocab_size": D_VOCAB}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
HOOKS = "the bridge keeps hooks of its own in the MLP"
METHODS = "the bridge replaces methods of the model's modules"
EXPERTS = "the bridge compares values while it runs"

FAMILIES: tuple[Family, ...] = (
    Family("GPT-2", gpt2),
    Family("GPT-NeoX, Pythia", _neox, note="parallel; interleaved projections"),
    Family("GPT-NeoX, sequential", partial(_neox, use_parallel_residual=False), "eager", bridge=Bridged.SAME),
    Family("Llama", llama, "eager", note="grouped keys and values"),
    Family("Llama, multi-query", partial(llama, num_key_value_heads=1), note="one key-value head", bridge=Bridged.SAME),
    Family("Mistral", partial(hf, "Mistral", WIDE_HEADS, sliding_window=4), note="sliding window"),
    Family("Qwen2", partial(hf, "Qwen2", LLAMA), note="biases of q, k and v"),
    Family("Qwen3", partial(hf, "Qwen3", WIDE_HEADS), "eager", note="norms of q and k"),
    Family("Gemma", partial(hf, "Gemma", WIDE_HEADS), note="scaled embedding"),
    Family("Gemma 2", lambda _: gemma2(), "eager", note="norms after; soft caps; every second layer a window"),
    Family("Gemma 3", gemma3, note="norms after, of q and k; windows with a rotary table of their own"),
    Family("OLMo 2", olmo2, note="norms after, none before; norms of q and k over all heads", bridge=Bridged.RAW),
    Family("Phi", partial(hf, "Phi", PHI), note="parallel, one norm; partial rotary"),
    Family("Phi-3", partial(hf, "Phi3", LLAMA), "eager", note="fused projections", bridge=Bridged.RAW),
    Family("GPT-Neo", partial(hf, "GPTNeo", GPT_NEO), "eager", note="local attention"),
    Family("GPT-J", partial(hf, "GPTJ", GPT_J), "eager", note="parallel, one norm; rotary of pairs"),
    Family("OPT", partial(hf, "OPT", OPT), "eager", HOOKS, "but for OPT-350m"),
    Family("Falcon", partial(hf, "Falcon", WIDTHS), "sdpa", METHODS, "7b: multi-query, parallel"),
    Family("Falcon, ALiBi", partial(hf, "Falcon", FALCON_RW), "eager", METHODS, "rw: sequential"),
    Family("Bloom", partial(hf, "Bloom", BLOOM), "eager", note="ALiBi"),
    Family("StableLM", partial(hf, "StableLm", LLAMA), note="partial rotary"),
    Family("OLMo", partial(hf, "Olmo", LLAMA), note="norms without weights"),
    Family("Cohere", partial(hf, "Cohere", LLAMA), note="parallel, one norm; scaled logits"),
    Family("Granite", partial(hf, "Granite", GRANITE), "eager", note="scaled writes"),
    Family("Mixtral", partial(hf, "Mixtral", MIXTRAL), "sdpa", EXPERTS, "a block of experts is one `mlp`"),
    Family("Qwen2-MoE", partial(hf, "Qwen2Moe", QWEN_MOE), "eager", EXPERTS, "the same, with a shared expert"),
    Family(
        "TransformerLens native",
        lambda _: native(),
        "",
        driver="transformer_lens",
        note="learned positions; LayerNorm",
    ),
    Family(
        "a decoder that nobody knows",
        lambda _: unknown(),
        "",
        no_bridge="TransformerLens has no such architecture",
        note="one written by hand",
    ),
    Family(
        "BERT",
        partial(hf, "Bert", BERT, kind="ForMaskedLM"),
        refused="as where the stream itself is normalised",
        note="the stream itself is normalised",
    ),
    Family(
        "GPT",
        partial(hf, "OpenAIGPT", GPT, kind="LMHeadModel"),
        "eager",
        refused="as where the stream itself is normalised",
        note="likewise",
    ),
    Family(
        "OPT-350m",
        partial(hf, "OPT", OPT, do_layer_norm_before=False),
        refused="as where the stream itself is normalised",
        note="likewise",
    ),
    Family(
        "Falcon, new",
        partial(hf, "Falcon", FALCON_NEW),
        refused="split into heads: `expand`",
        note="40b, 180b, 11b: keys are repeated before rotary",
    ),
    Family(
        "T5",
        partial(hf, "T5", T5, kind="ForConditionalGeneration"),
        refused="is an encoder and a decoder",
        note="an encoder and a decoder",
    ),
    Family(
        "XLNet",
        partial(hf, "XLNet", XLNET, kind="LMHeadModel"),
        "eager",
        refused="mixes the batch axis with others",
        note="relative attention over [pos, batch]",
    ),
    Family(
        "Mamba",
        partial(hf, "Mamba", MAMBA),
        "eager",
        refused="the model has no attention",
        note="no attention: state space",
    ),
    Family(
        "ViT",
        partial(hf, "ViT", VIT, kind="ForImageClassification"),
        refused="reads `pixel_values`",
        note="reads pixels, not token ids",
    ),
    Family(
        "an MLP",
        lambda _: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
        refused="has no embedding",
        note="reads numbers, not token ids",
    ),
)
