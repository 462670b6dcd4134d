"""A residual graph as JSON values and back, exactly. Where it is kept is the caller's matter.

Written and read by the dataclasses' own fields, a record as the list of its fields in their order, so that a graph with
other fields is not read for this one.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import StrEnum
from functools import cache
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from patchc.ir.graph import ResidualGraph

Json = list["Json"] | dict[str, "Json"] | str | int | float | bool | None


def graph_to_json(graph: ResidualGraph) -> dict[str, Json]:
    """The graph's fields by name."""
    return {name: _written(getattr(graph, name)) for name in _kinds(ResidualGraph)}


def graph_from_json(content: object) -> ResidualGraph:
    """The graph that `graph_to_json` wrote. Raises `ValueError` for anything else, however close."""
    kinds = _kinds(ResidualGraph)
    if not isinstance(content, dict) or set(content) != set(kinds):
        raise ValueError(f"not the fields of a graph: {', '.join(kinds)}")
    return ResidualGraph(**{name: _read(kind, content[name]) for name, kind in kinds.items()})


def _written(value: Any) -> Any:
    if is_dataclass(value):
        return [_written(getattr(value, f.name)) for f in fields(value)]
    return [_written(v) for v in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any) -> Any:
    """A value of that type. Only the kinds of types that graphs are made of are known."""
    if get_origin(kind) is UnionType:
        (other,) = (k for k in get_args(kind) if k is not NoneType)
        return None if value is None else _read(other, value)
    if get_origin(kind) is tuple:
        return tuple(_read(get_args(kind)[0], v) for v in _list(value))
    if is_dataclass(kind):
        return _record(kind, _list(value))
    if issubclass(kind, StrEnum):
        return kind(value)
    if type(value) is not kind:  # a bool is an int to `isinstance`
        raise ValueError(f"{value!r} where a {kind.__name__} belongs")
    return value


def _record(kind: Any, values: list[Any]) -> Any:
    kinds = _kinds(kind)
    if len(values) != len(kinds):
        raise ValueError(f"{len(values)} values where {kind.__name__} has {len(kinds)}")
    return kind(*(_read(k, v) for k, v in zip(kinds.values(), values, strict=True)))


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} where a list belongs")
    return value


@cache
def _kinds(record: Any) -> dict[str, Any]:
    """The type of each field, in order."""
    hints = get_type_hints(record)
    return {f.name: hints[f.name] for f in fields(record)}
