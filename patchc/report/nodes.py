"""What `patchc nodes` prints: a model's nodes, ports and shapes, with the counts that other tools give."""

from __future__ import annotations

from typing import Any

from patchc.ir.graph import PORTS, Kind, Node, ResidualGraph


def nodes_text(graph: ResidualGraph) -> str:
    """A table of the graph, node by node in residual order (heads of a layer on one line)."""
    lines = [
        f"{graph.model}: {graph.n_layers} layers, {graph.n_heads} heads"
        + (f" ({graph.n_kv_heads} key/value heads)" if graph.n_kv_heads != graph.n_heads else "")
        + f", d_model {graph.d_model}, d_head {graph.d_head}, vocabulary {graph.d_vocab}",
        f"attention {'looks back only (causal)' if graph.causal else 'looks both ways (not causal)'}",
        "",
        f"{'node':<22}{'reads':<34}{'writes':<24}",
    ]
    lines += [f"{name:<22}{reads:<34}{writes:<24}" for name, reads, writes in _rows(graph)]
    lines += [
        "",
        f"{len(graph.writers)} writers (input, heads, MLPs), {len(graph.readers)} readers, {graph.n_edges:,} edges",
        "counted as AutoCircuit does: token and position embeddings are one writer, `input`, and constants (attn_bias)",
        "are none; ACDC also draws an edge from each head's q, k and v into the head, three more a head",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _rows(graph: ResidualGraph) -> list[tuple[str, str, str]]:
    out: list[tuple[str, str, str]] = []
    seen: set[int | None] = set()
    for node in graph.nodes:
        if node.kind is not Kind.HEAD:
            out.append((node.name, *_shapes(graph, node)))
        elif node.layer not in seen:
            seen.add(node.layer)
            name = f"head[{node.layer}, 0..{graph.n_heads - 1}]"
            out.append((name, *_shapes(graph, node)))
    return out


def _shapes(graph: ResidualGraph, node: Node) -> tuple[str, str]:
    stream = f"[pos, {graph.d_model}]"
    match node.kind:
        case Kind.EMBED | Kind.POS_EMBED | Kind.ATTN_BIAS:
            return "-", stream
        case Kind.HEAD:
            return f".q .k .v -> [pos, {graph.d_head}] each", f"{stream} a head"
        case Kind.MLP:
            return stream, stream
        case Kind.LOGITS:
            return stream, f"[pos, {graph.d_vocab}]"


def nodes_json(graph: ResidualGraph) -> dict[str, Any]:
    """The same as data."""
    return {
        "format_version": 1,
        "model": graph.model,
        "causal": graph.causal,
        "sizes": {
            "n_layers": graph.n_layers,
            "n_heads": graph.n_heads,
            "n_kv_heads": graph.n_kv_heads,
            "d_model": graph.d_model,
            "d_head": graph.d_head,
            "d_vocab": graph.d_vocab,
        },
        "counts": {"writers": len(graph.writers), "readers": len(graph.readers), "edges": graph.n_edges},
        "nodes": [
            {
                "name": n.name,
                "kind": n.kind.value,
                "rank": n.rank,
                "ports": list(PORTS) if n.kind is Kind.HEAD else [],
            }
            for n in graph.nodes
        ],
    }
