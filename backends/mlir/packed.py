"""Products with packed weights (``step.Weights``): the loops, and how IREE tiles them.

    out[t,o,i] = sum k: x[t,k] * W[o,k,i]

A vector of LANES is read at a time, from front to back: nothing is turned around in registers, as
IREE must where a row's numbers lie side by side. Its own choice of tiles for such loops is half as
fast, so they say theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from backends.mlir.linalg import Linalg
from backends.mlir.step import LANES, TILE, WITHIN, widened
from backends.mlir.values import Axis, Element, Size, Value

ROWS, WORK_ROWS = 8, 64  # of a register tile, and of one piece of work
COLUMN_TILES = 4  # of LANES columns for one piece of work
STEPS = 4  # of the sum, unrolled


def product(ops: Linalg, x: Value, weight: Value, out: Sequence[Axis], element: Element) -> Value:
    """A product summed over a packed weight's columns.

    Args:
        x: [rows.., columns] in any order.
        weight: [rows / LANES, columns, LANES]; of codes, it has scales.
        out: the axes of the result: rows of ``x``, then the weight's two.
    """
    outer, columns, inner = weight.axes
    rows = [axis for axis in out if axis.name in x.names]
    x = ops.transpose(x, [*(axis.name for axis in rows), columns.name])
    assert isinstance(outer.size, int) and isinstance(columns.size, int)
    count: Size = ops.code.product([axis.size for axis in rows])
    if rows:
        x = ops.merge(x, [axis.name for axis in rows], "@rows")
    wide, steps = _widest(outer.size, COLUMN_TILES), _widest(columns.size, STEPS)
    if weight.scales is not None:
        if count == 1:
            return ops.cast(_of_codes(ops, x, weight, out, wide), element)
        weight = _widened_for(ops, weight, weight.scales, count)
    lead = [Axis("@rows", count)] if rows else []
    if count == 1:
        tiles = _tiles(
            [*(0 for _ in lead), wide, 0, 0], [*(1 for _ in lead), wide, LANES, 0], steps
        )
    else:
        tiles = _tiles([WORK_ROWS, wide, 0, 0], [ROWS, 1, LANES, 0], steps)
    found = ops.sized(
        _sum(ops, x, weight, [*lead, weight.axes[0], inner], columns, tiles), [*lead, outer, inner]
    )
    if rows:
        found = ops.split(found, "@rows", rows)
    return ops.cast(found, element)


def _sum(ops: Linalg, x: Value, weight: Value, out: list[Axis], columns: Axis, tiles: str) -> Value:
    def body(scalars: list[str]) -> str:
        left = ops.scalar(scalars[0], x.element, "f32")
        right = ops.scalar(scalars[1], weight.element, "f32")
        return ops.compute("add", [scalars[2], ops.compute("mul", [left, right], "f32")], "f32")

    return ops.generic([x, weight], out, "f32", body, [columns], 0.0, tiles)


def _widened_for(ops: Linalg, weight: Value, scales: Value, count: Size) -> Value:
    """What codes stand for, once for all rows; nothing, where there are no rows."""
    outer, columns, _ = weight.axes
    size: Size = outer.size
    if isinstance(count, str):
        none = ops.code.define(f"arith.cmpi eq, {count}, {ops.code.index(0)} : index")
        zero, all_of = ops.code.index(0), ops.code.index(size)
        size = ops.code.define(f"arith.select {none}, {zero}, {all_of} : index")
    some: dict[str, tuple[Size, Size]] = {outer.name: (0, size)}
    codes, scales = (ops.slice(v, some) for v in (replace(weight, scales=None), scales))
    return widened(ops, codes, scales, columns.name)


def _of_codes(ops: Linalg, x: Value, weight: Value, out: Sequence[Axis], wide: int) -> Value:
    """A product of one row. No axis has size 1: IREE takes those away, and the tiles with them."""
    outer, columns, inner = weight.axes
    scales = weight.scales
    assert scales is not None and isinstance(columns.size, int)
    tiles = scales.axis(TILE)
    assert isinstance(tiles.size, int)
    within = Axis(WITHIN, columns.size // tiles.size)
    x = ops.split(ops.merge(x, x.names, columns.name), columns.name, [tiles, within])
    codes = ops.split(replace(weight, scales=None), columns.name, [tiles, within])
    assert isinstance(within.size, int)
    sizes = ([wide, 0, 0, 0], [wide, LANES, 0, 0], [0, 0, 1, _widest(within.size, STEPS)])

    def body(scalars: list[str]) -> str:
        left, code, scale = (
            ops.scalar(s, v.element, "f32")
            for s, v in zip(scalars, (x, codes, scales), strict=False)
        )
        factor = ops.compute("mul", [code, scale], "f32")
        return ops.compute("add", [scalars[3], ops.compute("mul", [left, factor], "f32")], "f32")

    over = [tiles, within]
    found = ops.generic([x, codes, scales], [outer, inner], "f32", body, over, 0.0, _said(*sizes))
    ones = [axis for axis in out if axis.name not in (outer.name, inner.name)]
    return ops.split(found, outer.name, [*ones, outer])


def _widest(size: int, most: int) -> int:
    """The largest of most, most / 2, .., 1 that divides a size: IREE has no remainders then."""
    while size % most:
        most //= 2
    return most


def _tiles(work: Sequence[int], vector: Sequence[int], steps: int) -> str:
    """As an attribute: sizes of a piece of work, of a register tile, and steps of the sum."""
    return _said(work, vector, [*(0 for _ in vector[:-1]), steps])


def _said(work: Sequence[int], vector: Sequence[int], sums: Sequence[int]) -> str:
    return (
        "compilation_info = #iree_codegen.compilation_info<lowering_config = "
        f"#iree_cpu.lowering_config<distribution = {list(work)}, vector_common_parallel = "
        f"{list(vector)}, vector_reduction = {list(sums)}>, translation_info = "
        "#iree_codegen.translation_info<pipeline = #iree_cpu.pipeline<DoubleTilingExpert>>>"
    )
