"""Number formats as kernels see them: dtypes of codes and scales, and how a tile finds its scale.

``docs/deployments.md`` says what quantising computes; the text here computes that, in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

from dsl.deploy import Stored
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
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2} | dict.fromkeys((*ELEMENTS.values(), POWERS), 1)


@dataclass(frozen=True)
class Quantised:
    """A matrix of codes, a scale for each tile of ``rows x columns``; tiles at edges are partial.

    Attributes:
        element: torch's dtype of a code.
        scale: torch's dtype of a scale.
        rounding: how the scale comes from a tile's largest magnitude: nearest, up, exponents.
        largest: the greatest finite value of ``element``.
    """

    element: str
    scale: str
    rows: int
    columns: int
    rounding: str = "nearest"
    largest: float = 448.0

    @property
    def short(self) -> str:
        """In names of kernels."""
        name = SHORT[self.element] + ("" if self.scale == "float32" else f"_{SHORT[self.scale]}")
        rounded = "" if self.rounding == "nearest" else f"_{self.rounding}"
        return f"{name}{rounded}_{self.rows}x{self.columns}"

    def scales(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of the scales of a matrix."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Of a matrix: codes and scales."""
        down, across = self.scales(rows, columns)
        return rows * columns * BYTES[self.element] + down * across * BYTES[self.scale]


def quantised(stored: Stored) -> Quantised:
    """What kernels are generated for where a precision rule stores an operand like this.

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
    return Quantised(element, scale, tile.rows, tile.columns, found.rounding, found.largest)


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
    name = f"tile_scale_{SHORT[to.scale]}_{to.rounding}_{to.largest:g}".replace(".", "_")
    if to.scale == "float32":
        about, lines = "as both are float32", "    return scale, scale"
    elif to.scale != POWERS:
        about = f"rounded to {to.scale}"
        lines = (
            f"    stored = scale.to({LANGUAGE[to.scale]})\n    return stored, stored.to(tl.float32)"
        )
    else:
        about = f"a power of two, as an exponent; rounding: {to.rounding}"
        lines = _exponent(to)
    head = f'''
@triton.jit
def {name}(most):
    """A tile's scale as stored and as a number, from its largest magnitude: {about}.

    A tile of zeros has the scale 1; what is infinite or NaN makes a scale that is, too.
    """
    full = tl.full(most.shape, {to.largest}, tl.float32)
    scale = tl.where(most == 0.0, 1.0, tl.div_rn(most, full))
'''
    return name, head + lines + "\n"


def _exponent(to: Quantised) -> str:
    if to.rounding == "exponents":
        least = frexp(to.largest)[1] - 1
        found = f"""\
    exponent = tl.maximum((most.to(tl.int32, bitcast=True) >> 23) - {least}, 0)
    exponent = tl.where(most == 0.0, 127, exponent)"""
    elif to.rounding == "up":
        found = """\
    bits = scale.to(tl.int32, bitcast=True)
    exponent = tl.where(bits <= 0x00400000, 0, (bits + 0x007FFFFF) >> 23)"""
    else:
        found = """\
    bits = scale.to(tl.int32, bitcast=True)
    exponent = (bits + 0x003FFFFF + ((bits >> 23) & 1)) >> 23
    exponent = tl.where(bits <= 0x00600000, 0, exponent)"""
    return f"""{found}
    exponent = tl.where(most < float("inf"), exponent, 255)
    stored = exponent.to(tl.uint8)
    return stored, power_of_two(stored)"""


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
    powers = (power_of_two_helper(),) if to.scale == POWERS else ()
    return (*powers, largest_helper(), tile_scale_helper(to))
