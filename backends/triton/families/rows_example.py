"""Random rows, as arguments of kernels that work row by row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def random_rows(count: int, width: int, dtype: str, device: str) -> Tensor:
    """``[count, width]``, normal."""
    import torch

    return torch.randn(count, width, dtype=getattr(torch, dtype), device=device)


def random_like(shape: tuple[int, ...], dtype: str, device: str) -> Any:
    """A tensor of any dtype: numbers, small whole numbers, or truths."""
    import torch

    if dtype == "bool":
        return torch.rand(shape, device=device) < 0.5
    if dtype.startswith(("int", "uint")):
        return torch.randint(0, 4, shape, dtype=getattr(torch, dtype), device=device)
    return torch.randn(shape, dtype=getattr(torch, dtype), device=device)
