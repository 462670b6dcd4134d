"""AutoCircuit, in the environment that is named for it: it needs older versions of what patchc needs.

A process there reads the model and the worlds from files and answers for cells, a line of JSON each way.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from patchc.bench.peers import Coords, Module, PeerError, Session, Task
from patchc.bench.works import EDGES, Work

SCRIPT = Path(__file__).with_name("autocircuit_script.py")


class AutoCircuit:
    """Patches one edge a forward pass. `python`: the interpreter of its environment, where one is named."""

    name = "autocircuit"

    def __init__(self, module: Module, python: str | None):
        self._module, self._python = module, python or ""

    def missing(self) -> str | None:
        if not self._python:
            return "no environment that has it is named (--autocircuit)"
        try:
            asked = [self._python, "-I", "-c", "import auto_circuit.types"]
            found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=300)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{self._python} does not run: {error}"
        return None if found.returncode == 0 else f"{self._python} has no auto_circuit"

    def does(self, work: Work) -> bool:
        return work is EDGES

    def open(self, task: Task) -> Session:
        return AutoCircuitSession(self._module(), self._python, task)


class AutoCircuitSession:
    """The process; it ends with `close`."""

    def __init__(self, module: Any, python: str, task: Task):
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        state = {name: tensor.contiguous().clone() for name, tensor in module.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(module.config.to_dict()), encoding="utf-8")
        worlds = task.worlds
        (folder / "worlds.json").write_text(
            json.dumps(
                {
                    "clean": worlds.clean.tolist(),
                    "corrupt": worlds.corrupt.tolist(),
                    "answer": worlds.answer,
                    "wrong": worlds.wrong,
                }
            ),
            encoding="utf-8",
        )
        self._said = (folder / "stderr.txt").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            # Isolated: beside the script lies a file with the name of a library that it wants.
            [python, "-I", str(SCRIPT), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            encoding="utf-8",
        )
        try:
            self.fixed_s = float(self._answer()["cpu_s"])
        except PeerError:
            self.close()
            raise

    def run(self, cells: Sequence[Coords]) -> tuple[list[float], float]:
        edges = [f"{node_name(str(writer))}->{node_name(str(reader))}" for writer, reader in cells]
        assert self._process.stdin is not None
        print(json.dumps({"edges": edges, "threads": torch.get_num_threads()}), file=self._process.stdin, flush=True)
        answer = self._answer()
        return answer["values"], answer["cpu_s"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended: {self._last_words()}")
        return json.loads(line)

    def _last_words(self) -> str:
        """The last line that the process wrote to stderr."""
        self._said.seek(0)
        return next((line.strip() for line in reversed(self._said.readlines()) if line.strip()), "it said nothing")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._said.close()
        self._folder.cleanup()


def node_name(name: str) -> str:
    """A node's name in AutoCircuit's spelling: `head[1, 0].q` is `A1.0.Q`."""
    numbers = ".".join(re.findall(r"\d+", name))
    if name == "input":
        return "Resid Start"
    if name == "logits":
        return "Resid End"
    if name.startswith("mlp"):
        return f"MLP {numbers}"
    port = f".{name[-1].upper()}" if name[-1] in "qkv" else ""
    return f"A{numbers}{port}"
