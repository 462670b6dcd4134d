"""Small random models for every test: 2 layers of 4 heads, width 32, 50 tokens, no files.

Every parameter is jittered: as initialised, biases are 0 and norms 1, which hides errors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from patchc.model.load import LoadedModel

D_VOCAB = 50


def jittered(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in eval mode, every parameter moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.3 if parameter.dim() == 1 else 0.12))
    return module.eval()


def gpt2(attention: str = "sdpa", **config: Any) -> nn.Module:
    """A Hugging Face GPT-2: learned positions, LayerNorm, one fused projection."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32, "vocab_size": D_VOCAB}
    special = {"bos_token_id": None, "eos_token_id": None}
    return jittered(GPT2LMHeadModel(GPT2Config(**{**sizes, **special, "attn_implementation": attention, **config})))


def llama(attention: str = "sdpa", **config: Any) -> nn.Module:
    """A Hugging Face Llama: rotary, RMSNorm, gated MLP, two key/value heads for four query heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 64, "vocab_size": D_VOCAB, "max_position_embeddings": 64,
    }  # fmt: skip
    return jittered(LlamaForCausalLM(LlamaConfig(**{**sizes, "attn_implementation": attention, **config})))


def neox(**config: Any) -> nn.Module:
    """A Hugging Face GPT-NeoX: attention and MLP in parallel, interleaved projections, partial rotary."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64,
        "vocab_size": D_VOCAB, "max_position_embeddings": 64, "use_parallel_residual": True,
    }  # fmt: skip
    return jittered(GPTNeoXForCausalLM(GPTNeoXConfig(**{**sizes, **config})))


def native(**config: Any) -> nn.Module:
    """A TransformerLens-native model; LayerNorm and learned positions unless `config` says otherwise."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native import NativeModel, initialize_native_model

    base = {
        "d_model": 32, "d_head": 8, "n_heads": 4, "n_layers": 2, "n_ctx": 32, "d_vocab": D_VOCAB, "d_mlp": 64,
        "act_fn": "gelu", "normalization_type": "LN", "architecture": "TransformerLensNative", "seed": 0,
    }  # fmt: skip
    settings = TransformerBridgeConfig(**{**base, **config})
    module = NativeModel(settings)
    initialize_native_model(module, settings)
    return jittered(module)


def native_rms_rotary() -> nn.Module:
    """RMSNorm, rotary, grouped keys and values, gated MLP."""
    return native(normalization_type="RMS", positional_embedding_type="rotary", n_key_value_heads=2, gated_mlp=True)


def _norm_after(kind: str, **config: Any) -> nn.Module:
    """A Hugging Face model with a norm after attention and after the MLP."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 64, "vocab_size": D_VOCAB, "max_position_embeddings": 64,
    }  # fmt: skip
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    settings = getattr(transformers, f"{kind}Config")(**{**sizes, **special, **config})
    return jittered(getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(settings))


def gemma2(**config: Any) -> nn.Module:
    """Pre- and post-norms, soft caps on scores and logits, a window of 4 in the first layer; never fused."""
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    own = {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 4, "attn_implementation": "eager"}
    return _norm_after("Gemma2", **{**caps, **own, **config})


def gemma3(attention: str = "sdpa", **config: Any) -> nn.Module:
    """Pre- and post-norms, norms within heads, a window of 4 and a rotary table of its own in the first layer."""
    layers = ["sliding_attention", "full_attention"]
    own = {"head_dim": 8, "query_pre_attn_scalar": 16, "sliding_window": 4, "layer_types": layers}
    return _norm_after("Gemma3Text", **{**own, "attn_implementation": attention, **config})


def olmo2(attention: str = "sdpa", **config: Any) -> nn.Module:
    """No pre-norms but post-norms; one norm over all heads of the queries, one over those of the keys."""
    return _norm_after("Olmo2", **{"attn_implementation": attention, **config})


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2-sdpa": gpt2,
    "gpt2-eager": lambda: gpt2("eager"),
    "llama-sdpa": llama,
    "llama-eager": lambda: llama("eager"),
    "native-ln": native,
    "native-rms-rotary": native_rms_rotary,
    "native-attn-only": lambda: native(attn_only=True),
    "neox-parallel": neox,
    "gemma2": gemma2,
}
"""Kinds of models that patchc supports, by name."""


TRACED: dict[str, Callable[[], nn.Module]] = {
    **MODELS,
    "gemma3-sdpa": gemma3,
    "gemma3-eager": lambda: gemma3("eager"),
    "olmo2": olmo2,
}
"""Those, and more of their kinds, which fewer tests run."""


def logits_of(module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The logits [batch, pos, d_vocab] of a model of any kind."""
    with torch.no_grad():
        out = module(ids)
    return out if isinstance(out, torch.Tensor) else out.logits


@cache
def loaded_model(kind: str) -> LoadedModel:
    """A model of `TRACED`, traced once for all tests of a process: leave it as it is."""
    from patchc.model.load import load

    return load(TRACED[kind]())
