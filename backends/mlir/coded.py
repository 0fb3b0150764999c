"""Quantised values in a module.

A value that the source quantises is what its codes stand for, f32: the rounding is computed, the
bytes are not kept. A parameter is read as codes and scales, and widened where it is read: a packed
one within the product that reads it, any other before.

Everything here is said of a format's fields (``compiler/numerics.py``), in f32.
"""

from __future__ import annotations

import math

from backends.mlir.linalg import Linalg
from backends.mlir.lower import Frame, lowers
from backends.mlir.step import COLUMNS, TILE, WITHIN
from backends.mlir.values import Axis, Size, Value
from compiler.coding import Coding
from compiler.ir import Node
from dsl.formats import NumberFormat


@lowers("quantize")
def quantize(frame: Frame, node: Node, args: list[Value]) -> Value:
    coding: Coding = node.attrs["coding"]
    along = [n for n in coding.over if frame.kinds.get(n) in ("time", "history")]
    if along:
        raise frame.unsupported(node, f"its tiles run along positions ({', '.join(along)})")
    frame.check_codes(node, coding)
    return represented(frame.ops, args[0], coding)


@lowers("dequantize")
def dequantize(frame: Frame, node: Node, args: list[Value]) -> Value:
    return args[0]


def represented(ops: Linalg, value: Value, coding: Coding) -> Value:
    """What a value stands for once it is quantised, each row by itself."""
    rows = [n for n in value.names if n not in coding.over]
    columns = [value.axis(n) for n in coding.over]
    x = ops.transpose(ops.cast(value, "f32"), [*rows, *coding.over])
    x = ops.merge(x, coding.over, COLUMNS)
    size = x.axis(COLUMNS).size
    assert isinstance(size, int)
    wide = max(1, min(coding.columns or size, size))
    whole = -(-size // wide) * wide
    if whole != size:
        axes = [Axis(a.name, whole if a.name == COLUMNS else a.size) for a in x.axes]
        x = ops.insert(x, ops.fill(ops.empty(axes, "f32"), 0.0), {})
    x = ops.split(x, COLUMNS, [Axis(TILE, whole // wide), Axis(WITHIN, wide)])
    if coding.format.scale is None:
        found = nearest(ops, x, coding.format)
    else:
        largest = ops.reduce("max", ops.map("abs", [x], "f32"), [WITHIN], "f32")
        scale = _scales(ops, largest, coding.format)
        codes = nearest(ops, ops.map("div", [x, scale], "f32"), coding.format)
        found = ops.map("mul", [codes, scale], "f32")
    found = ops.merge(found, [TILE, WITHIN], COLUMNS)
    if whole != size:
        ranges: dict[str, tuple[Size, Size]] = {COLUMNS: (0, size)}
        found = ops.slice(found, ranges)
    return ops.split(found, COLUMNS, columns)


def nearest(ops: Linalg, x: Value, format: NumberFormat, whole: str = "round") -> Value:
    """The nearest values of a format, clamped to its largest; NaN stays NaN."""
    least = -format.largest if format.signed else 0.0
    x = _clamped(ops, x, least, format.largest)
    if format.integer:
        return ops.map(whole, [x], "f32")
    if (format.exponent, format.fraction) == (8, 23):
        return x
    # In steps of 2^-fraction of the power of two below, which are whole numbers then.
    lowest = 2.0 ** (1 - format.bias if format.fraction else -format.bias)
    lowest = max(lowest, 2.0**-126)
    power = ops.map("max", [ops.map("power", [x], "f32"), _number(lowest)], "f32")
    steps = _number(2.0**format.fraction)
    scaled = ops.map("mul", [ops.map("div", [x, power], "f32"), steps], "f32")
    found = ops.map("div", [ops.map(whole, [scaled], "f32"), steps], "f32")
    found = ops.map("mul", [found, power], "f32")
    if not format.fraction:  # neither zero nor subnormals
        found = ops.map("max", [found, _number(lowest)], "f32")
    return _clamped(ops, found, least, format.largest)


def _scales(ops: Linalg, largest: Value, format: NumberFormat) -> Value:
    """The scale of each tile from its largest magnitude; NaN where that is not finite."""
    scale = format.scale
    assert scale is not None
    if format.rounding == "exponents":
        above = _number(2.0 ** (1 - math.frexp(format.largest)[1]))
        found = ops.map("mul", [ops.map("power", [largest], "f32"), above], "f32")
        found = nearest(ops, found, scale)
    else:
        found = ops.map("div", [largest, _number(format.largest)], "f32")
        found = nearest(ops, found, scale, "ceil" if format.rounding == "up" else "round")
    zero, one = _number(0.0), _number(1.0)
    for magnitude in (largest, found):
        found = ops.map("where", [ops.map("gt", [magnitude, zero], "i1"), found, one], "f32")
    finite = ops.map("lt", [largest, _number(math.inf)], "i1")
    return ops.map("where", [finite, found, _number(math.nan)], "f32")


def _clamped(ops: Linalg, x: Value, least: float, most: float) -> Value:
    return ops.map("max", [ops.map("min", [x, _number(most)], "f32"), _number(least)], "f32")


def _number(number: float) -> Value:
    return Value("", (), "f32", number)
