"""A small llama written as a GGUF file, as llama.cpp lays it out, and packages that hold one, without pip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from torch import Tensor, nn

from tests.models import D_VOCAB

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WORDS = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", *(f"Ġ{c}" for c in "abcdefghijklmnopqrstu")]
"""The tokens: letters, a space, and letters after one. 50 of them, and no merges but those that the latter need."""


def write_gguf(module: nn.Module, path: Path) -> None:
    """Write a Hugging Face Llama of `D_VOCAB` tokens and a byte-level tokenizer for it."""
    config: Any = module.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("a small llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(D_VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3] + [1] * (len(WORDS) - 2))
    writer.add_token_merges([f"Ġ {word[1]}" for word in WORDS if len(word) == 2 and word[0] == "Ġ"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in module.state_dict().items():
        part = name.removesuffix(".weight")
        n_heads = next((n for end, n in heads.items() if part.endswith(end)), None)
        writer.add_tensor(f"{_gguf_name(part)}.weight", _rotary_pairs(tensor, n_heads).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(part: str) -> str:
    if part in NAMES:
        return NAMES[part]
    _model, _layers, layer, rest = part.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def _rotary_pairs(tensor: Tensor, n_heads: int | None) -> Tensor:
    """llama.cpp rotates neighbouring dimensions, transformers the two halves of a head's."""
    if n_heads is None:
        return tensor
    return tensor.reshape(n_heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def fake_package(folder: Path, name: str, version: str) -> Path:
    """The folder of an installed package that fails where it is imported; `folder` has to be on `sys.path`."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    package = folder / name.replace("-", "_")
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('this package was imported')\n", encoding="utf-8")
    return package
