"""How a parameter is kept, as data of ``manifest.json``: its number format and tile in full."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveInt

from compiler.coding import Coding
from dsl.diagnostics import Source, Span
from dsl.formats import NumberFormat, Tile


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FormatRow(_Row):
    """``dsl.formats.NumberFormat``, as declared."""

    name: str
    integer: bool
    signed: bool
    exponent: int
    fraction: int
    bias: int
    infinities: bool
    nans: bool
    bits: int
    largest: float
    scale: FormatRow | None
    tile: tuple[PositiveInt | None, PositiveInt | None] | None
    rounding: str

    @staticmethod
    def of(format: NumberFormat) -> FormatRow:
        fields = {name: getattr(format, name) for name in FormatRow.model_fields}
        fields["scale"] = FormatRow.of(format.scale) if format.scale else None
        fields["tile"] = (format.tile.rows, format.tile.columns) if format.tile else None
        return FormatRow(**fields)

    def format(self) -> NumberFormat:
        fields = {name: getattr(self, name) for name in FormatRow.model_fields}
        fields["scale"] = self.scale.format() if self.scale else None
        fields["tile"] = Tile(*self.tile) if self.tile else None
        nowhere = Span(Source("", ""), 1, 1, 1, 1)
        return NumberFormat(**fields, bases=(), span=nowhere)


class StoredRow(_Row):
    """Codes in a format; the tile counts rows (the first axis) and columns (all others)."""

    format: FormatRow
    tile: tuple[PositiveInt | None, PositiveInt | None]  # null: as long as the matrix

    @staticmethod
    def of(coding: Coding) -> StoredRow:
        return StoredRow(format=FormatRow.of(coding.format), tile=(coding.rows, coding.columns))

    def coding(self) -> Coding:
        return Coding(self.format.format(), *self.tile)
