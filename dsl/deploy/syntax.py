"""The syntax tree of devices, clusters, number formats and deployments.

Named tuples: making as many frozen dataclasses would cost every start of the command 8 ms.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from dsl.diagnostics import Span

if TYPE_CHECKING:
    from dsl.syntax import Expr, Literal, Name, Setting


class Quantity(NamedTuple):
    """``989 TFLOPS``, ``2 us``, ``56.3%``: a number with its unit, as written."""

    number: float
    unit: str
    span: Span


class TileSize(NamedTuple):
    """``1 x 128``; None stands for ``all``. In ``stages``, ``4 x 15`` is 15 stages of 4 layers."""

    rows: int | None
    columns: int | None
    span: Span


class Figure(NamedTuple):
    """``peak[bf16] = 989 TFLOPS "source, date"``: a figure of a device or cluster, a field of a
    number format, a setting of ``train`` or ``serve``."""

    name: Name
    keys: tuple[Name, ...]
    value: Expr | Quantity | TileSize
    source: Literal | None
    span: Span


class Table(NamedTuple):
    """``device``, ``cluster`` or ``format`` (``kind``). ``base``: whose figures it changes."""

    kind: str
    name: Name
    base: Name | None
    figures: tuple[Figure, ...]
    span: Span


class Place(NamedTuple):
    """``batch``, ``vocab``, ``MoE.expert``: what a rule of a deployment speaks of."""

    block: Name | None
    name: Name
    span: Span

    def __str__(self) -> str:
        return f"{self.block.text}.{self.name.text}" if self.block else self.name.text


class Mesh(NamedTuple):
    axes: tuple[Setting, ...]
    span: Span


class StageLayers(NamedTuple):
    """``layers 0 .. 61 as (4 x 15, 1)``."""

    name: Name
    start: Expr | None
    stop: Expr | None
    parts: tuple[Expr | TileSize, ...]
    span: Span


class StageWith(NamedTuple):
    """``mtp with the last``."""

    name: Name
    where: Name
    span: Span


class Stages(NamedTuple):
    axis: Name
    items: tuple[StageLayers | StageWith, ...]
    span: Span


class ShardRule(NamedTuple):
    """``MoE.expert -> ep with 32 redundant``."""

    place: Place
    axes: tuple[Name, ...]
    redundant: Expr | None
    span: Span


class Shard(NamedTuple):
    rules: tuple[ShardRule, ...]
    span: Span


class Role(NamedTuple):
    """``e4m3`` (no name), ``weights = 128 x 128``, ``activations = bf16``, ``promote = 128``."""

    name: Name | None
    format: Name | None
    tile: TileSize | None
    number: Literal | None
    span: Span


class Selected(NamedTuple):
    """What a precision rule is for. ``kind``: contractions, parameter (contractions with a
    parameter), cached, named, except; the last two have a ``place``."""

    kind: str
    place: Place | None
    span: Span


class Precision(NamedTuple):
    label: Name
    roles: tuple[Role, ...]
    selected: tuple[Selected, ...]
    span: Span


class Overlap(NamedTuple):
    schedule: Name
    options: tuple[Figure, ...]
    span: Span


class Recompute(NamedTuple):
    places: tuple[Place, ...]
    span: Span


class Train(NamedTuple):
    options: tuple[Figure, ...]
    span: Span


class Serve(NamedTuple):
    phase: Name
    options: tuple[Figure, ...]
    span: Span


Clause = Mesh | Stages | Shard | Precision | Overlap | Recompute | Train | Serve


class Deploy(NamedTuple):
    """``deploy name of Model from base on cluster { ... }``."""

    name: Name
    model: Name | None
    base: Name | None
    cluster: Name | None
    clauses: tuple[Clause, ...]
    span: Span
