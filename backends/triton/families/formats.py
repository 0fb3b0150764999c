"""Number formats as kernels see them: dtypes of codes and scales, and how a tile finds its scale.

``docs/deployments.md`` says what quantising computes; the text here computes that, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

from backends.triton.targets import Target
from dsl.deploy.typed import Stored
from dsl.formats import NumberFormat

# Exponent, fraction and whether there are infinities -> torch's dtype, and how Triton writes it.
ELEMENTS = {(4, 3, False): "float8_e4m3fn", (5, 2, True): "float8_e5m2"}
SCALES = {(8, 23): "float32", (8, 7): "bfloat16", (5, 10): "float16"}
POWERS = "float8_e8m0fnu"  # scales that are powers of two: an exponent and nothing else
LANGUAGE = {
    "float8_e4m3fn": "tl.float8e4nv",
    "float8_e5m2": "tl.float8e5",
    "float32": "tl.float32",
    "bfloat16": "tl.bfloat16",
    "float16": "tl.float16",
}
SHORT = {
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    POWERS: "ue8m0",
}
MOST = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0}  # what is more is stored as that
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2} | dict.fromkeys((*ELEMENTS.values(), POWERS), 1)


@dataclass(frozen=True)
class Quantised:
    """A matrix of codes, a scale for each tile of ``rows x columns``; tiles at edges are partial.

    Attributes:
        element: torch's dtype of a code.
        scale: torch's dtype in which scales are kept.
        rounding: how the scale comes from a tile's largest magnitude: nearest, up, exponents.
        largest: the greatest finite value of ``element``.
        grid: torch's dtype that has the values of scales, if that is not ``scale``: powers of two
            may be kept as float32.
    """

    element: str
    scale: str
    rows: int
    columns: int
    rounding: str = "nearest"
    largest: float = 448.0
    grid: str | None = None

    @property
    def values(self) -> str:
        """The dtype that has the values of scales."""
        return self.grid or self.scale

    @property
    def short(self) -> str:
        """In names of kernels."""
        name = SHORT[self.element] + ("" if self.values == "float32" else f"_{SHORT[self.values]}")
        name += f"_in_{SHORT[self.scale]}" if self.values != self.scale else ""
        rounded = "" if self.rounding == "nearest" else f"_{self.rounding}"
        return f"{name}{rounded}_{self.rows}x{self.columns}"

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Of a matrix: codes and scales."""
        down, across = self.scales(rows, columns)
        return rows * columns * BYTES[self.element] + down * across * BYTES[self.scale]


def quantised(stored: Stored, kept: str | None = "float32") -> Quantised:
    """What kernels are generated for where a precision rule stores an operand like this.

    Args:
        kept: torch's dtype in which scales are kept, whatever their format; None: as their format.

    Raises:
        ValueError: no kernel reads or writes such codes; the message says why.
    """
    found, tile = stored.format, stored.tile
    if found is None or found.scale is None or tile is None:
        raise ValueError(f"'{stored}' has no scales")
    element = None
    if not found.integer and found.signed and found.nans:
        element = ELEMENTS.get((found.exponent, found.fraction, found.infinities))
    if element is None or found.bias != (1 << (found.exponent - 1)) - 1:
        raise ValueError(f"no GPU format has the codes of '{found}'")
    scale = _scale(found.scale)
    if scale is None or (found.rounding == "up" and scale != POWERS):
        raise ValueError(f"kernels have no scales like those of '{found}'")
    if tile.rows is None or tile.columns is None or tile.columns & (tile.columns - 1):
        raise ValueError(f"kernels have no tiles of {tile}")
    if tile.columns < 32:
        raise ValueError(f"tiles of {tile} are narrower than a product of tensor cores")
    sides = (tile.rows, tile.columns)
    grid = None if kept in (None, scale) else scale
    return Quantised(element, kept or scale, *sides, found.rounding, found.largest, grid)


def supported(target: Target, *formats: Quantised | None) -> None:
    """Nothing, if the GPU converts to the codes of these formats and from them.

    Raises:
        ValueError: it does not.
    """
    for format in formats:
        if format is not None and not target.fp8:
            raise ValueError(f"{target.name} has no {format.element}")


