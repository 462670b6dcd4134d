"""Syntax tree to canonical text: one statement or clause a line, blocks indented by two, single spaces.

What it prints parses to an equal tree. Comments and line breaks are not in the tree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Literal, assert_never

from patchc.parse import tree

_Literal = tree.Name | tree.Text | tree.Number | tree.Parameter
_Place = tree.Item | tree.Range | tree.Every | tree.Braces | tree.Anchor
_Value = tree.Value | tree.Text | tree.Named | tree.Braces


def print_spec(spec: tree.Spec) -> str:
    """A spec in canonical form; `parse` gives an equal tree for it."""
    lines: list[str] = []
    for before, item in zip((None, *spec.items), spec.items, strict=False):
        apart = isinstance(item, tree.Experiment) or type(item) is not type(before)
        lines += [""] * (apart and before is not None) + [_statement(item)]
    return "\n".join(lines) + "\n" * bool(lines)


# ---- statements


def _statement(item: tree.Statement) -> str:
    match item:
        case tree.Model(name, options):
            return " ".join(["model", _literal(name), *map(_option, options)])
        case tree.Sae(name, file, site):
            return f"sae {_name(name)} {_literal(file)} at {_set(site)}"
        case tree.Metric(name, value):
            return f"metric {_name(name)} = {_value(value)}"
        case tree.Let(name, parameters, value):
            listed = f"({_joined(map(_name, parameters))})" if parameters else ""
            return f"let {_name(name)}{listed} = {_set(value)}"
        case tree.Data():
            return _data(item)
        case tree.Experiment(name, title, clauses):
            head = f"experiment {_name(name)}" + (f" {_literal(title)}" if title is not None else "")
            return _block(head, map(_clause, clauses))
    assert_never(item)


def _option(option: tree.Option) -> str:
    return f"{_name(option.name)}={_literal(option.value)}"


def _data(data: tree.Data) -> str:
    file = f" {_literal(data.file)}" if data.file is not None else ""
    head = f"data{file}" + (f"[{_place(data.slice)}]" if data.slice is not None else "")
    return head if file and not data.fields else _block(head, map(_field, data.fields))


def _block(head: str, lines: Iterable[str]) -> str:
    return head + " {\n" + "".join(f"  {line}\n" for line in lines) + "}"


def _field(item: tree.Column | tree.Position) -> str:
    match item:
        case tree.Column(name, value):
            return f"{_name(name)} {_place(value)}"
        case tree.Position(name, where):
            return f"at {_name(name)} {_place(where)}"


# ---- clauses


def _clause(item: tree.Clause) -> str:
    match item:
        case tree.For(bindings):
            return "for " + _joined(map(_binding, bindings))
        case tree.Run(world):
            return f"run {_name(world)}"
        case tree.Patch(target, value):
            return f"patch {_target(target)} with {_value(value)}"
        case tree.Attribute(options, target, value):
            listed = f"({_joined(map(_value, options))})" if options else ""
            return f"attribute{listed} {_target(target)} with {_value(value)}"
        case tree.Freeze(what):
            return "freeze " + _joined(map(_name, what))
        case tree.Measure(items):
            return "measure " + _joined(map(_measured, items))
        case tree.Keep() | tree.Prune() | tree.Expect() | tree.ExpectTop():
            return _selection(item)
        case tree.Show(kind, file):
            return f"show {_name(kind)}" + (f" {_literal(file)}" if file is not None else "")
        case tree.Save(file):
            return f"save {_literal(file)}"
    assert_never(item)


def _selection(item: tree.Keep | tree.Prune | tree.Expect | tree.ExpectTop) -> str:
    """The clauses that judge the results."""
    match item:
        case tree.Keep(top, by):
            return f"keep top {_literal(top)} by {_name(by)}"
        case tree.Prune(metric, op, bound):
            return f"prune {_name(metric)} {op} {_value(bound)}"
        case tree.Expect(metric, at, op, bound, tolerance):
            where = f" at {_joined(map(_coordinate, at))}" if at else ""
            within = f" within {_literal(tolerance)}" if tolerance is not None else ""
            return f"expect {_name(metric)}{where} {op} {_value(bound)}{within}"
        case tree.ExpectTop(metric, top, cells):
            return f"expect {_name(metric)} top({_literal(top)}) includes {_joined(map(_coordinate, cells))}"


def _binding(binding: tree.Binding) -> str:
    match binding.domain:
        case tree.Braces() | tree.Range() as domain:
            return f"{_name(binding.name)} in {_place(domain)}"
        case domain:
            return f"{_name(binding.name)} in {_set(domain)}"


def _measured(item: tree.Measured) -> str:
    alias = f" as {_name(item.alias)}" if item.alias is not None else ""
    if item.interval is None:
        return _value(item.value) + alias
    options = "".join(f" {_option(o)}" for o in item.interval.options)
    return f"{_value(item.value)}{alias} with interval {_literal(item.interval.level)}{options}"


def _target(target: tree.Target) -> str:
    if target.what is None:
        return target.kind
    return f"{target.kind}{' except' if target.kind == 'all' else ''} {_set(target.what)}"


def _coordinate(item: tree.Set | tree.Bound) -> str:
    match item:
        case tree.Number() | tree.Parameter() | tree.Negated():
            return _value(item)
        case _:
            return _set(item)


# ---- sets


def _set(item: tree.Set) -> str:
    match item:
        case tree.Ref(name, indices, sites):
            return _name(name) + _indices(indices) + "".join(map(_site, sites))
        case tree.Group(inner, sites):
            return f"({_set(inner)})" + "".join(map(_site, sites))
        case tree.Call(name, arguments):
            return f"{_name(name)}({_joined(map(_argument, arguments))})"
        case tree.Star(inner):
            return _set(inner) + "*"
        case tree.Placed(inner, place):
            return f"{_set(inner)} @ {_place(place)}"
        case tree.Sequence(steps):
            return " -> ".join(map(_set, steps))
        case tree.Union(parts):
            return " | ".join(map(_set, parts))
        case tree.Difference(parts):
            return " - ".join(map(_set, parts))
    assert_never(item)


def _argument(item: tree.Set | tree.Text | tree.Parameter) -> str:
    match item:
        case tree.Text() | tree.Parameter():
            return _literal(item)
        case _:
            return _set(item)


def _site(site: tree.Site) -> str:
    names = _joined(map(_name, site.names))
    return "." + (names if len(site.names) == 1 else f"{{{names}}}") + _indices(site.indices)


def _indices(indices: Sequence[tree.Index]) -> str:
    return f"[{_joined(map(_place, indices))}]" if indices else ""


def _place(item: _Place | tree.Text) -> str:
    match item:
        case tree.Every():
            return "*"
        case tree.Range(first, last):
            return ("" if first is None else _place(first)) + ".." + ("" if last is None else _place(last))
        case tree.Braces(items):
            return f"{{{_joined(map(_place, items))}}}"
        case tree.Offset(base, by):
            return _literal(base) + _offset(by)
        case tree.Anchor(text, which, by):
            return _literal(text) + (f" {which}" if which else "") + (_offset(by) if by else "")
        case _:
            return _literal(item)


def _offset(by: int) -> str:
    return f" {'-' if by < 0 else '+'} {abs(by)}"


# ---- values


def _value(item: _Value) -> str:
    match item:
        case tree.Number() | tree.Parameter() | tree.Text():
            return _literal(item)
        case tree.Ref():
            return _set(item)
        case tree.Braces():
            return _place(item)
        case tree.Function(name, arguments):
            return f"{_name(name)}({_joined(map(_value, arguments))})"
        case tree.Named(name, value):
            return f"{_name(name)}={_value(value)}"
        case tree.Parens(inner):
            return f"({_value(inner)})"
        case tree.At(inner, place):
            return f"{_value(inner)} @ {_place(place)}"
        case tree.Negated() | tree.Product() | tree.Sum() | tree.Normalised():
            return _arithmetic(item)
    assert_never(item)


def _arithmetic(item: tree.Negated | tree.Product | tree.Sum | tree.Normalised) -> str:
    match item:
        case tree.Negated(inner):
            return "-" + _value(inner)
        case tree.Product(factors):
            return _chain(factors)
        case tree.Sum(terms):
            return _chain(terms)
        case tree.Normalised(inner, zero, one, per):
            each = f" per {_name(per)}" if per is not None else ""
            return f"{_value(inner)} from {_name(zero)} to {_name(one)}{each}"


def _chain(operands: Sequence[tuple[Literal["+", "-", "*", "/"], tree.Term]]) -> str:
    (_, first), *others = operands
    return _value(first) + "".join(f" {op} {_value(operand)}" for op, operand in others)


# ---- literals


def _literal(item: _Literal) -> str:
    match item:
        case tree.Name(text):
            return text
        case tree.Text(text):
            return json.dumps(text, ensure_ascii=False)
        case tree.Number(value):
            return repr(value)
        case tree.Parameter(name):
            return f"${{{name}}}"


def _name(name: tree.Name) -> str:
    return name.text


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)
