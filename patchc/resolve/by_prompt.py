"""`for i in prompts`: a dim over prompts, which needs no cells of its own, as every cell is run on every prompt.

The variable names a dim and nothing else: patches and metrics are the same for every prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from patchc.diagnostics import RULES, Diagnostic, Note, PatchcError
from patchc.ir.experiment import Dim, PromptDim
from patchc.parse import tree
from patchc.resolve.bindings import Number
from patchc.resolve.places import names_in
from patchc.resolve.records import chosen
from patchc.resolve.scope import Scope

DOMAIN = "prompts"
PROMPT_VARIABLE = RULES.add("prompt-variable", "a variable over prompts stands where something depends on it")


@dataclass(frozen=True, slots=True)
class ByPrompt:
    """A loop over prompts: the `before` variables that stand before it, and the prompts' numbers."""

    binding: tree.Binding
    before: int
    prompts: tuple[int, ...]

    @property
    def universe(self) -> tuple[Number, ...]:
        return tuple(Number(i, "prompt") for i in self.prompts)

    def dim(self, axis: int, dims: Sequence[Dim]) -> PromptDim:
        """The dim, before number `axis` of `dims`; it takes the variable's name where one of them is `prompt`."""
        taken = any(d.name == "prompt" for d in dims)
        return PromptDim(axis, self.binding.name.text if taken else "prompt", self.prompts)


def is_over_prompts(binding: tree.Binding) -> bool:
    """Whether a loop ranges over prompts: `prompts`, or some of them, `prompts[..9]`."""
    domain = binding.domain
    return isinstance(domain, tree.Ref) and domain.name.text == DOMAIN


def over_prompts(bindings: Sequence[tree.Binding], n: int, scope: Scope) -> ByPrompt | None:
    """The loop over the `n` prompts among an experiment's, if there is one."""
    found = [(i, b) for i, b in enumerate(bindings) if is_over_prompts(b)]
    if not found:
        return None
    if len(found) > 1:
        notes = [Note("the first is here", found[0][1].span)]
        message = "two loops over prompts: a result has one number for a prompt"
        raise PatchcError([PROMPT_VARIABLE.at(found[1][1].span, message, notes=notes)])
    before, binding = found[0]
    domain = binding.domain
    assert isinstance(domain, tree.Ref)
    if domain.sites or len(domain.indices) > 1:
        message = "prompts have one index and no sites"
        raise PROMPT_VARIABLE.error(message, fix="as in `prompts[..9]`", span=domain.span)
    numbers = chosen(domain.indices[0], n, scope, "data") if domain.indices else range(n)
    return ByPrompt(binding, before, tuple(dict.fromkeys(numbers)))


def misused(binding: tree.Binding, clauses: Sequence[tree.Clause]) -> Iterator[Diagnostic]:
    """Everything that depends on the variable of a loop over prompts; metrics can depend on no variable."""
    name = binding.name.text
    others = [b.domain for c in clauses if isinstance(c, tree.For) for b in c.bindings]
    parts = [*others, *(c for c in clauses if isinstance(c, tree.Patch))]
    for part in parts:
        if name in names_in(part):
            message = f"{name!r} ranges over prompts, and nothing here differs from prompt to prompt"
            fix = "leave it out: the result has a dim over prompts all the same"
            notes = [Note("the loop is here", binding.span)]
            yield PROMPT_VARIABLE.at(part.span, message, fix=fix, notes=notes)
