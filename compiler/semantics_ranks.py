"""Reference semantics of what ranks do together: each op as its definition says, in plain torch.

Ranks are threads of one process (``compiler/ranked.py``), and they exchange whole values: nothing
here says how few bytes a real rank may send.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.ir import Node
from compiler.semantics import MeaningError, Named

if TYPE_CHECKING:
    from compiler.interpret import Frame
    from compiler.ranked import Member

Fold = Callable[[Tensor, Tensor], Tensor]
FOLDS: Mapping[str, Fold] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


def _member(frame: Frame) -> Member:
    member: Member | None = frame.interpreter.member
    if member is None:
        raise MeaningError("this is run by the ranks of a mesh together (compiler/ranked.py)")
    return member


def all_reduce(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    parts = _member(frame).exchange(node.attrs["axes"], value.tensor)
    fn = node.attrs["fn"]
    total: Tensor = reduce(FOLDS["sum" if fn == "mean" else fn], parts)
    return Named(total / len(parts) if fn == "mean" else total, value.dims)


def wait(node: Node, args: list[Named], frame: Frame) -> Named:
    return args[0]  # here, what is started is done at once


def part_of(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    member, axes = _member(frame), node.attrs["axes"]
    axis = value.axis(node.attrs["dim"])
    parts = value.tensor.chunk(member.ways(axes), axis)
    return Named(parts[member.index(axes)], _now(node, value))


def reduce_scatter(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    total = sum(_member(frame).exchange(node.attrs["axes"], value.tensor))
    assert isinstance(total, Tensor)
    return part_of(node, [Named(total, value.dims)], frame)


def all_gather(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    parts = _member(frame).exchange(node.attrs["axes"], value.tensor)
    return Named(torch.cat(parts, value.axis(node.attrs["dim"])), _now(node, value))


def _now(node: Node, value: Named) -> tuple[str, ...]:
    """The operand's dims, the one that the op changes under its new name."""
    (new,) = (d.name for d in node.type.dims if d.name not in value.dims)
    return tuple(new if d == node.attrs["dim"] else d for d in value.dims)


def gather_part(node: Node, args: list[Named], frame: Frame) -> Named:
    table, index = args
    dim, member = node.attrs["dim"], _member(frame)
    size = table.tensor.shape[table.axis(dim)]
    first = member.index(node.attrs["axes"]) * size
    shared = [d for d in table.dims if d in index.dims]
    rest = [d for d in table.dims if d not in shared and d != dim]
    own = [d for d in index.dims if d not in shared]
    wide = index.to([*shared, *own]) - first
    here = (wide >= 0) & (wide < size)
    rows = table.to([*shared, dim, *rest]).flatten(0, len(shared))
    lead = prod(wide.shape[: len(shared)])
    flat = torch.where(here, wide, 0).reshape(lead, -1) + torch.arange(lead)[:, None] * size
    found = rows[flat].reshape(*wide.shape, *rows.shape[1:])
    kept = torch.where(here.reshape(*here.shape, *[1] * len(rest)), found, 0)
    return Named(kept, (*shared, *own, *rest))


# -- tokens that are sent --------------------------------------------------------------------------

Row = tuple[int, int]  # of which rank along the axes, which of its picks


def _rows(node: Node, frame: Frame, pick: Named) -> list[Row]:
    """The picks that this rank has the blocks of, by rank and then in order; of ``routing``."""
    member, a = _member(frame), node.attrs
    assert node.type.of is not None
    each = frame.size(node.type.of)
    first = member.index(a["axes"]) * each
    picks = member.exchange(a["sent"], pick.tensor.flatten())
    return [
        (rank, place)
        for rank, flat in enumerate(picks)
        for place, block in enumerate(flat.tolist())
        if first <= block < first + each
    ]


def routing(node: Node, args: list[Named], frame: Frame) -> Named:
    pick = args[0]
    member = _member(frame)
    assert node.type.of is not None
    first = member.index(node.attrs["axes"]) * frame.size(node.type.of)
    picks = member.exchange(node.attrs["sent"], pick.tensor.flatten())
    rows = [int(picks[rank][place]) - first for rank, place in _rows(node, frame, pick)]
    return Named(torch.tensor(rows, dtype=torch.int64), node.type.names)


def dispatch(node: Node, args: list[Named], frame: Frame) -> Named:
    _, pick, x = args
    route = frame.graph[node.inputs[0]]
    rest = [d for d in x.dims if d not in pick.dims]
    wide = x.to([*pick.dims, *rest])
    wide = wide.expand(*pick.tensor.shape, *wide.shape[len(pick.dims) :])
    values = _member(frame).exchange(route.attrs["sent"], wide.flatten(0, len(pick.dims) - 1))
    rows = [values[rank][place] for rank, place in _rows(route, frame, pick)]
    made = torch.stack(rows) if rows else values[0][:0]
    return Named(made, (*route.type.names, *rest))


def combine(node: Node, args: list[Named], frame: Frame) -> Named:
    _, pick, gate, y = args
    route, member = frame.graph[node.inputs[0]], _member(frame)
    (row,) = route.type.names
    rest = [d for d in y.dims if d != row]
    out = y.to([row, *rest])
    sent = route.attrs["sent"]
    me = member.index(sent)
    total = out.new_zeros(pick.tensor.numel(), *out.shape[1:])
    for rows, values in member.exchange(sent, (_rows(route, frame, pick), out)):
        for (rank, place), value in zip(rows, values, strict=True):
            if rank == me:
                total[place] += value
    total = total.reshape(*pick.tensor.shape, *out.shape[1:])
    weight = gate.to(pick.dims)
    weighted = total * weight.reshape(*weight.shape, *[1] * len(rest))
    dims = [d for d in pick.dims if d != node.attrs["picks"]]
    return Named(weighted.sum(pick.axis(node.attrs["picks"])), (*dims, *rest))
