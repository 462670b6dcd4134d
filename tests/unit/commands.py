"""Running `patchc` in a test: small specs, and what a command left on stdout and stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODEL = 'model "induction-2l"'
DATA = 'data { clean "a b c d a b c" corrupt "a b c d a e c" answer " d" wrong " e" }'
TWO = 'data { clean "f g h f g" corrupt "f g h f k" answer " h" wrong " k" }'
HEADS = """
metric diff = logit(answer) - logit(wrong)
experiment heads "each head" {
  for h in head
  run clean
  patch node h with corrupt
  measure diff, kl(clean)
}
"""
ONE = "experiment one { run clean patch node head[0, 0] with corrupt measure logit(answer) - logit(wrong) as diff }"
FAILS = """
experiment fails {
  run clean
  patch node head[1, 0] with corrupt
  measure 1 / (logit(wrong) - logit(wrong)) as bad
}
"""
SAVING = HEADS.replace("kl(clean)", 'kl(clean)\n  save "out.csv"\n  show heatmap')


@dataclass(frozen=True)
class Ran:
    exit: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def codes(self) -> list[str]:
        """Of the errors, in the text on stderr."""
        return [line[6:].split("]")[0] for line in self.err.splitlines() if line.startswith("error[")]


Run = Callable[..., Ran]


def spec(*parts: str, name: str = "a.patch") -> str:
    """Write a spec into the current directory; gives its name."""
    Path(name).write_text("\n".join(parts), encoding="utf-8")
    return name
