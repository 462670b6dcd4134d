"""The one namespace of a spec: lets, metrics, columns, positions and, in an experiment, loop variables.

Says what a name is, and what was probably meant where it is nothing. What the things are is for the other
files.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from patchc.diagnostics import RULES, Diagnostic, Note, PatchcError, Report, Span, nearest
from patchc.parse import tree

P = TypeVar("P")
T = TypeVar("T")

UNKNOWN_NAME = RULES.add("unknown-name", "a name that nothing in the spec or the language has")
NAME_CLASH = RULES.add(
    "name-clash", "one name for two things; lets, metrics, columns, positions and variables share names"
)
WRONG_KIND = RULES.add("wrong-kind", "a name or an expression stands where another kind of thing is needed")
NOT_SUPPORTED_YET = RULES.add("not-supported-yet", "the language has it, this version does not run it")
UNKNOWN_PARAMETER = RULES.add("unknown-parameter", "a ${NAME} for which no value was given")

NODE_NAMES = (
    *("input", "embed", "pos_embed", "head", "mlp", "attn_out", "attn_bias", "kv"),
    *("resid_pre", "resid_mid", "resid_post", "logits", "any", "writers", "readers"),
)
NUMBER_DOMAINS = ("layers", "heads", "positions", "prompts")
VALUE_NAMES = ("zero", "mean", "self", "resample", "noise", "tensor", "blocked")
FUNCTION_NAMES = ("logit", "prob", "logprob", "rank", "correct", "loss", "kl", "dot", "circuit", "nodes")
OTHERS_WORDS = {
    **dict.fromkeys(("gaussian", "normal", "randn", "random"), "noise"),
    **dict.fromkeys(("pos", "position", "seq", "tokens"), "positions"),
    **dict.fromkeys(("average", "avg"), "mean"),
    **dict.fromkeys(("knockout", "mask"), "blocked"),
    **dict.fromkeys(("accuracy", "acc"), "correct"),
    "probability": "prob",
    "log_prob": "logprob",
    "kl_div": "kl",
}
"""What other tools call a name of the language, where the spelling alone would not show it."""
BUILT_IN = {
    **dict.fromkeys(NODE_NAMES, "a set of nodes"),
    **dict.fromkeys(NUMBER_DOMAINS, "something to range over"),
    **dict.fromkeys(VALUE_NAMES, "a value"),
    **dict.fromkeys(FUNCTION_NAMES, "a function"),
}
"""Every name that the language itself gives a meaning, and what it names."""


@contextmanager
def collecting(report: Report) -> Generator[None]:
    """Whatever the block raises as `PatchcError` goes into the report, and the work goes on after the
    block."""
    try:
        yield
    except PatchcError as error:
        for diagnostic in error.diagnostics:
            report.add(diagnostic)


def gathered(parts: Iterable[P], make: Callable[[P], T]) -> list[T]:
    """What `make` gives for each part. Raises what is wrong with every one of them, not with the first alone; the same
    words once."""
    out: list[T] = []
    faults: list[PatchcError] = []
    for part in parts:
        try:
            out.append(make(part))
        except PatchcError as error:
            faults.append(error)
    if faults:
        found: dict[tuple[str, str], Diagnostic] = {}
        for d in (d for fault in faults for d in fault.diagnostics):
            found.setdefault((d.code, d.message), d)
        raise PatchcError(found.values())
    return out


@dataclass(frozen=True, slots=True)
class Declared:
    """What a name of the spec is, and where it was declared (no place: in a data file or in Python)."""

    kind: str
    span: Span | None


@dataclass
class Scope:
    """Every name that a spec declares outside its experiments, and the values of its parameters."""

    report: Report
    parameters: Mapping[str, str | int | float] = field(default_factory=dict[str, str | int | float])
    names: dict[str, Declared] = field(default_factory=dict[str, Declared])
    lets: dict[str, tree.Let] = field(default_factory=dict[str, tree.Let])
    metrics: dict[str, tree.Metric] = field(default_factory=dict[str, tree.Metric])
    unsupported: set[str] = field(default_factory=set[str])
    """Names of statements that are not supported yet, which has been reported."""
    called: set[str] = field(default_factory=set[str])
    """Metrics that are Python functions."""

    def declare(self, name: str, kind: str, span: Span | None) -> bool:
        """Take a name; reports a clash and gives False where it is taken."""
        if clash := self.clash(name, kind, span):
            self.report.add(clash)
            return False
        self.names[name] = Declared(kind, span)
        return True

    def clash(self, name: str, kind: str, span: Span | None):
        """The diagnostic for taking a name that is taken, or None."""
        if name in BUILT_IN:
            message = f"{name!r} cannot name {kind}: the language has it as {BUILT_IN[name]}"
            return NAME_CLASH.at(span, message, fix=f"choose another name, such as `{name}_`")
        other = self.names.get(name)
        if other is None:
            return None
        notes = [Note(f"{name!r} is declared here", other.span)] if other.span else []
        return NAME_CLASH.at(span, f"{name!r} cannot name {kind}: it already names {other.kind}", notes=notes)

    def kind(self, name: str) -> str | None:
        """What a name is, in words, or None."""
        return self.names[name].kind if name in self.names else BUILT_IN.get(name)

    def not_a(self, what: str, name: tree.Name, known: Iterable[str], meant: str | None = None) -> PatchcError:
        """The error for `name` where `what` (in words) is needed and `known` are the names that would do.

        `meant`: the fix, where more is known than how names are spelt."""
        if name.text in self.unsupported:
            return PatchcError(())
        known = list(dict.fromkeys(known))
        kind = self.kind(name.text)
        if kind is not None:
            message = f"{name.text!r} is {kind}, not {what}{_choice(known)}"
            return WRONG_KIND.error(message, fix=meant or _nearest(name.text, known), span=name.span)
        fix = meant or _nearest(name.text, known) or nearest(name.text, self.names)
        return UNKNOWN_NAME.error(
            f"nothing is called {name.text!r}; {what} is needed{_choice(known)}", fix=fix, span=name.span
        )

    def literal(self, node: tree.Parameter) -> str | int | float:
        """The value of `${NAME}`."""
        if node.name in self.parameters:
            return self.parameters[node.name]
        given = f" (given: {', '.join(self.parameters)})" if self.parameters else ""
        message = f"no value is given for ${{{node.name}}}{given}"
        raise UNKNOWN_PARAMETER.error(message, fix=f"give it one: `--set {node.name}=...`", span=node.span)

    def text(self, node: tree.Text | tree.Parameter) -> str:
        """The text that stands there, or that the parameter stands for."""
        if isinstance(node, tree.Text):
            return node.text
        value = self.literal(node)
        if isinstance(value, str):
            return value
        raise WRONG_KIND.error(f"${{{node.name}}} is {value}, and a text is needed here", span=node.span)

    def number(self, node: tree.Number | tree.Parameter) -> int | float:
        """The number that stands there, or that the parameter stands for."""
        if isinstance(node, tree.Number):
            return node.value
        value = self.literal(node)
        if not isinstance(value, str):
            return value
        raise WRONG_KIND.error(f"${{{node.name}}} is {value!r}, and a number is needed here", span=node.span)


def _nearest(name: str, known: list[str]) -> str | None:
    """The name in other letters, the one that other tools' word stands for, or the nearest spelling."""
    folded = next((k for k in known if k.casefold() == name.casefold()), None) or OTHERS_WORDS.get(name.lower())
    return f"did you mean `{folded}`?" if folded in known else nearest(name, known)


def _choice(known: list[str]) -> str:
    """`: there are a, b and c`, shortened where there are many; nothing where there are none."""
    if not known:
        return ""
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" (there {'is' if len(known) == 1 else 'are'} {shown})"


def bound(scope: Scope, node: tree.Bound) -> int | float:
    """A signed number."""
    if isinstance(node, tree.Negated):
        return -scope.number(node.inner) if isinstance(node.inner, tree.Number | tree.Parameter) else 0
    return scope.number(node)


def written(node: tree.Construct) -> str:
    """A part of the spec as it stands there, white space made single."""
    span = node.span
    return " ".join(span.source.text[span.start : span.end].split()) if span else "this"
