"""The operations of the language that torch lacks, or does not define exactly enough."""

from __future__ import annotations

import torch
from torch import Tensor

inf = float("inf")


def softmax(x: Tensor, axis: int) -> Tensor:
    """Softmax in f32, in the dtype of ``x``; a row of all -inf gives zeros, and zero gradients."""
    if not x.shape[axis]:  # the history of a step without tokens
        return x
    wide = x.float()
    peak = wide.detach().amax(axis, keepdim=True)
    raised = (wide - peak.masked_fill(peak == -inf, 0)).exp()
    total = raised.sum(axis, keepdim=True)
    return (raised / total.masked_fill(total == 0, 1)).to(x.dtype)


def largest(x: Tensor, axis: int) -> Tensor:
    """The maximum along a history. A step without tokens has none, and no result to be computed."""
    return x.amax(axis) if x.shape[axis] else x.sum(axis)


def smallest(x: Tensor, axis: int) -> Tensor:
    """The minimum along a history, as ``largest``."""
    return x.amin(axis) if x.shape[axis] else x.sum(axis)


def top(x: Tensor, count: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """The ``count`` largest along ``axis`` and where they are (int64), in descending order.

    Ties go to the lowest index, which ``torch.topk`` does not promise.

    Raises:
        ValueError: there are fewer than ``count``.
    """
    if count > x.shape[axis]:
        raise ValueError(f"the {count} largest of {x.shape[axis]}")
    values, places = torch.sort(x, dim=axis, descending=True, stable=True)
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def in_top(x: Tensor, count: int, axis: int = -1) -> Tensor:
    """bool, like ``x``: is this among the ``count`` largest above -inf, ties to the lowest?

    All that are above -inf, where there are fewer: of a history, say.
    """
    x = x.detach()
    places = top(x, min(count, x.shape[axis]), axis)[1]
    return torch.zeros_like(x, dtype=torch.bool).scatter(axis, places, True) & (x > -inf)


def gather(table: Tensor, index: Tensor, shared: int) -> Tensor:
    """Rows of a table that has its own rows for each of the ``shared`` leading axes.

    Args:
        table: ``[*shared, size, *rest]``.
        index: int64 ``[*shared, *own]`` of 0 .. size. A shared axis may have length 1 in either.

    Returns:
        ``[*shared, *own, *rest]``.
    """
    own = index.ndim - shared
    places: list[Tensor] = []
    for axis in range(shared):
        size = max(table.shape[axis], index.shape[axis])
        along = torch.arange(size, device=index.device)
        if table.shape[axis] == 1:
            along = torch.zeros_like(along)
        places.append(along.reshape(-1, *[1] * (shared - axis - 1 + own)))
    return table[(*places, index)]
