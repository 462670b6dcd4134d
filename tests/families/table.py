"""The table of families as the README has it."""

from __future__ import annotations

from tests.families.rows import FAMILIES, Family

HEAD = "| family | attention | TransformerBridge | note |\n| --- | --- | --- | --- |"


def table() -> str:
    """Markdown: the families that are traced, and after them those that are refused, each with the reason."""
    traced = [_traced(f) for f in FAMILIES if not f.refused]
    refused = [_refused(f) for f in FAMILIES if f.refused]
    return "\n".join((HEAD, *traced, *refused))


def _traced(family: Family) -> str:
    kind = f"`{family.attention}`" if family.attention else "own"
    bridge = f"no: {family.no_bridge}" if family.no_bridge else family.bridge
    return f"| {family.name} | {kind} | {bridge} | {family.note} |"


def _refused(family: Family) -> str:
    return f"| {family.name} | refused | | {family.note} |"
