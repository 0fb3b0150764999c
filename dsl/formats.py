"""Number formats: how an element is stored, and how a tile of elements shares a scale.

A format is declared, never built in (``dsl/std/formats.arch``)::

    format e4m3  { exponent = 4, fraction = 3, infinities = false, scale = f32 }
    format mxfp8 from e4m3 { tile = 1 x 32, scale = ue8m0, rounding = exponents }

``docs/deployments.md`` says what quantising to a format computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ldexp

from dsl import syntax as ast
from dsl.deploy.syntax import Figure, TileSize
from dsl.diagnostics import Diagnostics, Span, near
from dsl.tables import Merged, Tables, count, spelled

ROUNDINGS = ("nearest", "up", "exponents")
FIELDS = (
    "exponent fraction bias sign infinities nans integer scale tile rounding".split()
)  # what a format may declare
MOST_EXPONENT, MOST_FRACTION, MOST_BIAS, MOST_INTEGER = 11, 52, 2047, 32
LARGEST_TILE = 1 << 20
MOST_SCALES = 3


@dataclass(frozen=True)
class Tile:
    """A block of a matrix that shares one scale. None: as long as the matrix."""

    rows: int | None
    columns: int | None

    def __str__(self) -> str:
        return " x ".join(
            "all" if side is None else str(side) for side in (self.rows, self.columns)
        )


@dataclass(frozen=True)
class NumberFormat:
    """How numbers are stored.

    Attributes:
        integer: a signed or unsigned whole number of ``bits``, not a floating-point number.
        exponent, fraction, bias: of a floating-point number; it has subnormals if ``fraction`` > 0.
        infinities: the highest exponent is for infinities and NaN, as in IEEE 754.
        nans: has NaN. Without infinities it is the one code (per sign) whose bits are all ones.
        bits: of one element, the sign included.
        largest: the greatest finite value; what is greater is stored as this one.
        scale: the format of the scale that a tile shares; None if elements are stored as they are.
            A scale whose format has a scale itself is scaled once more, per tensor.
        tile: the tile, where the format fixes it; a precision rule may give another.
        rounding: how the scale comes from a tile's largest magnitude m.
            ``nearest``: m / largest, rounded to the nearest value of ``scale``;
            ``up``: the least value of ``scale`` that is no less than m / largest;
            ``exponents``: 2 ^ (floor(log2 m) - floor(log2 largest)), as in OCP's MX formats.
        bases: formats that it was declared from, nearest first: what runs it as fast as they run.
    """

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
    scale: NumberFormat | None
    tile: Tile | None
    rounding: str
    bases: tuple[str, ...] = field(compare=False)
    span: Span = field(compare=False)

    def __str__(self) -> str:
        return self.name


class Formats:
    """Makes the declared formats, each once."""

    def __init__(self, tables: Tables, found: Diagnostics):
        self.tables = tables
        self.found = found
        self._made: dict[str, NumberFormat | None] = {}
        self._open: list[str] = []

    def all(self) -> dict[str, NumberFormat]:
        made = {t.name: self._format(t) for t in self.tables.all("format")}
        return {name: format for name, format in made.items() if format is not None}

    def named(self, name: ast.Name) -> NumberFormat | None:
        """The format called ``name``; None after a diagnostic."""
        table = self.tables.merged("format", name, "import std.formats")
        return None if table is None else self._format(table)

    def _format(self, table: Merged) -> NumberFormat | None:
        if table.name not in self._made:
            if table.name in self._open:
                span = table.table.name.span
                self.found.error("E0807", f"the scale of '{table.name}' is scaled by itself", span)
                return None
            if len(self._open) > MOST_SCALES:
                span = table.table.name.span
                self.found.error("E0807", f"more than {MOST_SCALES} scales of scales", span)
                return None
            self._open.append(table.name)
            try:
                self._made[table.name] = _Maker(self, table).make()
            finally:
                self._open.pop()
        return self._made[table.name]


class _Maker:
    def __init__(self, formats: Formats, table: Merged):
        self.formats = formats
        self.found = formats.found
        self.table = table
        self.figures = {key[0]: f for key, f in table.figures.items() if len(key) == 1}
        self.failed = False

    def make(self) -> NumberFormat | None:
        for key, figure in self.table.figures.items():
            if key[0] not in FIELDS or len(key) > 1:
                self.error(
                    "E0803",
                    f"a number format has no '{spelled(key)}'",
                    figure.span,
                    near(key[0], FIELDS) or f"it has {', '.join(FIELDS)}",
                )
        signed = self.truth("sign", True)
        bits = self.whole("integer", 2, MOST_INTEGER)
        exponent = self.whole("exponent", 1, MOST_EXPONENT)
        fraction = self.whole("fraction", 0, MOST_FRACTION)
        scale, tile, rounding = self.scale(), self.tile(), self.rounding()
        name = self.table.table.name
        if "integer" in self.figures and "exponent" in self.figures:
            self.error("E0807", f"'{name.text}' is either an integer or has an exponent", name.span)
        elif "integer" not in self.figures and not {"exponent", "fraction"} <= self.figures.keys():
            self.error(
                "E0807",
                f"'{name.text}' does not say how an element is stored",
                name.span,
                "exponent = 4, fraction = 3 or integer = 4",
            )
        if scale is None and "scale" not in self.figures:
            for field in ("tile", "rounding"):
                if field in self.figures:
                    self.error(
                        "E0807",
                        f"'{name.text}' has no scale, so it has no {field}",
                        self.figures[field].span,
                        "scale = f32",
                    )
        elif scale is not None and rounding == "exponents" and scale.fraction:
            self.error(
                "E0807",
                f"'exponents' makes scales that are powers of two, and these are '{scale}'",
                self.figures["rounding"].span,
                "scale = ue8m0",
            )
        infinities, nans = self.truth("infinities", True), self.truth("nans", True)
        default = (1 << ((exponent or 1) - 1)) - 1
        bias = self.whole("bias", -MOST_BIAS, MOST_BIAS, default) or 0
        if self.failed:
            return None
        if bits is not None:
            largest = float((1 << (bits - signed)) - 1)
            exponent = fraction = bias = 0
            infinities = nans = False
        else:
            assert exponent is not None and fraction is not None
            bits = signed + exponent + fraction
            found = _largest(exponent, fraction, bias, infinities, nans)
            if found is None:
                self.error("E0807", f"'{name.text}' is wider than a 64-bit number", name.span)
                return None
            largest = found
        return NumberFormat(
            name.text,
            "integer" in self.figures,
            signed,
            exponent,
            fraction,
            bias,
            infinities,
            nans,
            bits,
            largest,
            scale,
            tile,
            rounding,
            self.table.bases,
            name.span,
        )

    def error(self, code: str, message: str, span: Span, hint: str = "") -> None:
        self.failed = True
        self.found.error(code, message, span, hint=hint)

    def whole(self, field: str, least: int, most: int, default: int | None = None) -> int | None:
        figure = self.figures.get(field)
        if figure is None:
            return default
        given = figure.value.value if isinstance(figure.value, ast.Literal) else None
        checked = count(given, least, most, field, figure.span, self.found)
        self.failed = self.failed or checked is None
        return checked

    def truth(self, field: str, default: bool) -> bool:
        figure = self.figures.get(field)
        if figure is None:
            return default
        match figure.value:
            case ast.Literal(value=bool(value)):
                return value
        self.error("E0805", f"'{field}' must be true or false", figure.span)
        return default

    def scale(self) -> NumberFormat | None:
        figure = self.figures.get("scale")
        if figure is None:
            return None
        name = word(figure)
        if name is None:
            self.error("E0805", "'scale' must name a number format", figure.span, "scale = f32")
            return None
        scale = self.formats.named(name)
        if scale is None:
            self.failed = True
        elif scale.integer:
            self.error("E0807", f"a scale is a floating-point number, not '{scale}'", figure.span)
        return scale

    def tile(self) -> Tile | None:
        figure = self.figures.get("tile")
        if figure is None:
            return None
        if isinstance(figure.value, TileSize):
            tile = checked_tile(figure.value, self.found)
            self.failed = self.failed or tile is None
            return tile
        self.error("E0805", "'tile' must be rows x columns", figure.span, "tile = 1 x 32")
        return None

    def rounding(self) -> str:
        figure = self.figures.get("rounding")
        if figure is None:
            return "nearest"
        name = word(figure)
        if name is not None and name.text in ROUNDINGS:
            return name.text
        self.error(
            "E0805", f"'rounding' must be {', '.join(ROUNDINGS[:-1])} or exponents", figure.span
        )
        return "nearest"


def word(figure: Figure) -> ast.Name | None:
    """The name that a figure's value is, if it is one."""
    match figure.value:
        case ast.Ref(name=name, member=None, subscripts=None):
            return name
    return None


def checked_tile(size: TileSize, found: Diagnostics) -> Tile | None:
    """A tile with sides that make sense; None after a diagnostic."""
    for side in (size.rows, size.columns):
        if side is not None and not 1 <= side <= LARGEST_TILE:
            found.error(
                "E0805", f"the sides of a tile must be 1 to {LARGEST_TILE:,}, or all", size.span
            )
            return None
    return Tile(size.rows, size.columns)


def _largest(exponent: int, fraction: int, bias: int, infinities: bool, nans: bool) -> float | None:
    """The greatest finite value; None if a 64-bit number cannot hold it."""
    top = (1 << exponent) - 1 - bias - infinities  # the highest exponent that has finite values
    mantissa = 2.0 - 2.0**-fraction
    if nans and not infinities:  # all ones is NaN
        if fraction:
            mantissa = 2.0 - 2.0 ** (1 - fraction)
        else:
            top, mantissa = top - 1, 1.0
    try:
        return ldexp(mantissa, top)
    except OverflowError:
        return None
