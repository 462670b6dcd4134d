"""What values are made of: means, values from other tokens and other prompts, noise, tensors.

How they are added up is for `values`; whether one can enter where a patch starts, for `entry`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from patchc.diagnostics import RULES, PatchcError, Span, nearest
from patchc.ir.bits import bits
from patchc.ir.experiment import FromWorld, Given, Mean, Moved, Noise, Source
from patchc.ir.tokens import Tokens
from patchc.parse import tree
from patchc.resolve.bindings import Env, WorldName
from patchc.resolve.data import Dataset, silent
from patchc.resolve.other_data import OtherData
from patchc.resolve.scope import WRONG_KIND
from patchc.resolve.tensors import Tensors

BAD_ARGUMENT = RULES.add("bad-argument", "an argument that a value does not take, or one that it lacks")
NO_OTHER_PROMPT = RULES.add("no-other-prompt", "a prompt that has no other to be resampled from")
SEVERAL_PLACES = RULES.add("several-places", "a value from several positions of one prompt")

MEAN, RESAMPLE, NOISE = "mean(corrupt, over=positions)", "resample(seed=0)", "noise(std=0.1, seed=0)"


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a function, each named one once."""

    name: str
    span: Span | None
    plain: tuple[tree.Value | tree.Text, ...]
    named: Mapping[str, tree.Named]


