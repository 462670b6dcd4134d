"""The page "From TransformerLens": its cells run, with all that they assert, and it stands with their outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

PAGE = Path(__file__).parents[2] / "examples" / "from_transformer_lens.ipynb"
MOST_BYTES = 300_000


@pytest.fixture
def page() -> Any:
    return nbformat.read(PAGE, as_version=4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the kernel's own client, which the page does not hear
def test_the_page_runs(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in the tests' own process: more would wait for each other, busily
    NotebookClient(page, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_the_page_has_its_outputs(page: Any) -> None:
    cells = [cell for cell in page.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert sum(cell.source.count("assert") for cell in cells) >= 3
    assert PAGE.stat().st_size < MOST_BYTES
