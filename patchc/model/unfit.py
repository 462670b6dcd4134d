"""Models that are refused for what they are, in words for who has one: no token ids, no attention, no logits.

What a graph of a decoder may hold is `trace`'s and `attention`'s matter.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from patchc.diagnostics import PatchcError
from patchc.model.nodes import NOT_UNDERSTOOD, SDPA, SOFTMAX, need

DATA = ("GuardOnDataDependentSymNode", "DataDependentOutputException")
"""What `torch.export` raises where Python asks for a value that only a run knows."""


def refuse_other_inputs(model: nn.Module) -> None:
    """Refuse a model that says of itself that it reads something else than one text of token ids."""
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    need(
        getattr(config, "is_encoder_decoder", False) is not True,
        f"a {kind} is an encoder and a decoder, each with a residual stream of its own: patchc traces decoders",
    )
    reads = getattr(model, "main_input_name", "input_ids")
    need(reads == "input_ids", f"a {kind} reads `{reads}`: patchc traces models of token ids [batch, pos]")


def refuse_without_attention(graph: fx.Graph) -> None:
    attends = any(n.target is SDPA or n.target in SOFTMAX for n in graph.nodes)
    need(attends, "the model has no attention, as recurrent and state-space models: patchc traces decoders with it")


def untraceable(model: nn.Module, error: Exception) -> PatchcError:
    """The error for a model that `torch.export` cannot follow, or that cannot be run."""
    if not any(isinstance(part, nn.Embedding) for part in model.modules()):
        return NOT_UNDERSTOOD.error(
            f"a {type(model).__name__} has no embedding, and token ids cannot be given to it: patchc traces models of "
            "token ids [batch, pos]"
        )
    cannot, kind = "torch.export cannot follow the model", type(error).__name__
    if kind in DATA:
        experts = hasattr(getattr(model, "config", None), "_experts_implementation")
        return NOT_UNDERSTOOD.error(
            f"{cannot}: which operations it does depends on the tokens' values ({kind})",
            fix='model.set_experts_implementation("grouped_mm")' if experts else None,
        )
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return NOT_UNDERSTOOD.error(f"{cannot}: {kind}: {first}")
