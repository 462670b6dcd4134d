"""Run by AutoCircuit's own interpreter: patches edges that it is told, one a forward pass. Imports nothing of patchc.

python autocircuit_script.py FOLDER, which has model.safetensors, config.json (of transformers) and worlds.json. Writes
a line of JSON when it is ready, then reads {"edges": [...], "threads": n} and writes {"values", "cpu_s"}, to the end
of its input.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
import json
import os
import sys
import time
from pathlib import Path

import torch


def hooked_transformer(folder):
    """The model as the TransformerLens that AutoCircuit wants, unfolded."""
    from safetensors.torch import load_file
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    module = GPT2LMHeadModel(GPT2Config(**{k: v for k, v in settings.items() if k != "dtype"}))
    module.load_state_dict(load_file(folder / "model.safetensors"))
    config = HookedTransformerConfig(
        n_layers=settings["n_layer"],
        d_model=settings["n_embd"],
        n_ctx=settings["n_positions"],
        d_head=settings["n_embd"] // settings["n_head"],
        n_heads=settings["n_head"],
        d_mlp=4 * settings["n_embd"],
        d_vocab=settings["vocab_size"],
        act_fn="gelu_new",
        normalization_type="LN",
        use_attn_result=True,
        use_split_qkv_input=True,
        use_hook_mlp_in=True,
        device="cpu",
    )
    model = HookedTransformer(config)
    # The layers' causal masks are buffers, and the unembedding has no bias in GPT-2.
    model.load_state_dict(convert_gpt2_weights(module, config), strict=False)
    return model.eval()


def main():
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    from auto_circuit.types import AblationType
    from auto_circuit.utils.ablation_activations import src_ablations
    from auto_circuit.utils.graph_utils import patch_mode, patchable_model

    folder = Path(sys.argv[1])
    worlds = json.loads((folder / "worlds.json").read_text(encoding="utf-8"))
    clean, corrupt = (torch.tensor(worlds[name]) for name in ("clean", "corrupt"))
    model = patchable_model(
        hooked_transformer(folder), factorized=True, slice_output="last_seq", separate_qkv=True, device="cpu"
    )
    start = time.process_time()
    stored = src_ablations(model, clean, AblationType.RESAMPLE).clone()
    print(json.dumps({"cpu_s": time.process_time() - start}), file=out, flush=True)
    names = {edge.name for edge in model.edges}
    rows = torch.arange(len(worlds["answer"]))
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        unknown = set(asked["edges"]) - names
        assert not unknown, f"no such edges: {unknown}"
        start, values = time.process_time(), []
        for name in asked["edges"]:
            with patch_mode(model, stored, [name]):
                logits = model(corrupt)[model.out_slice]
            values.append(float((logits[rows, worlds["answer"]] - logits[rows, worlds["wrong"]]).mean()))
        print(json.dumps({"values": values, "cpu_s": time.process_time() - start}), file=out, flush=True)


if __name__ == "__main__":
    main()
