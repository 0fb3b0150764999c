"""From Lark's parse tree to the syntax tree: devices, clusters, number formats, deployments."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lark import Token
from lark.tree import Meta

from dsl.deploy import syntax as ast
from dsl.diagnostics import Span
from dsl.syntax import Literal, Name, Ref, Setting

_QUANTITY = re.compile(r"([\d.]+(?:[eE][+-]?\d+)?)[ \t]*(\D+)")


class DeployTree:
    """One method per grammar rule of the last section; ``TreeBuilder`` has the rest."""

    if TYPE_CHECKING:

        def span(self, meta: Meta | Token) -> Span: ...
        def name(self, token: Token) -> Name: ...
        def optional(self, token: Token | None) -> Name | None: ...
        def number(self, meta: Meta, children: list[Any]) -> Literal: ...
        def string(self, meta: Meta, children: list[Any]) -> Literal: ...
        def setting(self, meta: Meta, children: list[Any]) -> Setting: ...

    # -- tables of figures -----------------------------------------------------------------------

    def _table(self, kind: str, meta: Meta, children: list[Any]) -> ast.Table:
        name, base, *figures = children
        kept = tuple(f for f in figures if f is not None)
        return ast.Table(kind, self.name(name), base, kept, self.span(meta))

    def device(self, meta: Meta, children: list[Any]) -> ast.Table:
        return self._table("device", meta, children)

    def cluster(self, meta: Meta, children: list[Any]) -> ast.Table:
        return self._table("cluster", meta, children)

    def format(self, meta: Meta, children: list[Any]) -> ast.Table:
        return self._table("format", meta, children)

    def base(self, meta: Meta, children: list[Any]) -> Name:
        return self.name(children[0])

    def figure(self, meta: Meta, children: list[Any]) -> ast.Figure:
        name, keys, value, source = children
        text = None if source is None else self.string(meta, [source])
        return ast.Figure(self.name(name), keys or (), value, text, self.span(meta))

    datum = figure

    def word(self, meta: Meta, children: list[Any]) -> Ref:
        name = self.name(children[0])
        return Ref(name, None, None, name.span)

    def keys(self, meta: Meta, children: list[Any]) -> tuple[Name, ...]:
        return tuple(self.name(c) for c in children)

    def quantity(self, meta: Meta, children: list[Any]) -> ast.Quantity:
        token = children[0]
        found = _QUANTITY.fullmatch(token)
        assert found is not None
        number = self._number(found.group(1), token)
        assert isinstance(number, (int, float))
        return ast.Quantity(float(number), found.group(2), self.span(token))

    def tile(self, meta: Meta, children: list[Any]) -> ast.TileSize:
        token = children[0]
        sides = [part.strip() for part in token.split("x")]
        rows, columns = (None if s == "all" else self._number(s, token) for s in sides)
        return ast.TileSize(rows, columns, self.span(token))

    def _number(self, digits: str, token: Token) -> Any:
        """A number that is part of a token."""
        part = Token.new_borrow_pos("NUMBER", digits, token)
        return self.number(Meta(), [part]).value

    # -- deployments -----------------------------------------------------------------------------

    def deploy(self, meta: Meta, children: list[Any]) -> ast.Deploy:
        name, model, base, cluster, *clauses = children
        return ast.Deploy(
            self.name(name),
            self.optional(model),
            base,
            self.optional(cluster),
            tuple(c for c in clauses if c is not None),
            self.span(meta),
        )

    def mesh(self, meta: Meta, children: list[Any]) -> ast.Mesh:
        return ast.Mesh(tuple(children), self.span(meta))

    def mesh_axis(self, meta: Meta, children: list[Any]) -> Setting:
        return self.setting(meta, children)

    def stages(self, meta: Meta, children: list[Any]) -> ast.Stages:
        axis, *items = children
        return ast.Stages(self.name(axis), tuple(items), self.span(meta))

    def stage_layers(self, meta: Meta, children: list[Any]) -> ast.StageLayers:
        name, start, stop, parts = children
        return ast.StageLayers(self.name(name), start, stop, parts or (), self.span(meta))

    def stage_parts(self, meta: Meta, children: list[Any]) -> tuple[Any, ...]:
        return tuple(children)

    def stage_with(self, meta: Meta, children: list[Any]) -> ast.StageWith:
        return ast.StageWith(self.name(children[0]), self.name(children[1]), self.span(meta))

    def shard(self, meta: Meta, children: list[Any]) -> ast.Shard:
        return ast.Shard(tuple(children), self.span(meta))

    def shard_rule(self, meta: Meta, children: list[Any]) -> ast.ShardRule:
        place, axes, redundant = children
        return ast.ShardRule(place, axes, redundant, self.span(meta))

    def axes(self, meta: Meta, children: list[Any]) -> tuple[Name, ...]:
        return tuple(self.name(c) for c in children if c is not None)

    def place(self, meta: Meta, children: list[Any]) -> ast.Place:
        first, second = children
        if second is None:
            return ast.Place(None, self.name(first), self.span(meta))
        return ast.Place(self.name(first), self.name(second), self.span(meta))

    def precision(self, meta: Meta, children: list[Any]) -> ast.Precision:
        label, *parts = children
        roles = tuple(p for p in parts if isinstance(p, ast.Role))
        selected = tuple(p for p in parts if isinstance(p, ast.Selected))
        return ast.Precision(self.name(label), roles, selected, self.span(meta))

    def role(self, meta: Meta, children: list[Any]) -> ast.Role:
        """A bare format, or ``name = [format] [tile]``, or ``name = number``."""
        named = len(children) > 1
        values = {t.type: t for t in (children[1:] if named else children)}
        number, size = values.get("NUMBER"), values.get("TILE")
        return ast.Role(
            self.name(children[0]) if named else None,
            self.optional(values.get("NAME")),
            None if size is None else self.tile(meta, [size]),
            None if number is None else self.number(meta, [number]),
            self.span(meta),
        )

    def _selected(self, kind: str, meta: Meta, place: ast.Place | None = None) -> ast.Selected:
        return ast.Selected(kind, place, self.span(meta))

    def contractions(self, meta: Meta, children: list[Any]) -> ast.Selected:
        return self._selected("parameter" if children[0] is not None else "contractions", meta)

    def with_parameter(self, meta: Meta, children: list[Any]) -> bool:
        return True

    def cached_values(self, meta: Meta, children: list[Any]) -> ast.Selected:
        return self._selected("cached", meta)

    def excepted(self, meta: Meta, children: list[Any]) -> ast.Selected:
        return self._selected("except", meta, children[0])

    def named(self, meta: Meta, children: list[Any]) -> ast.Selected:
        return self._selected("named", meta, children[0])

    def overlap(self, meta: Meta, children: list[Any]) -> ast.Overlap:
        schedule, *options = children
        kept = tuple(o for o in options if o is not None)
        return ast.Overlap(self.name(schedule), kept, self.span(meta))

    def recompute(self, meta: Meta, children: list[Any]) -> ast.Recompute:
        return ast.Recompute(tuple(children), self.span(meta))

    def train(self, meta: Meta, children: list[Any]) -> ast.Train:
        return ast.Train(tuple(children), self.span(meta))

    def serve(self, meta: Meta, children: list[Any]) -> ast.Serve:
        phase, *options = children
        return ast.Serve(self.name(phase), tuple(options), self.span(meta))
