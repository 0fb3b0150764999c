"""Number formats as the graph carries them: which format, and which elements share a scale.

A *coded* value is codes and their scales, one value of the graph: ``coded[t, d] {e4m3 1 x 128 of
d}``. Its columns are the dims behind ``of``, flattened; its rows are all other dims, each of which
is a row of its own unless there is only one. Nothing here knows a format by name: all of it comes
from the declaration, which the text form of a program repeats in its own syntax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsl.diagnostics import Source, Span
from dsl.extents import Extent
from dsl.formats import NumberFormat, Tile


@dataclass(frozen=True)
class Coding:
    """A format and its tile; ``over`` are the columns' dims, () where the operation says them."""

    format: NumberFormat
    rows: int | None  # None: as long as the matrix
    columns: int | None
    over: tuple[str, ...] = ()

    def __str__(self) -> str:
        tile = Tile(self.rows, self.columns)
        of = f" of {' '.join(self.over)}" if self.over else ""
        return f"{self.format} {tile}{of}" if self.format.scale else f"{self.format}{of}"

    def along(self, *dims: str) -> Coding:
        return replace(self, over=dims)

    def total(self, elements: Extent) -> Extent:
        """Bytes of so many elements; tiles at the edges count as the share of a tile they are."""
        found = elements * self.format.bits / 8
        if self.format.scale is not None and self.rows and self.columns:
            found = found + elements * self.format.scale.bits / (8 * self.rows * self.columns)
        return found

    def bytes(self, rows: int, columns: int) -> float:
        """Codes and scales of a matrix; codes of less than a byte are packed."""
        scales = 0
        if self.format.scale is not None:
            high = 1 if self.rows is None else -(-rows // self.rows)
            wide = 1 if self.columns is None else -(-columns // self.columns)
            scales = high * wide * self.format.scale.bits
        return (rows * columns * self.format.bits + scales) / 8


def declared(format: NumberFormat) -> Iterator[tuple[str, str]]:
    """What the format's declaration says, field by field."""
    if format.integer:
        yield "integer", str(format.bits)
    else:
        yield "exponent", str(format.exponent)
        yield "fraction", str(format.fraction)
        yield "bias", str(format.bias)
        yield "infinities", _word(format.infinities)
        yield "nans", _word(format.nans)
    yield "sign", _word(format.signed)
    yield "largest", repr(format.largest)
    if format.scale is not None:
        yield "scale", format.scale.name
        yield "rounding", format.rounding
    if format.tile is not None:
        yield "tile", str(format.tile).replace(" ", "")


def _word(truth: bool) -> str:
    return "true" if truth else "false"


def rebuilt(
    name: str, fields: dict[str, str], formats: dict[str, NumberFormat], span: Span | None
) -> NumberFormat:
    """The format that ``declared`` described.

    Raises:
        KeyError, ValueError: a field is missing, or is not what it should be.
    """
    integer, signed = "integer" in fields, fields["sign"] == "true"
    exponent, fraction = (0, 0) if integer else (int(fields["exponent"]), int(fields["fraction"]))
    tile = None
    if "tile" in fields:
        rows, columns = fields["tile"].split("x")
        tile = Tile(side(rows), side(columns))
    return NumberFormat(
        name,
        integer,
        signed,
        exponent,
        fraction,
        0 if integer else int(fields["bias"]),
        fields.get("infinities") == "true",
        fields.get("nans") == "true",
        int(fields["integer"]) if integer else signed + exponent + fraction,
        float(fields["largest"]),
        formats[fields["scale"]] if "scale" in fields else None,
        tile,
        fields.get("rounding", "nearest"),
        (),
        span or Span(Source("", ""), 1, 1, 1, 1),
    )


def side(text: str) -> int | None:
    """One side of a tile as it is written."""
    return None if text == "all" else int(text)
