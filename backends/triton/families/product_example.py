"""Random operands for products with stored matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from backends.triton.families.formats import POWERS, Quantised

if TYPE_CHECKING:
    from torch import Tensor


def operand(
    leading: tuple[int, ...], rows: int, columns: int, to: Quantised | None, dtype: str, device: str
) -> tuple[Tensor, ...]:
    """A matrix ``[*leading, rows, columns]`` of ``dtype``, or its codes and scales, those of one
    tile of columns next to each other."""
    import torch

    x = torch.randn(*leading, rows, columns, dtype=torch.bfloat16, device=device)
    if to is None:
        return (x.to(getattr(torch, dtype)),)
    down, across = to.scales(rows, columns)
    if to.scale == POWERS:
        scales: Any = torch.full((*leading, across, down), 127, dtype=torch.uint8, device=device)
        scales = scales.view(torch.float8_e8m0fnu)
    else:
        scales = torch.rand(*leading, across, down, device=device).to(getattr(torch, to.scale))
    if to.rows > 1:
        scales = scales.transpose(-1, -2).contiguous()
        return x.to(getattr(torch, to.element)), scales
    return x.to(getattr(torch, to.element)), scales.transpose(-1, -2)
