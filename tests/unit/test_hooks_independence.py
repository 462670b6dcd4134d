"""The hooks backend shares nothing with the compiler but `ir` and `diagnostics`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FILES = (
    "hooks", "hook_drivers", "hook_points", "hook_proof", "hook_taps", "noise", "oracle_cells", "oracle_metrics",
    "oracle_nodes", "oracle_passes", "oracle_rounding", "oracle_states", "oracle_values", "oracle_worlds", "residuals",
)  # fmt: skip
ALLOWED = {"patchc", "patchc.diagnostics", "patchc.execute", *(f"patchc.execute.{name}" for name in FILES)}


def forbidden(modules: list[str]) -> list[str]:
    ours = (m for m in modules if m == "patchc" or m.startswith("patchc."))
    return sorted(m for m in ours if m not in ALLOWED and m != "patchc.ir" and not m.startswith("patchc.ir."))


def loaded_with(*names: str) -> list[str]:
    """The modules that a fresh process has after importing these."""
    code = f"import sys, {', '.join(names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def imported_by(source: str) -> list[str]:
    """Every module that a source names in an import, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.append(node.module or "")
    return names


def test_the_backend_loads_nothing_of_the_compiler() -> None:
    assert forbidden(loaded_with(*(f"patchc.execute.{name}" for name in FILES))) == []


@pytest.mark.parametrize("name", FILES)
def test_no_function_of_the_backend_imports_the_compiler(name: str) -> None:
    assert forbidden(imported_by((ROOT / "patchc" / "execute" / f"{name}.py").read_text())) == []


def test_the_tests_of_independence_can_fail() -> None:
    assert "patchc.lower" in forbidden(loaded_with("patchc.execute.residuals", "patchc.lower"))
    assert forbidden(imported_by("def f():\n    from patchc.optimise import cut")) == ["patchc.optimise"]