class Sources:
    """The sources of a spec's values. `number` reads arithmetic that has to be a number."""

    def __init__(
        self, dataset: Dataset, tensors: Tensors, other: OtherData, number: Callable[[tree.Value, Env], float]
    ):
        self._data = dataset
        self._tensors = tensors
        self._other = other
        self._number = number
        self._groups: dict[str, tuple[int, ...]] = {}
        self._drawn: dict[tuple[str | None, int], tuple[int, ...]] = {}
        self.seeds: dict[tuple[str, int], None] = {}
        """(what is random, its seed), each once."""

    # ---- means

    def mean(self, node: tree.Function, env: Env, run: str) -> Mean:
        """`mean(corrupt, over=positions, by=template)`, `mean("abc.jsonl", corrupt)`."""
        given = _arguments(node, ("over", "by"), MEAN)
        over = self._over(given.named.get("over"))
        by = given.named.get("by")
        groups = self._grouped(by) if by else None
        match given.plain:
            case ():
                return Mean(run, over, groups)
            case (tree.Text() | tree.Parameter() as file, *rest) if len(rest) < 2:
                if by:
                    message = "`by` groups the prompts of this spec, and this is the mean of other data"
                    raise BAD_ARGUMENT.error(message, span=by.span)
                return Mean(self._other.world(file, rest[0] if rest else None, run), over)
            case (tree.Ref(name, (), ()),):
                return Mean(self._world(name, env), over, groups)
            case _:
                message = "mean takes a world, or a file and one of its columns"
                raise BAD_ARGUMENT.error(message, fix=MEAN, span=node.span)

    def _over(self, named: tree.Named | None) -> bool:
        match named and named.value:
            case None:
                return False
            case tree.Ref(tree.Name("positions"), (), ()):
                return True
            case _:
                message = "a mean is over prompts; `over` can add the positions"
                raise BAD_ARGUMENT.error(message, fix="as in `over=positions`", span=named.span if named else None)

    def _grouped(self, by: tree.Named) -> tuple[int, ...]:
        """For each row of the layout the number of its group: prompts with equal cells are one."""
        column = self._column(by)
        if column.text not in self._groups:
            numbers: dict[str, int] = {}
            cells = self._cells(column)
            groups = [numbers.setdefault(cell, len(numbers)) for cell in cells]
            self._groups[column.text] = tuple(groups) * len(self._data.endings)
        return self._groups[column.text]

    def _column(self, named: tree.Named) -> tree.Name:
        match named.value:
            case tree.Ref(column, (), ()) if column.text in self._data.columns:
                return column
            case tree.Ref(column, (), ()) if self._data.records:
                raise self._data.scope.not_a("a column", column, self._data.columns)
            case tree.Ref():
                raise silent()
            case _:
                what = named.name.text
                raise BAD_ARGUMENT.error(f"`{what}` takes a column", fix=f"{what}=answer", span=named.span)

    def _cells(self, column: tree.Name) -> list[str]:
        """What stands in a column, prompt by prompt, in a form that can be compared."""
        return [repr(self._data.cell(i, column.text, column.span)) for i in range(len(self._data.records))]

    def _world(self, name: tree.Name, env: Env) -> str:
        local = env.get(name.text)
        return local.label if isinstance(local, WorldName) else self._data.world(name)

    # ---- from another token

    def moved(self, source: Source, tokens: Tokens, span: Span | None) -> Source:
        """`VALUE @ place`: the value that a source has at one position of each prompt, for all of its tokens."""
        at = self._one_a_row(tokens, span)
        match source:
            case FromWorld():
                return Moved(source, at)
            case Mean(_, over_positions):
                return source if over_positions else Moved(source, at)
            case Moved(inner, before):
                return Moved(inner, tuple(before[t] for t in at))
            case _:
                message = "only a world, a mean or a resampled prompt has a value of another position"
                raise WRONG_KIND.error(message, fix="as in `clean @ end`", span=span)

    def _one_a_row(self, tokens: Tokens, span: Span | None) -> tuple[int, ...]:
        layout = self._data.layout
        out: list[int] = []
        for row, length in enumerate(layout.lengths):
            here = list(bits(tokens & layout.prompt(row)))
            if len(here) != 1:
                prompt = row % len(self._data.lengths)
                message = f"a value comes from one position of each prompt; this is {len(here)} in prompt {prompt}"
                raise SEVERAL_PLACES.error(message, fix="as in `clean @ end`", span=span)
            out += here * length
        return tuple(out)

    # ---- from another prompt

    def resample(self, node: tree.Function, env: Env, run: str) -> Moved:
        """`resample(corrupt, same=answer, seed=0)`: what another prompt of the same length has there."""
        given = _arguments(node, ("same", "seed"), RESAMPLE)
        seed = self._seed(given, env)
        same = self._column(given.named["same"]) if "same" in given.named else None
        match given.plain:
            case ():
                world = run
            case (tree.Ref(name, (), ()),):
                world = self._world(name, env)
            case _:
                raise BAD_ARGUMENT.error(
                    "resample takes a world", fix="as in `resample(corrupt, seed=0)`", span=node.span
                )
        return self.resampled(world, same, seed, node.span)

    def resampled(self, world: str, same: tree.Name | None, seed: int, span: Span | None) -> Moved:
        """A prompt's own draw depends on the seed, on its number and on which prompts it can be drawn from."""
        self.seeds["resample", seed] = None
        key = (same.text if same else None, seed)
        if key not in self._drawn:
            self._drawn[key] = self._draw(same, seed, span)
        return Moved(FromWorld(world), self._drawn[key])

    def _draw(self, same: tree.Name | None, seed: int, span: Span | None) -> tuple[int, ...]:
        layout, n = self._data.layout, len(self._data.records)
        if not n:
            raise silent()
        alike = self._alike(same)
        prompts: dict[Any, list[int]] = {}
        for i, key in enumerate(alike):
            prompts.setdefault(key, []).append(i)
        drawn: list[int] = []
        for i, key in enumerate(alike):
            others = [j for j in prompts[key] if j != i]
            if not others:
                raise self._alone(i, same, span)
            drawn.append(Random(f"{seed}/{i}").choice(others))
        rows = [row - row % n + drawn[row % n] for row in range(layout.n_prompts)]
        return tuple(
            layout.offsets[row] + p for row, length in zip(rows, layout.lengths, strict=True) for p in range(length)
        )

    def _alike(self, same: tree.Name | None) -> list[Any]:
        """For each prompt what another has to share with it: its lengths, and the cell of a column."""
        layout, n = self._data.layout, len(self._data.records)
        lengths = self._data.lengths
        cells = self._cells(same) if same else [""] * n
        return [(layout.lengths[i::n], lengths[i], cells[i]) for i in range(n)]

    def _alone(self, prompt: int, same: tree.Name | None, span: Span | None) -> PatchcError:
        length = self._data.lengths[prompt]
        also = f" and the same {same.text}" if same else ""
        message = f"no other prompt has the {length} tokens{also} of prompt {prompt}, so that it cannot be resampled"
        return NO_OTHER_PROMPT.error(message, fix="add prompts of that length, or use `mean`", span=span)

    # ---- noise

    def noise(self, node: tree.Function, env: Env) -> Noise:
        """`noise(std=0.1, seed=0)`; with `sigma` the deviation is in units of the site's own."""
        given = _arguments(node, ("std", "sigma", "seed"), NOISE)
        widths = [name for name in ("std", "sigma") if name in given.named]
        if given.plain or len(widths) != 1:
            message = "noise takes its standard deviation: `std`, or `sigma` in units of what it is added to"
            raise BAD_ARGUMENT.error(message, fix=NOISE, span=node.span)
        named = given.named[widths[0]]
        std = self._number_of(named, env)
        if not std > 0:
            raise BAD_ARGUMENT.error(f"a standard deviation is positive, not {std:g}", fix=NOISE, span=named.span)
        seed = self._seed(given, env)
        self.seeds["noise", seed] = None
        return Noise(std, seed, widths[0] == "sigma")

    def _seed(self, given: Arguments, env: Env) -> int:
        if "seed" not in given.named:
            return 0
        seed = self._number_of(given.named["seed"], env)
        if not seed.is_integer() or seed < 0:
            message = f"a seed is a whole number from 0 on, not {seed:g}"
            raise BAD_ARGUMENT.error(message, fix="as in `seed=0`", span=given.named["seed"].span)
        return int(seed)

    def _number_of(self, named: tree.Named, env: Env) -> float:
        if isinstance(named.value, tree.Text | tree.Braces):
            raise BAD_ARGUMENT.error(f"`{named.name.text}` takes a number", span=named.span)
        return self._number(named.value, env)

    # ---- tensors

    def tensor(self, node: tree.Function) -> Given:
        """`tensor("v.safetensors", "key")`, or the name of one given in Python."""
        return Given(self._tensors.named(node))


def _arguments(node: tree.Function, names: Sequence[str], example: str) -> Arguments:
    """A function's arguments, those with a name checked to be of `names`."""
    what = node.name.text
    named: dict[str, tree.Named] = {}
    for argument in node.arguments:
        if not isinstance(argument, tree.Named):
            continue
        name = argument.name.text
        if name not in names:
            message = f"{what} takes no `{name}`; it takes {', '.join(names)}"
            raise BAD_ARGUMENT.error(message, fix=nearest(name, names) or example, span=argument.span)
        if name in named:
            raise BAD_ARGUMENT.error(f"`{name}` stands twice", span=argument.span)
        named[name] = argument
    plain = tuple(a for a in node.arguments if not isinstance(a, tree.Named))
    return Arguments(what, node.span, plain, named)
