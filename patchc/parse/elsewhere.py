"""What other tools call nodes and sites (TransformerLens' hooks, papers' `L3H1`), and how patchc spells them.

For the fixes of errors alone: none of these names is in the language.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FORMS = {
    **{site: f"head[{{l}}, {{h}}].{site}" for site in ("q", "k", "v", "z", "pattern", "scores")},
    **dict.fromkeys(("attn_scores",), "head[{l}, {h}].scores"),
    **dict.fromkeys(("result", "head", "attn", "self_attn", "attention"), "head[{l}, {h}]"),
    **dict.fromkeys(("mlp", "mlp_out"), "mlp[{l}]"),
    **{stream: f"{stream}[{{l}}]" for stream in ("resid_pre", "resid_mid", "resid_post", "attn_out")},
    "mlp_in": "mlp[{l}].in",
    "post": "mlp[{l}].post",
    "embed": "embed",
    "pos_embed": "pos_embed",
}
_WHOLE = ("attn", "self_attn", "attention")
"""A layer's attention where no head is named."""
_LAYER_HEAD = re.compile(r"[LlAa](\d+)[._]?[Hh](\d+)")
_SITES = {"attn_scores": "scores", "attention": "pattern", "attn": "pattern", "attn_pattern": "pattern"}
_ITSELF = ("result", "out", "output", "mlp_out", "attn_out")


def node_meant(written: str, indices: Sequence[str]) -> str | None:
    """patchc's spelling of a node: `blocks.3.attn.hook_z` with 3 is `head[3, *].z`; None where nothing is known."""
    if match := _LAYER_HEAD.fullmatch(written):
        return f"head[{match[1]}, {match[2]}]"
    words = [w.removeprefix("hook_") for w in re.findall(r"[A-Za-z_]\w*", written)]
    name = next((w for w in reversed(words) if w in _FORMS), None)
    if name is None:
        return None
    form = "attn_out[{l}]" if name in _WHOLE and len(indices) < 2 else _FORMS[name]
    layer, head = [*indices, "*", "*"][:2]
    return form.format(l=layer, h=head)


def site_meant(name: str) -> str | None:
    """patchc's name of a site, `""` for the node itself, None where nothing is known."""
    plain = name.removeprefix("hook_")
    if plain in _ITSELF:
        return ""
    return _SITES.get(plain) or (plain if plain != name else None)