def _scale(found: NumberFormat) -> str | None:
    if found.integer or found.scale is not None:
        return None
    if not found.signed and (found.exponent, found.fraction, found.bias) == (8, 0, 127):
        return POWERS
    return SCALES.get((found.exponent, found.fraction)) if found.signed else None


def power_of_two_helper() -> tuple[str, str]:
    """Name and text: the value of a scale that is an exponent. 255 is NaN, 0 is 2^-127."""
    return (
        "power_of_two",
        '''
@triton.jit
def power_of_two(code):
    """2^(code - 127) as float32; the code 255 is NaN."""
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    bits = tl.where(exponent == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)
''',
    )


def tile_scale_helper(to: Quantised) -> tuple[str, str]:
    """Name and text: a tile's scale (as stored, and its value) from its largest magnitude."""
    name = f"tile_scale_{SHORT[to.values]}_{to.rounding}_{to.largest:g}".replace(".", "_")
    if to.values == POWERS:
        about = f"a power of two; rounding: {to.rounding}"
        found = _exponent(to)
        code, value = "exponent.to(tl.uint8)", "power_of_two(exponent)"
    else:
        about = f"a number of {to.values}"
        dtype, most = LANGUAGE[to.values], MOST.get(to.values)
        found = "" if most is None else f"scale = tl.minimum(scale, {most}).to({dtype})\n    "
        found += "scale = scale.to(tl.float32)\n    " if found else ""
        found += "scale = tl.where(scale == 0.0, 1.0, scale)"
        found += '\n    scale = tl.where(most < float("inf"), scale, float("nan"))'
        code, value = f"scale.to({dtype})" if to.values != "float32" else "scale", "scale"
    if to.scale != to.values:
        name, code = f"{name}_in_{SHORT[to.scale]}", "value"
    return (
        name,
        f'''
@triton.jit
def {name}(most):
    """A tile's scale as stored and as a number, from its largest magnitude: {about}.

    It is 1 for a tile of zeros, and NaN if the tile has a NaN or an infinity.
    """
    scale = tl.div_rn(most, tl.full(most.shape, {to.largest}, tl.float32))
    {found}
    value = {value}
    return {code}, value
''',
    )


def _exponent(to: Quantised) -> str:
    """The exponent of a scale; what is smaller than the least power of two becomes that."""
    if to.rounding == "exponents":
        least = frexp(to.largest)[1] - 1
        found = f"exponent = tl.maximum((most.to(tl.int32, bitcast=True) >> 23) - {least}, 0)"
    elif to.rounding == "up":
        found = """\
bits = scale.to(tl.int32, bitcast=True)
    exponent = tl.where(bits <= 0x00400000, 0, (bits + 0x007FFFFF) >> 23)"""
    else:  # one and a half is a tie between 1 and 2 steps, and 2 is even
        found = """\
bits = scale.to(tl.int32, bitcast=True)
    exponent = tl.where(bits < 0x00600000, 0, (bits + 0x00400000) >> 23)"""
    return f"""{found}
    exponent = tl.where(most == 0.0, 127, exponent)
    exponent = tl.where(most < float("inf"), exponent, 255)"""


def largest_helper() -> tuple[str, str]:
    """Name and text: the largest magnitude along an axis, NaN where there is one."""
    return (
        "largest",
        '''
@triton.jit
def largest(values, axis: tl.constexpr):
    """The largest magnitude of float32 along an axis; NaN where a value is NaN.

    Without the sign, floats are ordered as their bits are, with infinity and then NaN at the top.
    """
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis).to(tl.float32, bitcast=True)
''',
    )


def quantising_helpers(to: Quantised) -> tuple[tuple[str, str], ...]:
    """What a kernel that quantises calls: the last is the function that gives a tile's scale."""
    powers = (power_of_two_helper(),) if to.values == POWERS else ()
    return (*powers, largest_helper(), tile_scale_helper(to))
