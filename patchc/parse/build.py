"""lark's parse tree to the syntax tree of `parse.tree`: a method for each rule of the grammar.

Reads the escapes of texts and the digits of numbers, and reports those that mean nothing. Looks up no name.
"""

from __future__ import annotations

import json
import math
from typing import Any

from lark import Token, Transformer_NonRecursive, Tree, v_args
from lark.tree import Meta

from patchc.diagnostics import RULES, Report, Source, Span
from patchc.parse import tree

BAD_ESCAPE = RULES.add("bad-escape", "a text holds an escape that does not exist")
BAD_NUMBER = RULES.add("bad-number", "a number is too long or too large to be read")

MAX_DIGITS = 300
"""Far more than any number needs, and a whole number of so many is a 64-bit float still."""

Children = list[Any]


def build(parsed: Tree[Token], source: Source, report: Report) -> tree.Spec:
    """The syntax tree of a parsed spec; unreadable literals go to `report`."""
    spec: tree.Spec = _Builder(source, report).transform(parsed)  # type: ignore[assignment]
    return spec


@v_args(meta=True)
class _Builder(Transformer_NonRecursive[Token, Any]):
    """Bottom up: the children of a rule are built before it. Non-recursive, so that depth is no limit."""

    def __init__(self, source: Source, report: Report) -> None:
        super().__init__()
        self.source = source
        self.report = report

    def _at(self, meta: Meta | Token) -> Span | None:
        """The place of a rule or token; a rule without tokens (an empty spec) has none."""
        if isinstance(meta, Meta) and meta.empty:
            return None
        return Span(self.source, meta.start_pos, meta.end_pos)  # type: ignore[arg-type]

    # ---- words and literals

    def _name(self, token: Token) -> tree.Name:
        return tree.Name(str(token), span=self._at(token))

    NAME = IN = BY = _name

    def _string(self, token: Token) -> tree.Text:
        span = Span(self.source, token.start_pos or 0, token.end_pos or 0)
        try:
            text = str(json.loads(token, strict=False))
            text.encode()
        except UnicodeEncodeError:
            self.report.add(BAD_ESCAPE.at(span, "this text holds half of a surrogate pair, which is no character"))
        except json.JSONDecodeError as e:
            # json says where the escape's letters or its digits begin: the backslash is at or before that.
            start = token.rindex("\\", 0, e.pos + 1)
            place = Span(self.source, span.start + start, span.start + start + 2)
            fix = r"the escapes are \" \\ \/ \b \f \n \r \t and \uXXXX; a backslash itself is \\"
            self.report.add(BAD_ESCAPE.at(place, f"`{token[start : start + 2]}` starts no escape here", fix=fix))
        else:
            return tree.Text(text, span=span)
        return tree.Text("", span=span)

    def _param(self, token: Token) -> tree.Parameter:
        return tree.Parameter(token[2:-1], span=self._at(token))

    def _int(self, token: Token) -> tree.Number:
        if len(token) <= MAX_DIGITS:
            return tree.Number(int(token), span=self._at(token))
        message = f"this number has {len(token)} digits; at most {MAX_DIGITS} are read"
        self.report.add(BAD_NUMBER.at(self._at(token), message))
        return tree.Number(0, span=self._at(token))

    def _float(self, token: Token) -> tree.Number:
        value = float(token)
        if math.isfinite(value):
            return tree.Number(value, span=self._at(token))
        self.report.add(BAD_NUMBER.at(self._at(token), "this number is too large for a 64-bit float"))
        return tree.Number(0, span=self._at(token))

    STRING, PARAM, INT, FLOAT = _string, _param, _int, _float

    def number(self, meta: Meta, c: Children) -> tree.Number | tree.Parameter:
        return c[0]

    def negative(self, meta: Meta, c: Children) -> tree.Number | tree.Negated:
        if isinstance(c[0], tree.Number):
            return tree.Number(-c[0].value, span=self._at(meta))
        return tree.Negated(c[0], span=self._at(meta))

    minus_int = minus_float = negative

    # ---- indices and positions

    def every(self, meta: Meta, c: Children) -> tree.Every:
        return tree.Every(span=self._at(meta))

    def offset(self, meta: Meta, c: Children) -> int:
        sign, by = c
        return by.value if sign == "+" else -by.value

    def item(self, meta: Meta, c: Children) -> tree.Item:
        return c[0] if len(c) == 1 else tree.Offset(c[0], c[1], span=self._at(meta))

    def range(self, meta: Meta, c: Children) -> tree.Range:
        return tree.Range(c[0], c[1], span=self._at(meta))

    def from_range(self, meta: Meta, c: Children) -> tree.Range:
        return tree.Range(c[0], None, span=self._at(meta))

    def to_range(self, meta: Meta, c: Children) -> tree.Range:
        return tree.Range(None, c[0], span=self._at(meta))

    span = value_span = range
    from_bound = from_range
    to_bound = to_range

    def braces(self, meta: Meta, c: Children) -> tree.Braces:
        return tree.Braces(tuple(c), span=self._at(meta))

    def anchor(self, meta: Meta, c: Children) -> tree.Anchor:
        which = "first" if "first" in c[1:] else "last" if "last" in c[1:] else None
        by = next((x for x in c[1:] if isinstance(x, int)), 0)
        return tree.Anchor(c[0], which, by, span=self._at(meta))

    # ---- sets

    def sites(self, meta: Meta, c: Children) -> tuple[tree.Name, ...]:
        return tuple(c)

    def site(self, meta: Meta, c: Children) -> tree.Site:
        names = c[0] if isinstance(c[0], tuple) else (c[0],)
        return tree.Site(names, tuple(c[1:]), span=self._at(meta))

    def ref(self, meta: Meta, c: Children) -> tree.Ref:
        sites = tuple(x for x in c[1:] if isinstance(x, tree.Site))
        return tree.Ref(c[0], tuple(c[1 : len(c) - len(sites)]), sites, span=self._at(meta))

    def group(self, meta: Meta, c: Children) -> tree.Group:
        return tree.Group(c[0], tuple(c[1:]), span=self._at(meta))

    def call(self, meta: Meta, c: Children) -> tree.Call:
        return tree.Call(c[0], tuple(c[1:]), span=self._at(meta))

    def star(self, meta: Meta, c: Children) -> tree.Star:
        return tree.Star(c[0], span=self._at(meta))

    def placed(self, meta: Meta, c: Children) -> tree.Placed:
        return tree.Placed(c[0], c[1], span=self._at(meta))

    def sequence(self, meta: Meta, c: Children) -> tree.Sequence:
        return tree.Sequence(tuple(c), span=self._at(meta))

    def union(self, meta: Meta, c: Children) -> tree.Union:
        return tree.Union(tuple(c), span=self._at(meta))

    def difference(self, meta: Meta, c: Children) -> tree.Difference:
        return tree.Difference(tuple(c), span=self._at(meta))

    # ---- values

    def function(self, meta: Meta, c: Children) -> tree.Function:
        name = self._name(c[0]) if isinstance(c[0], Token) else c[0]
        return tree.Function(name, tuple(c[1:]), span=self._at(meta))

    def named(self, meta: Meta, c: Children) -> tree.Named:
        return tree.Named(c[0], c[1], span=self._at(meta))

    def at(self, meta: Meta, c: Children) -> tree.At:
        return tree.At(c[0], c[1], span=self._at(meta))

    def parens(self, meta: Meta, c: Children) -> tree.Parens:
        return tree.Parens(c[0], span=self._at(meta))

    def negated(self, meta: Meta, c: Children) -> tree.Negated:
        return tree.Negated(c[0], span=self._at(meta))

    def product(self, meta: Meta, c: Children) -> tree.Product:
        return tree.Product((("*", c[0]), *_pairs(c[1:])), span=self._at(meta))

    def sum(self, meta: Meta, c: Children) -> tree.Sum:
        return tree.Sum((("+", c[0]), *_pairs(c[1:])), span=self._at(meta))

    def normalised(self, meta: Meta, c: Children) -> tree.Normalised:
        return tree.Normalised(*c, span=self._at(meta))

    # ---- statements

    def option(self, meta: Meta, c: Children) -> tree.Option:
        return tree.Option(c[0], c[1], span=self._at(meta))

    def model(self, meta: Meta, c: Children) -> tree.Model:
        return tree.Model(c[0], tuple(c[1:]), span=self._at(meta))

    def sae(self, meta: Meta, c: Children) -> tree.Sae:
        return tree.Sae(*c, span=self._at(meta))

    def metric(self, meta: Meta, c: Children) -> tree.Metric:
        return tree.Metric(*c, span=self._at(meta))

    def params(self, meta: Meta, c: Children) -> tuple[tree.Name, ...]:
        return tuple(c)

    def let(self, meta: Meta, c: Children) -> tree.Let:
        return tree.Let(c[0], c[1] if len(c) == 3 else (), c[-1], span=self._at(meta))

    def slice(self, meta: Meta, c: Children) -> tuple[str, tree.Index]:
        return "slice", c[0]

    def fields(self, meta: Meta, c: Children) -> tuple[str, Children]:
        return "fields", c

    def data(self, meta: Meta, c: Children) -> tree.Data:
        file = None if isinstance(c[0], tuple) else c[0]
        parts = dict(x for x in c if isinstance(x, tuple))
        return tree.Data(file, parts.get("slice"), tuple(parts.get("fields", ())), span=self._at(meta))

    def column(self, meta: Meta, c: Children) -> tree.Column:
        return tree.Column(*c, span=self._at(meta))

    def position(self, meta: Meta, c: Children) -> tree.Position:
        return tree.Position(*c, span=self._at(meta))

    def experiment(self, meta: Meta, c: Children) -> tree.Experiment:
        title = c[1] if len(c) > 1 and isinstance(c[1], tree.Text) else None
        return tree.Experiment(c[0], title, tuple(c[1 if title is None else 2 :]), span=self._at(meta))

    def spec(self, meta: Meta, c: Children) -> tree.Spec:
        return tree.Spec(tuple(c), span=self._at(meta))

    # ---- clauses

    def for_(self, meta: Meta, c: Children) -> tree.For:
        return tree.For(tuple(c), span=self._at(meta))

    def binding(self, meta: Meta, c: Children) -> tree.Binding:
        return tree.Binding(*c, span=self._at(meta))

    def run(self, meta: Meta, c: Children) -> tree.Run:
        return tree.Run(*c, span=self._at(meta))

    def node(self, meta: Meta, c: Children) -> tree.Target:
        return tree.Target("node", c[0], span=self._at(meta))

    def edge(self, meta: Meta, c: Children) -> tree.Target:
        return tree.Target("edge", c[0], span=self._at(meta))

    def path(self, meta: Meta, c: Children) -> tree.Target:
        return tree.Target("path", c[0], span=self._at(meta))

    def all_(self, meta: Meta, c: Children) -> tree.Target:
        return tree.Target("all", c[0] if c else None, span=self._at(meta))

    def patch(self, meta: Meta, c: Children) -> tree.Patch:
        return tree.Patch(*c, span=self._at(meta))

    def attribute(self, meta: Meta, c: Children) -> tree.Attribute:
        return tree.Attribute(tuple(c[:-2]), c[-2], c[-1], span=self._at(meta))

    def freeze(self, meta: Meta, c: Children) -> tree.Freeze:
        return tree.Freeze(tuple(c), span=self._at(meta))

    def alias(self, meta: Meta, c: Children) -> tuple[str, tree.Name]:
        return "alias", c[0]

    def interval(self, meta: Meta, c: Children) -> tuple[str, tree.Interval]:
        return "interval", tree.Interval(c[0], tuple(c[1:]), span=self._at(meta))

    def measured(self, meta: Meta, c: Children) -> tree.Measured:
        return tree.Measured(c[0], **dict(c[1:]), span=self._at(meta))

    def measure(self, meta: Meta, c: Children) -> tree.Measure:
        return tree.Measure(tuple(c), span=self._at(meta))

    def keep(self, meta: Meta, c: Children) -> tree.Keep:
        return tree.Keep(*c, span=self._at(meta))

    def prune(self, meta: Meta, c: Children) -> tree.Prune:
        return tree.Prune(c[0], _comparison(c[1]), c[2], span=self._at(meta))

    def expect(self, meta: Meta, c: Children) -> tree.Expect:
        *parts, within = c if isinstance(c[-1], tuple) else (*c, (None, None))
        return tree.Expect(
            parts[0], tuple(parts[1:-2]), _comparison(parts[-2]), parts[-1], within[1], span=self._at(meta)
        )

    def tolerance(self, meta: Meta, c: Children) -> tuple[str, tree.Number | tree.Parameter]:
        return "tolerance", c[0]

    def expect_top(self, meta: Meta, c: Children) -> tree.ExpectTop:
        return tree.ExpectTop(c[0], c[1], tuple(c[2:]), span=self._at(meta))

    def show(self, meta: Meta, c: Children) -> tree.Show:
        return tree.Show(*c, span=self._at(meta))

    def save(self, meta: Meta, c: Children) -> tree.Save:
        return tree.Save(*c, span=self._at(meta))


def _pairs(children: Children) -> list[tuple[Any, Any]]:
    """(operator, operand) for `+ b - c` as children."""
    return [(str(op), operand) for op, operand in zip(children[::2], children[1::2], strict=True)]


def _comparison(token: Token) -> Any:
    """An operator as plain text: the grammar admits no other."""
    return str(token)
