"""The `model` statement: which model, with which options. Read before the model is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from patchc.diagnostics import RULES, Note, PatchcError, Report, nearest
from patchc.ir.experiment import ModelChoice
from patchc.parse import tree
from patchc.resolve.parameters import Literal, wrong_parameters
from patchc.resolve.scope import Scope, collecting

NO_MODEL = RULES.add("no-model", "a spec without a `model` statement, and no model given in Python")
TWO_MODELS = RULES.add("two-models", "a spec with more than one `model` statement")
UNKNOWN_OPTION = RULES.add("unknown-option", "an option that `model` does not have")
BAD_OPTION = RULES.add("bad-option", "an option of `model` with a value that it does not take")

CHOICES: dict[str, tuple[str, ...] | None] = {
    "dtype": ("float32", "float64", "float16", "bfloat16"),
    "device": None,
    "revision": None,
    "bos": ("true", "false"),
    "attention": ("sdpa", "eager"),
}
"""The options and what they can be; None for any text."""


def choose_model(spec: tree.Spec, scope: Scope) -> ModelChoice | None:
    """The one `model` statement of a spec, its options checked; every error goes into the scope's report."""
    statements = [item for item in spec.items if isinstance(item, tree.Model)]
    for other in statements[1:]:
        notes = [Note("the first is here", statements[0].span)]
        scope.report.add(TWO_MODELS.at(other.span, "a spec has one model, and this is a second", notes=notes))
    if not statements:
        return None
    with collecting(scope.report):
        return _chosen(statements[0], scope)
    return None


def model_choice(spec: tree.Spec, parameters: Mapping[str, Literal] | None = None) -> ModelChoice:
    """The model that a spec asks for. Raises `PatchcError` with every error of its `model` statements and of the
    `parameters` given."""
    report = Report()
    for diagnostic in wrong_parameters(spec, parameters or {}):
        report.add(diagnostic)
    found = choose_model(spec, Scope(report, parameters or {}))
    report.raise_errors()
    if found is None:
        raise missing_model(spec)
    return found


def missing_model(spec: tree.Spec) -> PatchcError:
    """The error for a spec that names no model."""
    return NO_MODEL.error("the spec names no model", fix='as in `model "ioi-tiny"`', span=spec.span)


def _chosen(node: tree.Model, scope: Scope) -> ModelChoice:
    options: dict[str, str | int | bool] = {}
    for option in node.options:
        with collecting(scope.report):
            name = option.name.text
            if name not in CHOICES:
                message = f"model has no option {name!r}; it has {', '.join(CHOICES)}"
                raise UNKNOWN_OPTION.error(message, fix=nearest(name, CHOICES), span=option.name.span)
            options[name] = _value(option, scope)
    return ModelChoice(scope.text(node.name), tuple(options.items()), node.span)


def _value(option: tree.Option, scope: Scope) -> str | bool:
    name, value = option.name.text, _literal(option, scope)
    choices = CHOICES[name]
    if choices is not None and value not in choices:
        message = f"{name} is one of {', '.join(choices)}, not {value}"
        raise BAD_OPTION.error(message, fix=nearest(value, choices), span=option.value.span)
    return value == "true" if name == "bos" else value


def _literal(option: tree.Option, scope: Scope) -> str:
    match option.value:
        case tree.Name() | tree.Text():
            return option.value.text
        case _:
            return str(scope.literal(option.value) if isinstance(option.value, tree.Parameter) else option.value.value)
