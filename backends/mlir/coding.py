"""Weights that are kept as codes and scales: which formats are, how they lie, and, in numpy, what
quantising a weight computes.

What quantising means is defined in ``docs/deployments.md``; ``compiler/numerics.py`` computes it in
torch, for any format. This is the same for the formats whose codes fit into a byte, without torch.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from compiler.coding import Coding
from dsl.formats import NumberFormat

Array = NDArray[Any]
CodeElement = Literal["f8E4M3FN", "f8E5M2", "i8"]

# Codes are kept in the first of these that has all of a format's values.
_FLOATS: dict[CodeElement, Any] = {
    "f8E4M3FN": ml_dtypes.float8_e4m3fn,
    "f8E5M2": ml_dtypes.float8_e5m2,
}
SCALES = ":scales"  # behind a stacked weight's name: its scales


class NoCodes(Exception):
    """A format that this backend keeps no codes of; the text says why."""


def element_of(coding: Coding) -> CodeElement:
    """What the codes of a format are kept in.

    Raises:
        NoCodes: not in a byte, or its scales have a scale.
    """
    format = coding.format
    if format.scale is not None and format.scale.scale is not None:
        raise NoCodes(f"the scales of '{format}' have a scale of their own")
    if format.integer:
        if format.signed and format.largest <= 127:
            return "i8"
    elif format.fraction:
        smallest = 1 - format.bias - format.fraction
        for name, dtype in _FLOATS.items():
            info = ml_dtypes.finfo(dtype)
            if (
                format.largest <= float(info.max)
                and format.fraction <= info.nmant
                and smallest >= info.minexp - info.nmant
            ):
                return name
    raise NoCodes(f"codes of '{format}' do not fit into a byte that IREE computes with")


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows (the first axis) and columns (the others) of a parameter; of one axis: one row."""
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else (1, shape[0])


def tile_of(coding: Coding, shape: tuple[int, ...]) -> tuple[int, int]:
    """The sides of a tile, no longer than the matrix; both at least 1."""
    sides = zip((coding.rows, coding.columns), matrix_of(shape), strict=True)
    return tuple(max(1, min(side or size, size)) for side, size in sides)  # type: ignore[return-value]


def packs(coding: Coding, shape: tuple[int, ...], lanes: int) -> bool:
    """Whether rows of a matrix may lie ``lanes`` side by side: those then share their scales."""
    rows, columns = matrix_of(shape)
    high, wide = tile_of(coding, shape)
    return len(shape) == 2 and columns % wide == 0 and (high % lanes == 0 or high == rows)


def codes_shape(coding: Coding, shape: tuple[int, ...], lanes: int | None) -> tuple[int, ...]:
    """How codes lie: [rows / lanes, columns, lanes], or [rows, whole tiles of columns]."""
    rows, columns = matrix_of(shape)
    if lanes:
        return (rows // lanes, columns, lanes)
    _, wide = tile_of(coding, shape)
    return (rows, -(-columns // wide) * wide)


def scales_shape(coding: Coding, shape: tuple[int, ...], lanes: int | None) -> tuple[int, ...]:
    """How scales lie: one for each row, or lanes of rows, and each tile of columns."""
    rows, columns = matrix_of(shape)
    _, wide = tile_of(coding, shape)
    return (rows // (lanes or 1), -(-columns // wide))


def lay(codes: Array, scales: Array, coding: Coding, into: Array, scales_into: Array) -> None:
    """Put codes and scales of a matrix where the module reads them.

    Args:
        codes: bytes of the parameter's shape.
        scales: float32 [tiles of rows, tiles of columns].
        into, scales_into: of ``codes_shape`` and ``scales_shape``.
    """
    rows, columns = matrix_of(codes.shape)
    high, _ = tile_of(coding, codes.shape)
    codes = codes.reshape(rows, columns)
    each = np.repeat(scales, high, 0)[:rows]
    if into.ndim == 3:
        lanes = into.shape[-1]
        into[...] = codes.reshape(rows // lanes, lanes, columns).swapaxes(1, 2)
        scales_into[...] = each[::lanes]
    else:
        into[:, :columns] = codes
        into[:, columns:] = 0
        scales_into[...] = each


def quantised(weight: Array, coding: Coding) -> tuple[Array, Array]:
    """Codes as bytes, of the weight's shape, and float32 scales [tiles of rows, of columns].

    Args:
        weight: float32, of any shape with an axis.
    """
    rows, columns = matrix_of(weight.shape)
    high, wide = tile_of(coding, weight.shape)
    padded = np.pad(weight.reshape(rows, columns), ((0, -rows % high), (0, -columns % wide)))
    tiles = padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
    with np.errstate(all="ignore"):
        scales = _scales(np.abs(tiles).max((1, 3)), coding.format)
        values = nearest(tiles / scales[:, None, :, None], coding.format)
    codes = _bytes(values, element_of(coding)).reshape(padded.shape)[:rows, :columns]
    return codes.reshape(weight.shape), scales


def _bytes(values: Array, element: CodeElement) -> Array:
    if element == "i8":
        return np.nan_to_num(values).astype(np.int8).view(np.uint8)
    return values.astype(_FLOATS[element]).view(np.uint8)


def nearest(x: Array, format: NumberFormat, up: bool = False) -> Array:
    """The nearest values of a format, ties to even, or with ``up`` the least that are no less."""
    whole = np.ceil if up else np.rint
    least = -format.largest if format.signed else 0.0
    wide = x.astype(np.float64)
    if format.integer:
        return np.clip(whole(wide), least, format.largest).astype(x.dtype)
    lowest = 1 - format.bias if format.fraction else -format.bias
    step = np.ldexp(1.0, np.maximum(np.frexp(wide)[1] - 1, lowest) - format.fraction)
    value = whole(wide / step) * step
    if not format.fraction:  # neither zero nor subnormals
        value = np.maximum(value, 2.0**lowest)
    return np.clip(value, least, format.largest).astype(x.dtype)


def _scales(largest: Array, format: NumberFormat) -> Array:
    """The scale of each tile from its largest magnitude; NaN where that is not finite."""
    scale = format.scale
    if scale is None:
        return np.ones_like(largest)
    if format.rounding == "exponents":
        power = np.frexp(largest.astype(np.float64))[1] - np.frexp(format.largest)[1]
        found = nearest(np.ldexp(np.float32(1), power), scale)
    else:
        found = nearest(largest / np.float32(format.largest), scale, format.rounding == "up")
    found = np.where((largest > 0) & (found > 0), found, np.float32(1))
    return np.where(np.isfinite(largest), found, np.float32(np.nan)).astype(np.float32)
