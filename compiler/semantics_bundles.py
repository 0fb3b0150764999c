"""Reference semantics of bundles, the loops over them, and the adjoints of ops that move rows.

The ops' rows and rules stand in ``compiler/bundles.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.ir import Dim, Node
from compiler.semantics import MeaningError, Named, _rows_of, _token

if TYPE_CHECKING:
    from compiler.interpret import Frame


@dataclass(frozen=True)
class Bundle(Named):
    """Several values as one: a bundle has no tensor and no axes of its own."""

    items: tuple[Named, ...] = ()

    @staticmethod
    def of(items: Sequence[Named]) -> Bundle:
        return Bundle(torch.zeros(()), (), tuple(items))

    def under(self, order: Sequence[str], names: Sequence[str]) -> Named:
        return self

    def called(self, names: Mapping[str, str]) -> Named:
        """A body's results under the caller's names; what they hand on keeps its own."""
        items = [i if isinstance(i, Bundle) else i.called(names) for i in self.items]
        return Bundle.of(items)


@dataclass(frozen=True)
class Rounds(Bundle):
    """A bundle for each number of a loop, or for each block that rows picked."""

    numbers: tuple[int, ...] = ()

    @staticmethod
    def by(items: Mapping[int, Named]) -> Rounds:
        return Rounds(torch.zeros(()), (), tuple(items.values()), tuple(items))

    def numbered(self) -> dict[int, Named]:
        return dict(zip(self.numbers, self.items, strict=True))


def _bundle(value: Named) -> Bundle:
    if not isinstance(value, Bundle):
        raise MeaningError("the value is no bundle")
    return value


def pack(node: Node, args: list[Named], frame: Frame) -> Named:
    return Bundle.of(args)


def item(node: Node, args: list[Named], frame: Frame) -> Named:
    return _bundle(args[0]).items[node.attrs["at"]]


def _round(value: Named, index: Dim, number: int, start: int) -> Named:
    """What one round of a loop reads of a value that has one for each."""
    if isinstance(value, Rounds):
        return value.numbered()[number]
    return _token(value, index.name, number - start)


def loop(node: Node, args: list[Named], frame: Frame) -> Named:
    a, index = node.attrs, node.attrs["index"]
    start, args = index.start.at(frame.sizes), list(args)
    numbers = list(range(start, start + frame.size(index)))
    carried = dict(a["carry"])
    rounds: dict[int, tuple[Named, ...]] = {}
    for number in reversed(numbers) if a["reverse"] else numbers:
        given = [
            _round(value, index, number, start) if position in a["each"] else value
            for position, value in enumerate(args)
        ]
        which = number if a["child"] else None
        result = frame.run(a["body"], given, a["child"], which, a["dims"])
        rounds[number] = _bundle(result).items
        for position, operand in carried.items():
            args[operand] = rounds[number][position]
    return Bundle.of(_gathered(node, args, frame, [rounds[n] for n in numbers], numbers))


def _gathered(
    node: Node,
    args: list[Named],
    frame: Frame,
    rounds: list[tuple[Named, ...]],
    numbers: list[int],
) -> list[Named]:
    """The results of a loop, from those of its rounds in the order of their numbers."""
    a, index = node.attrs, node.attrs["index"]
    carried, out = dict(a["carry"]), list[Named]()
    body = frame.scope.body(a["body"])
    types = [body[name].type for name in body.result.inputs]
    for position, type in enumerate(types):
        values = [results[position] for results in rounds]
        dims = tuple(dict(a["dims"]).get(d, d) for d in type.names)
        if position in carried:
            out.append(args[carried[position]])
        elif type.dtype == "bundle":
            out.append(Rounds.by(dict(zip(numbers, values, strict=True))))
        else:
            shape = [frame.size(d) for d in type.dims]
            zeros = torch.zeros(0, *shape, dtype=frame.dtype(type.dtype))
            stacked = torch.stack([v.to(dims) for v in values]) if values else zeros
            summed = position in a["sum"]
            out.append(
                Named(stacked.sum(0), dims) if summed else Named(stacked, (index.name, *dims))
            )
    return out


def route(node: Node, args: list[Named], frame: Frame) -> Named:
    a, (pick, *given) = node.attrs, args
    body = frame.scope.body(a["body"])
    rows: tuple[str, ...] = a["rows"]
    picks = pick.to(rows)
    flat = picks.reshape(-1)
    over = frame.graph[node.inputs[0]].type.of
    assert over is not None
    start = over.start.at(frame.sizes)
    inputs, results = body.inputs, [body[name] for name in body.result.inputs]
    own = {d.name for n in (*inputs, *results) for d in n.type.dims if d.kind == "rows"}
    names = {**dict(a["dims"]), **dict.fromkeys(own, "")}
    found: dict[int, tuple[list[int], tuple[Named, ...]]] = {}
    for block in flat.unique().tolist():
        mine = (flat == block).nonzero().squeeze(-1)
        chosen = []
        for position, (wanted, value) in enumerate(zip(inputs, given, strict=True)):
            if position in a["each"]:
                value = _round(value, over, start + block, start)
            if own & set(wanted.type.names):
                value = _rows_of(value, rows, picks.shape, mine)
            chosen.append(value)
        result = frame.run(
            a["body"], chosen, a["child"], start + block, names.items(), rows=len(mine)
        )
        found[start + block] = (mine.tolist(), _bundle(result).items)
    out: list[Named] = []
    for position, result_node in enumerate(results):
        type = result_node.type
        values = {number: items[position] for number, (_, items) in found.items()}
        if type.dtype == "bundle":
            out.append(Rounds.by(values))
            continue
        rest = [d for d in type.dims if d.name not in own]
        outside = tuple(names.get(d.name, d.name) for d in rest)
        shape, dtype = [frame.size(d) for d in rest], frame.dtype(type.dtype)
        if len(rest) == len(type.dims):
            total = torch.zeros(shape, dtype=dtype)
            for value in values.values():
                total = total + value.to(outside)
            out.append(Named(total, outside))
            continue
        whole = torch.zeros(flat.numel(), *shape, dtype=dtype)
        for number, value in values.items():
            whole[found[number][0]] = value.to(("", *outside)).to(dtype)
        out.append(Named(whole.reshape(*picks.shape, *shape), (*rows, *outside)))
    return Bundle.of(out)


# -- adjoints of ops that move rows ----------------------------------------------------------------


def _renamed(node: Node, value: Named, old: str, new: str, frame: Frame) -> Named:
    (before,) = (d.name for d in frame.graph.operands(node)[0].type.dims if d.kind == old)
    (after,) = (d.name for d in node.type.dims if d.kind == new)
    return Named(value.tensor, tuple(after if d == before else d for d in value.dims))


def as_history(node: Node, args: list[Named], frame: Frame) -> Named:
    if frame.step.past:
        raise MeaningError(f"{frame.step.past} positions came before: gradients take all at once")
    return _renamed(node, args[0], "time", "history", frame)


def as_time(node: Node, args: list[Named], frame: Frame) -> Named:
    value = _renamed(node, args[0], "history", "time", frame)
    (time,) = (d.name for d in node.type.dims if d.kind == "time")
    value = value.last(time)
    return Named(value.tensor[..., frame.step.past :], value.dims)


def spread_rows(node: Node, args: list[Named], frame: Frame) -> Named:
    (time,) = (d.name for d in node.type.dims if d.kind == "time")
    value = _renamed(node, args[0], "rows", "time", frame).last(time)
    return Named(_added(value.tensor, frame.step.wanted, frame.step.time), value.dims)


def spread_shift(node: Node, args: list[Named], frame: Frame) -> Named:
    a, step = node.attrs, frame.step
    (history,) = (d.name for d in node.type.dims if d.kind == "history")
    (time,) = (d for d in args[0].dims if d not in node.type.names and d != a.get("index"))
    rows = torch.arange(step.past, step.past + step.time) + a["offset"].at(frame.sizes)
    value = args[0].last(time)
    if a.get("index"):
        value = value.last(a["index"])
        rows = rows[:, None] + a["sign"] * torch.arange(value.tensor.shape[-1])
    rest = value.dims[: -rows.dim()]
    tensor = value.tensor.flatten(len(rest)).masked_fill(rows.flatten() < 0, 0)
    length = step.past + step.time
    return Named(_added(tensor, rows.flatten().clamp(min=0), length), (*rest, history))


def _added(tensor: Tensor, places: Tensor, size: int) -> Tensor:
    """The last axis's values added up at their places of an axis of ``size``."""
    zeros = torch.zeros(*tensor.shape[:-1], size, dtype=tensor.dtype)
    return zeros.index_add(-1, places, tensor)


def scatter(node: Node, args: list[Named], frame: Frame) -> Named:
    value, index = args
    into: Dim = node.attrs["into"]
    kept = [d for d in index.dims if d in node.type.names]
    summed = [d for d in index.dims if d not in kept]
    rest = [d for d in value.dims if d not in index.dims]
    shape = dict(zip(value.dims, value.tensor.shape, strict=True))
    tensor = value.to((*kept, *summed, *rest)).reshape(
        *(shape[d] for d in kept), -1, *(shape[d] for d in rest)
    )
    places = index.to((*kept, *summed)).reshape(*(shape[d] for d in kept), -1)
    places = places.reshape(*places.shape, *(1 for _ in rest)).expand(tensor.shape)
    size = frame.size(into)
    zeros = torch.zeros(
        *(shape[d] for d in kept), size, *(shape[d] for d in rest), dtype=tensor.dtype
    )
    return Named(zeros.scatter_add(len(kept), places, tensor), (*kept, into.name, *rest))
