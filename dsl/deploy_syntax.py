"""The syntax tree of devices, clusters, number formats and deployments.

``dsl.syntax`` names all of these too; they stand in a file of their own for its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsl.diagnostics import Span

if TYPE_CHECKING:
    from dsl.syntax import Expr, Literal, Name, Setting


@dataclass(frozen=True)
class Quantity:
    """``989 TFLOPS``, ``2 us``, ``56.3%``: a number with its unit, as written."""

    number: float
    unit: str
    span: Span


@dataclass(frozen=True)
class TileSize:
    """``1 x 128``; None stands for ``all``. In ``stages``, ``4 x 15`` is 15 stages of 4 layers."""

    rows: int | None
    columns: int | None
    span: Span


@dataclass(frozen=True)
class Figure:
    """``peak[bf16] = 989 TFLOPS "source, date"``: a figure of a device or cluster, a field of a
    number format, a setting of ``train`` or ``serve``."""

    name: Name
    keys: tuple[Name, ...]
    value: Expr | Quantity | TileSize
    source: Literal | None
    span: Span


@dataclass(frozen=True)
class Table:
    """``device``, ``cluster`` or ``format`` (``kind``). ``base``: whose figures it changes."""

    kind: str
    name: Name
    base: Name | None
    figures: tuple[Figure, ...]
    span: Span


@dataclass(frozen=True)
class Place:
    """``batch``, ``vocab``, ``MoE.expert``: what a rule of a deployment speaks of."""

    block: Name | None
    name: Name
    span: Span

    def __str__(self) -> str:
        return f"{self.block.text}.{self.name.text}" if self.block else self.name.text


@dataclass(frozen=True)
class Mesh:
    axes: tuple[Setting, ...]
    span: Span


@dataclass(frozen=True)
class StageLayers:
    """``layers 0 .. 61 as (4 x 15, 1)``."""

    name: Name
    start: Expr | None
    stop: Expr | None
    parts: tuple[Expr | TileSize, ...]
    span: Span


@dataclass(frozen=True)
class StageWith:
    """``mtp with the last``."""

    name: Name
    where: Name
    span: Span


@dataclass(frozen=True)
class Stages:
    axis: Name
    items: tuple[StageLayers | StageWith, ...]
    span: Span


@dataclass(frozen=True)
class ShardRule:
    """``MoE.expert -> ep with 32 redundant``."""

    place: Place
    axes: tuple[Name, ...]
    redundant: Expr | None
    span: Span


@dataclass(frozen=True)
class Shard:
    rules: tuple[ShardRule, ...]
    span: Span


@dataclass(frozen=True)
class Role:
    """``e4m3`` (no name), ``weights = 128 x 128``, ``activations = bf16``, ``promote = 128``."""

    name: Name | None
    format: Name | None
    tile: TileSize | None
    count: Literal | None
    span: Span


@dataclass(frozen=True)
class Selected:
    """What a precision rule is for. ``kind``: contractions, parameter (contractions with a
    parameter), cached, named, except; the last two have a ``place``."""

    kind: str
    place: Place | None
    span: Span


@dataclass(frozen=True)
class Precision:
    label: Name
    roles: tuple[Role, ...]
    selected: tuple[Selected, ...]
    span: Span


@dataclass(frozen=True)
class Overlap:
    schedule: Name
    options: tuple[Figure, ...]
    span: Span


@dataclass(frozen=True)
class Recompute:
    places: tuple[Place, ...]
    span: Span


@dataclass(frozen=True)
class Train:
    options: tuple[Figure, ...]
    span: Span


@dataclass(frozen=True)
class Serve:
    phase: Name
    options: tuple[Figure, ...]
    span: Span


Clause = Mesh | Stages | Shard | Precision | Overlap | Recompute | Train | Serve


@dataclass(frozen=True)
class Deploy:
    """``deploy name of Model from base on cluster { ... }``."""

    name: Name
    model: Name | None
    base: Name | None
    cluster: Name | None
    clauses: tuple[Clause, ...]
    span: Span
