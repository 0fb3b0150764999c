"""Reference semantics of the ops on coded values.

The interpreter holds a coded value as what it stands for, code x scale: in float64 that product is
exact, in float32 it is rounded once. So views and products need nothing of their own here.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler import numerics
from compiler.coding import Coding
from compiler.ir import Node

if TYPE_CHECKING:
    from compiler.interpret import Frame
    from compiler.semantics import Named


def represented(tensor: Tensor, dims: Sequence[str], coding: Coding) -> Tensor:
    """What a value stands for once it is quantised, its dims as they were."""
    rows = [i for i, d in enumerate(dims) if d not in coding.over]
    columns = [dims.index(d) for d in coding.over]
    order = [*rows, *columns]
    moved = tensor.permute(order)
    matrix = moved.reshape(prod(moved.shape[: len(rows)]), prod(moved.shape[len(rows) :]))
    found = numerics.represented(matrix, coding).to(tensor.dtype).reshape(moved.shape)
    return found.permute([order.index(i) for i in range(len(order))])


def stored(weight: Tensor, coding: Coding) -> Tensor:
    """What a parameter stands for: rows are its first axis, columns the others."""
    matrix = weight.reshape(weight.shape[0], -1) if weight.ndim > 1 else weight[None]
    return numerics.represented(matrix, coding).to(weight.dtype).reshape(weight.shape)


def quantize(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    named = type(value)
    return named(represented(value.tensor, value.dims, node.attrs["coding"]), value.dims)


def dequantize(node: Node, args: list[Named], frame: Frame) -> Named:
    return args[0]


def scaled_contract(node: Node, args: list[Named], frame: Frame) -> Named:
    named = type(args[0])
    codings = node.attrs.get("quantises") or (None,) * len(args)
    values = [
        named(represented(a.tensor, a.dims, coding), a.dims) if coding else a
        for a, coding in zip(args, codings, strict=True)
    ]
    dims = tuple(dict.fromkeys(name for value in values for name in value.dims))
    over = node.attrs["over"]
    left = tuple(d for d in dims if d not in over)
    letter = dict(zip(dims, string.ascii_letters, strict=False))
    # The sum over all summed dims as one, some elements of it at a time.
    whole = [v.tensor.to(frame.dtype("f32")) for v in values]
    if len(over) != 1 or not node.attrs.get("promote"):
        equation = ",".join("".join(letter[d] for d in v.dims) for v in values)
        return named(torch.einsum(f"{equation}->{''.join(letter[d] for d in left)}", *whole), left)
    total = None
    size = max(w.shape[v.dims.index(over[0])] for w, v in zip(whole, values, strict=True))
    equation = ",".join("".join(letter[d] for d in v.dims) for v in values)
    for start in range(0, max(size, 1), node.attrs["promote"]):
        parts = [
            w.narrow(v.dims.index(over[0]), start, min(node.attrs["promote"], size - start))
            if over[0] in v.dims
            else w
            for w, v in zip(whole, values, strict=True)
        ]
        part = torch.einsum(f"{equation}->{''.join(letter[d] for d in left)}", *parts)
        total = part if total is None else total + part
    assert total is not None
    return named(total, left)
