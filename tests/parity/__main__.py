"""python -m tests.parity: measures every row on one thread and prints the parity table.

CPU seconds are those of one call of TransformerLens, and of patchc's third call; tracing a model, once, is in neither.
"""

from __future__ import annotations

import sys
import warnings

import torch

from tests.parity.measure import measure
from tests.parity.table import markdown
from tests.parity.works import pairs

CALLS = 3


def main() -> int:
    """Print the table; 1 where a row is not equal."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows = [measure(work, model, calls=CALLS) for work, model in pairs()]
    print(markdown(rows))
    return int(not all(row.equal for row in rows))


if __name__ == "__main__":
    sys.exit(main())
