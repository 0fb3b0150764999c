"""What quantising means, for any declared format: the reference, in torch.

``docs/deployments.md`` has the definition in words. Everything is computed in float32, as the
definition says, whatever the values come in; formats are read field by field, none is known by
name. Values of a format are given as float32 (float64 where they are wider), not as bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compiler.coding import Coding
from dsl.formats import NumberFormat


def nearest(x: Tensor, format: NumberFormat) -> Tensor:
    """The nearest values of a format, ties to even, clamped to its largest; NaN stays NaN.

    Args:
        x: any float dtype.
    """
    return _rounded(x, format, torch.round)


def _rounded(x: Tensor, format: NumberFormat, whole: object) -> Tensor:
    wide = x.double()
    least = 0.0 if not format.signed else -format.largest
    if format.integer:
        return whole(wide).clamp(least, format.largest).to(x.dtype)  # type: ignore[operator]
    exponent = torch.frexp(wide)[1] - 1  # |x| in [2^e, 2^(e+1))
    lowest = (1 - format.bias) if format.fraction else -format.bias
    step = torch.ldexp(torch.ones_like(wide), exponent.clamp(min=lowest) - format.fraction)
    value = whole(wide / step) * step  # type: ignore[operator]
    if not format.fraction:  # neither zero nor subnormals
        value = value.clamp(min=2.0**lowest)
    return value.clamp(least, format.largest).to(x.dtype)


def no_less(x: Tensor, format: NumberFormat) -> Tensor:
    """The least values of a format that are no less than x, for x > 0."""
    return _rounded(x, format, torch.ceil)


def quantised(x: Tensor, coding: Coding) -> tuple[Tensor, Tensor]:
    """Codes (as the numbers of the format) and the scale of each element's tile.

    Args:
        x: float ``[..., rows, columns]``; matrices in front are apart from each other.

    Returns:
        Two float32 tensors of the shape of ``x``; what ``x`` becomes is their product.
    """
    wide = x.float()
    format = coding.format
    if format.scale is None:
        return nearest(wide, format), torch.ones_like(wide)
    tiles = _largest(wide.abs(), coding)
    spread = _spread(scales(tiles, format), wide.shape, coding)
    codes = nearest(wide / spread, format)
    return torch.where(spread.isnan(), torch.zeros_like(codes), codes), spread


def represented(x: Tensor, coding: Coding) -> Tensor:
    """What ``[..., rows, columns]`` stands for once it is quantised, float64: exact there."""
    codes, scales = quantised(x, coding)
    return codes.double() * scales.double()


def scales(largest: Tensor, format: NumberFormat) -> Tensor:
    """The scale of each tile from its largest magnitude; NaN where that is not finite."""
    scale = format.scale
    assert scale is not None
    if format.rounding == "exponents":
        top = torch.frexp(torch.tensor(format.largest, dtype=torch.float64))[1]
        power = torch.frexp(largest.double())[1] - top
        found = nearest(torch.ldexp(torch.ones_like(largest), power), scale)
    else:
        found = largest / torch.tensor(format.largest, dtype=torch.float32)
        if scale.scale is not None:  # scaled once more, per tensor
            whole = found.amax((-2, -1), keepdim=True)
            outer = whole / torch.tensor(scale.largest, dtype=torch.float32)
            outer = torch.where(whole > 0, outer, torch.ones_like(outer))
            inner = largest / outer / torch.tensor(format.largest, dtype=torch.float32)
            found = nearest(inner, scale) * outer
        else:
            found = (no_less if format.rounding == "up" else nearest)(found, scale)
    # 1 where all of a tile is 0, or so small that its scale would be.
    found = torch.where((largest > 0) & (found > 0), found, torch.ones_like(found))
    return torch.where(largest.isfinite(), found, torch.full_like(found, torch.nan))


def _sides(shape: torch.Size, coding: Coding) -> tuple[int, int]:
    rows, columns = shape[-2:]
    return coding.rows or max(rows, 1), coding.columns or max(columns, 1)


def _largest(magnitude: Tensor, coding: Coding) -> Tensor:
    """The largest of each tile, ``[..., tiles of rows, tiles of columns]``; NaN if one is."""
    high, wide = _sides(magnitude.shape, coding)
    rows, columns = magnitude.shape[-2:]
    padded = torch.nn.functional.pad(magnitude, (0, -columns % wide, 0, -rows % high))
    tiles = padded.unflatten(-1, (-1, wide)).unflatten(-3, (-1, high))
    return tiles.amax((-3, -1)) if tiles.numel() else tiles.sum((-3, -1))


def _spread(scales: Tensor, shape: torch.Size, coding: Coding) -> Tensor:
    """Each element's scale."""
    high, wide = _sides(shape, coding)
    rows, columns = shape[-2:]
    spread = scales.repeat_interleave(high, -2).repeat_interleave(wide, -1)
    return spread[..., :rows, :columns]
