"""Every error of many specs, found without weights and without running anything: `patchc check`.

Parsed, resolved against models' outlines, and lowered. What only values can show is left to the run: that a tensor or
the model's weights hold numbers, that patched values differ from the run's own, that a metric stays finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from patchc.diagnostics import Diagnostic, PatchcError, Report, Source, Span
from patchc.ir.experiment import Experiment, ModelChoice, Study
from patchc.ir.graph import ResidualGraph
from patchc.lower import lower
from patchc.model.outline import Outline, chosen_outline
from patchc.optimise import reads
from patchc.parse import parse
from patchc.resolve import model_choice, resolve
from patchc.resolve.parameters import Literal
from patchc.spec import read_spec

LOWERED = 1000
"""Experiments of more patches than this, those of all cells counted, are not lowered: that one of them changes nothing
is left to the run."""


def check(*specs: str | Path, parameters: Mapping[str, Literal] | None = None) -> list[Diagnostic]:
    """Every error and warning of some specs (paths, or their texts), in the specs' order; never raises for them.

    `parameters`: the values of `${NAME}`, the same for all specs. Opens every file that a spec names, of tensors the
    headers alone. Each model's config is read once; its weights are not, and may be missing.
    """
    outlines = _Outlines()
    return [found for spec in specs for found in _checked(spec, parameters or {}, outlines)]


class _Outlines:
    """Each model's outline, or what is wrong with the model, found when a spec first asks for it."""

    def __init__(self) -> None:
        self._found: dict[tuple[ModelChoice, Path], Outline | PatchcError] = {}

    def of(self, choice: ModelChoice, base: Path) -> Outline:
        """The outline of the model that a spec asks for; what is wrong with it is said at that spec's statement."""
        key = (choice, base)
        if key not in self._found:
            self._found[key] = self._find(choice, base)
        found = self._found[key]
        if isinstance(found, PatchcError):
            raise found.at(choice.span)
        return found

    def _find(self, choice: ModelChoice, base: Path) -> Outline | PatchcError:
        try:
            return chosen_outline(choice, base)
        except PatchcError as error:
            return error


def _checked(spec: str | Path, parameters: Mapping[str, Literal], outlines: _Outlines) -> tuple[Diagnostic, ...]:
    try:
        return _warnings(spec, parameters, outlines)
    except PatchcError as error:
        start = Span(Source(str(spec), ""), 0, 0)  # so that it is seen which of several specs has no place for it
        return tuple(d.at(start) if isinstance(spec, Path) else d for d in error.diagnostics)


def _warnings(spec: str | Path, parameters: Mapping[str, Literal], outlines: _Outlines) -> tuple[Diagnostic, ...]:
    """The warnings of a spec; raises its errors."""
    source, base = read_spec(spec)
    tree = parse(source)
    choice = model_choice(tree, parameters)
    model = outlines.of(choice, base)
    found = resolve(
        tree, source, model.graph, model.tokenizer, base=base, model=choice, parameters=parameters, bos=model.bos
    )
    _check_effects(found.study, model.graph)
    from patchc.places import check_places, input_paths  # numpy comes with them: not for a spec that does not parse

    check_places(found.study, source, base, input_paths(tree, found.study, source, base, parameters, choice.name))
    return found.warnings


def _check_effects(study: Study, graph: ResidualGraph) -> None:
    """Raise what lowering has to say of each experiment: `no-effect`, and starts that two patches claim."""
    report = Report()
    for experiment in study.experiments:
        if sum(len(cell.patches) for cell in experiment.cells) <= LOWERED:
            for diagnostic in _effects(experiment, study, graph):
                report.add(diagnostic)
    report.raise_errors()


def _effects(experiment: Experiment, study: Study, graph: ResidualGraph) -> tuple[Diagnostic, ...]:
    try:
        lower(experiment, study.prompts, graph, reads.ends(experiment.metrics, study.prompts))
    except PatchcError as error:
        return error.diagnostics
    return ()
