"""patchc: a declarative compiler for activation-patching experiments on transformer language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from patchc.api import Compiled, Model, load, load_graph
    from patchc.checking import check
    from patchc.diagnostics import PatchcError
    from patchc.planning import plan

__all__ = ["Compiled", "Model", "PatchcError", "__version__", "check", "load", "load_graph", "plan"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Lazy: importing any part of patchc (the hooks backend, the parser) must not load the others, nor torch.
    if name in ("Compiled", "Model", "load", "load_graph"):
        from patchc import api

        return getattr(api, name)
    if name == "check":
        from patchc.checking import check

        return check
    if name == "plan":
        from patchc.planning import plan

        return plan
    if name == "PatchcError":
        from patchc.diagnostics import PatchcError

        return PatchcError
    raise AttributeError(f"module 'patchc' has no attribute {name!r}")
