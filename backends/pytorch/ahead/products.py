"""Products of one row as a sum over a broadcast product.

Inductor makes one loop of such a sum, with the conversion to f32, the choice of a block's weights
and whatever follows in it, and reads each weight once, at the speed of memory. Given to a library
as a matrix product, the chosen blocks' weights would have to be gathered first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from backends.pytorch.ahead.blocks import Blocks

MATMUL = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class OneRow(TorchFunctionMode):
    """Within, products in which an operand has no rows of its own are written out."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(isinstance(a, Blocks) for a in args):
            return Blocks.__torch_function__(func, types, args, kwargs)
        if func is linear and not kwargs and _one(args[0].shape[:-1]):
            return _linear(*args)
        if func in MATMUL and args[1].ndim == 2 and _one(args[0].shape[:-1]):
            return _linear(args[0], args[1].T)
        if func is torch.einsum and len(args) == 3 and isinstance(args[1], Tensor):
            return _einsum(*args)
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    total = (x[..., None, :].float() * weight.float()).sum(-1)
    return (total if bias is None else total + bias.float()).to(x.dtype)


def _einsum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    operands, out = equation.split("->")
    left, right = operands.split(",")
    sizes = dict(zip(left + right, (*a.shape, *b.shape), strict=True))
    own = [[x for x in mine if x not in other] for mine, other in ((left, right), (right, left))]
    rows = [not _one([sizes[x] for x in letters]) for letters in own]
    repeated = len(set(left)) < len(left) or len(set(right)) < len(right)
    if all(rows) or repeated or any(x not in out for letters in own for x in letters):
        return torch.einsum(equation, a, b)
    # In the order in which the larger operand lies in memory.
    order = (left + "".join(own[1])) if rows[0] else (right + "".join(own[0]))
    product = _spread(a, left, order).float() * _spread(b, right, order).float()
    summed = [order.index(x) for x in order if x not in out]
    kept = [x for x in order if x in out]
    total = product.sum(summed) if summed else product
    return total.permute([kept.index(x) for x in out]).to(torch.result_type(a, b))


def _spread(x: Tensor, letters: str, order: str) -> Tensor:
    """The operand with an axis for each letter of ``order``; length 1 where it has none."""
    there = [letter for letter in order if letter in letters]
    x = x.permute([letters.index(letter) for letter in there])
    for axis, letter in enumerate(order):
        if letter not in letters:
            x = x.unsqueeze(axis)
    return x


def _one(sizes: Any) -> bool:
    """Is it certain that the sizes are all 1? A symbolic size never is."""
    return all(isinstance(n, int) and n == 1 for n in sizes)
