"""Reference semantics: what each op of ``compiler/spec.py`` means, in torch.

One function per op, as plain as it can be: the oracle that passes and backends are held against,
not something fast. Values are *named* tensors; a function returns its result with the dims in any
order, and the interpreter puts them into the order of the node's type, converts the element type
and rounds. This is the only module of ``compiler/`` that imports torch when it is loaded, together
with the interpreter, which imports it.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compiler.ir import Dim, Node
from compiler.semantics_coded import dequantize, quantize, scaled_contract  # noqa: F401
from compiler.signatures import block_rows
from compiler.spec import holds

if TYPE_CHECKING:
    from compiler.interpret import Frame


class MeaningError(Exception):
    """The run's values do not allow what the node asks for; the interpreter adds the place."""


@dataclass(frozen=True)
class Named:
    """A tensor and the names of its axes."""

    tensor: Tensor
    dims: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.tensor.dim() != len(self.dims):
            raise MeaningError(f"a tensor {list(self.tensor.shape)} for dims {self.dims}")

    def axis(self, name: str) -> int:
        return self.dims.index(name)

    def to(self, dims: Sequence[str]) -> Tensor:
        """The tensor with its axes in this order; an axis it lacks has length 1."""
        lost = set(self.dims) - set(dims)
        if lost:
            raise MeaningError(f"dims {sorted(lost)} are lost")
        tensor = self.tensor.permute([self.axis(d) for d in dims if d in self.dims])
        for axis, name in enumerate(dims):
            if name not in self.dims:
                tensor = tensor.unsqueeze(axis)
        return tensor

    def under(self, order: Sequence[str], names: Sequence[str]) -> Named:
        """The axes in this order, under other names: what a body calls its argument's."""
        return Named(self.to(order), tuple(names))

    def called(self, names: Mapping[str, str]) -> Named:
        """The same with other names for some axes."""
        return Named(self.tensor, tuple(names.get(d, d) for d in self.dims))

    def last(self, name: str) -> Named:
        """The same with this axis last."""
        dims = (*(d for d in self.dims if d != name), name)
        return Named(self.to(dims), dims)


def union(values: Iterable[Named]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for value in values for name in value.dims))


# -- sources ---------------------------------------------------------------------------------------


def input(node: Node, args: list[Named], frame: Frame) -> Named:
    return frame.arguments[node.attrs["name"]]


def position(node: Node, args: list[Named], frame: Frame) -> Named:
    (dim,) = node.type.dims
    past, time = frame.step.past, frame.step.time
    start = 0 if dim.kind == "history" else past
    return Named(torch.arange(start, past + time), (dim.name,))


def param(node: Node, args: list[Named], frame: Frame) -> Named:
    return Named(frame.parameter(node.attrs["param"], node.type), node.type.names)


def constant(node: Node, args: list[Named], frame: Frame) -> Named:
    return Named(torch.tensor(node.attrs["value"], dtype=frame.dtype(node.type.dtype)), ())


def iota(node: Node, args: list[Named], frame: Frame) -> Named:
    (dim,) = node.type.dims
    return Named(torch.arange(frame.size(dim)), (dim.name,))


# -- arithmetic ------------------------------------------------------------------------------------

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "neg": torch.neg,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "abs": torch.abs,
    "floor": torch.floor,
    "ceil": torch.ceil,
    "min": torch.minimum,
    "max": torch.maximum,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
}


REDUCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "max": torch.amax,
    "min": torch.amin,
}


def map(node: Node, args: list[Named], frame: Frame) -> Named:
    dims = union(args)
    operands = [a.to(dims) for a in args]
    # The operands meet in the dtype of the result, or in their own widest where that is a bool.
    dtype = frame.dtype(node.type.dtype)
    if node.attrs["fn"] == "where":
        where, then, otherwise = operands
        return Named(torch.where(where, then.to(dtype), otherwise.to(dtype)), dims)
    if node.type.dtype == "bool":
        dtype = operands[0].dtype
        for operand in operands[1:]:
            dtype = torch.promote_types(dtype, operand.dtype)
    return Named(FUNCTIONS[node.attrs["fn"]](*(o.to(dtype) for o in operands)), dims)


def contract(node: Node, args: list[Named], frame: Frame) -> Named:
    dims = union(args)
    left = tuple(d for d in dims if d not in node.attrs["over"])
    letter = dict(zip(dims, string.ascii_letters, strict=False))
    dtype = frame.dtype(node.type.dtype)
    equation = ",".join("".join(letter[d] for d in a.dims) for a in args)
    equation += "->" + "".join(letter[d] for d in left)
    return Named(torch.einsum(equation, *(a.tensor.to(dtype) for a in args)), left)


def reduce(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    axes = [value.axis(name) for name in node.attrs["over"]]
    left = tuple(d for d in value.dims if d not in node.attrs["over"])
    tensor = value.tensor.to(frame.dtype(node.type.dtype))
    if not axes:
        return value
    return Named(REDUCTIONS[node.attrs["fn"]](tensor, dim=axes), left)


def softmax(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    tensor, axis = value.tensor.to(frame.dtype("f32")), value.axis(node.attrs["over"])
    # A row that sees nothing is all -inf: it gives 0 rather than 0/0.
    sees = (tensor > -math.inf).any(axis, keepdim=True)
    return Named(torch.where(sees, torch.softmax(tensor, axis), torch.zeros(())), value.dims)


def cast(node: Node, args: list[Named], frame: Frame) -> Named:
    return args[0]


# -- choosing --------------------------------------------------------------------------------------


def _ranked(node: Node, value: Named) -> tuple[Named, Tensor]:
    """The operand with the chosen dim last, and the positions along it, largest value first.

    A stable sort, so that ties go to the lowest index.
    """
    value = value.last(node.attrs["over"])
    return value, torch.argsort(value.tensor, dim=-1, descending=True, stable=True)


def _top(node: Node, value: Named, frame: Frame) -> tuple[Named, Tensor]:
    value, order = _ranked(node, value)
    count = frame.size(node.type.dim(node.attrs["to"]))
    if count > order.shape[-1]:
        raise MeaningError(f"the {count} largest of {order.shape[-1]}")
    return value, order[..., :count]


def top(node: Node, args: list[Named], frame: Frame) -> Named:
    value, order = _top(node, args[0], frame)
    return Named(value.tensor.gather(-1, order), (*value.dims[:-1], node.attrs["to"]))


def argtop(node: Node, args: list[Named], frame: Frame) -> Named:
    value, order = _top(node, args[0], frame)
    return Named(order, (*value.dims[:-1], node.attrs["to"]))


def in_top(node: Node, args: list[Named], frame: Frame) -> Named:
    value, order = _ranked(node, args[0])
    count = node.attrs["count"].at(frame.sizes)
    chosen = torch.zeros_like(value.tensor, dtype=torch.bool)
    chosen = chosen.scatter(-1, order[..., :count], True)  # all, where there are fewer
    return Named(chosen & (value.tensor > -math.inf), value.dims)


def gather(node: Node, args: list[Named], frame: Frame) -> Named:
    """out[index dims, rest] = table[dim = index]; a dim that both have is aligned."""
    table, index = args
    dim = node.attrs["dim"]
    size = table.tensor.shape[table.axis(dim)]
    if index.tensor.numel() and not 0 <= int(index.tensor.min()) <= int(index.tensor.max()) < size:
        raise MeaningError(f"an index outside 0 .. {size}")
    rest = tuple(d for d in table.dims if d != dim and d not in index.dims)
    dims = index.dims + rest
    picks = index.to(dims)
    axes: list[Tensor] = []
    for name in table.dims:
        if name == dim:
            axes.append(picks)
        else:
            along = torch.arange(table.tensor.shape[table.axis(name)])
            axes.append(Named(along, (name,)).to(dims))
    return Named(table.tensor[tuple(axes)], dims)


# -- views -----------------------------------------------------------------------------------------


def flatten(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    joined, into = node.attrs["dims"], node.attrs["into"]
    rest = tuple(d for d in value.dims if d not in joined)
    tensor = value.to((*rest, *joined))
    return Named(tensor.reshape(*tensor.shape[: len(rest)], frame.size(into)), (*rest, into.name))


def unflatten(node: Node, args: list[Named], frame: Frame) -> Named:
    value = args[0].last(node.attrs["dim"])
    into = node.attrs["into"]
    shape = [*value.tensor.shape[:-1], *(frame.size(d) for d in into)]
    return Named(value.tensor.reshape(shape), (*value.dims[:-1], *(d.name for d in into)))


def part(node: Node, args: list[Named], frame: Frame) -> Named:
    operand = frame.graph.operands(node)[0].type.dim(node.attrs["dim"])
    value = args[0].last(operand.name)
    name = node.attrs["part"]
    start = operand.offset(name).at(frame.sizes)
    size = next(frame.size(p) for p in operand.parts if p.name == name)
    return Named(value.tensor[..., start : start + size], (*value.dims[:-1], name))


def select(node: Node, args: list[Named], frame: Frame) -> Named:
    value = args[0].last(node.attrs["dim"])
    return Named(value.tensor[..., node.attrs["at"]], value.dims[:-1])


def rename(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    old, new = node.attrs["dim"], node.attrs["to"].name
    return Named(value.tensor, tuple(new if d == old else d for d in value.dims))


def expand(node: Node, args: list[Named], frame: Frame) -> Named:
    (value,) = args
    new: tuple[Dim, ...] = node.attrs["dims"]
    tensor = value.tensor.expand(*(frame.size(d) for d in new), *value.tensor.shape)
    return Named(tensor, (*(d.name for d in new), *value.dims))


def concat(node: Node, args: list[Named], frame: Frame) -> Named:
    dim: Dim = node.attrs["dim"]
    rest = tuple(d for d in args[0].dims if d != dim.parts[0].name)
    dtype = frame.dtype(node.type.dtype)
    parts = [a.to((*rest, p.name)).to(dtype) for a, p in zip(args, dim.parts, strict=True)]
    return Named(torch.cat(parts, dim=-1), (*rest, dim.name))


def stack(node: Node, args: list[Named], frame: Frame) -> Named:
    dims, dtype = args[0].dims, frame.dtype(node.type.dtype)
    stacked = torch.stack([a.to(dims).to(dtype) for a in args], dim=-1)
    return Named(stacked, (*dims, node.attrs["dim"].name))


def select_rows(node: Node, args: list[Named], frame: Frame) -> Named:
    (time,) = set(frame.graph.operands(node)[0].type.names) - set(node.type.names)
    (rows,) = (d.name for d in node.type.dims if d.kind == "rows" and d.name not in args[0].dims)
    value = args[0].last(time)
    return Named(value.tensor[..., frame.step.wanted], (*value.dims[:-1], rows))


# -- state, and other bodies -----------------------------------------------------------------------


def cache(node: Node, args: list[Named], frame: Frame) -> Named:
    (history,) = (d.name for d in node.type.dims if d.kind == "history")
    (time,) = (d.name for d in frame.graph.operands(node)[0].type.dims if d.kind == "time")
    new = args[0].last(time)
    stored = frame.append(node.attrs["name"], frame.rounded(new.tensor, node))
    return Named(stored, (*new.dims[:-1], history))


def shift(node: Node, args: list[Named], frame: Frame) -> Named:
    a, step = node.attrs, frame.step
    value = args[0].last(a["history"])
    (time,) = (d.name for d in node.type.dims if d.kind == "time")
    rows = torch.arange(step.past, step.past + step.time) + a["offset"].at(frame.sizes)
    dims: tuple[str, ...] = (time,)
    if a.get("index"):
        places = torch.arange(frame.size(node.type.dim(a["index"])))
        rows, dims = rows[:, None] + a["sign"] * places, (time, a["index"])
    length = value.tensor.shape[-1]
    if int(rows.max()) >= length:
        raise MeaningError(f"token {int(rows.max())} of {length}")
    found = value.tensor[..., rows.clamp(min=0)]
    return Named(found.masked_fill(rows < 0, 0), (*value.dims[:-1], *dims))


def scan(node: Node, args: list[Named], frame: Frame) -> Named:
    a = node.attrs
    (time,) = (d.name for d in node.type.dims if d.kind == "time")
    before = frame.scope.body(a["body"]).inputs[0].type
    shape = [frame.size(d) for d in before.dims]
    start = args[0].to(before.names) if args[0].dims else args[0].tensor
    state = frame.recalled(a["name"], Named(start.expand(shape), before.names))
    made: list[Named] = []
    traces: list[dict[str, Tensor]] = []
    for token in range(frame.step.time):
        here = [_token(value, time, token) for value in args]
        inside = frame.traced_alone()
        if inside.step.trace is not None:
            traces.append(inside.step.trace)
        given = [here[i] for i in a["given"]]
        state = inside.run(a["body"], [state, *given])
        read = a.get("read")
        made.append(inside.run(read, [state, *(here[i] for i in a["asked"])]) if read else state)
    frame.keep(a["name"], state, traces)
    dims = made[0].dims
    return Named(torch.stack([value.to(dims) for value in made]), (time, *dims))


def _token(value: Named, time: str, token: int) -> Named:
    if time not in value.dims:
        return value
    value = value.last(time)
    return Named(value.tensor[..., token], value.dims[:-1])


def call(node: Node, args: list[Named], frame: Frame) -> Named:
    a = node.attrs
    return frame.run(a["body"], args, a["child"], dims=a["dims"])


def chain(node: Node, args: list[Named], frame: Frame) -> Named:
    a, index = node.attrs, node.attrs["index"]
    x, *extras = args
    start, dims = index.start.at(frame.sizes), a.get("dims", ())
    for number in range(start, start + frame.size(index)):
        x = frame.run(a["body"], [x, *extras], a["child"], number, dims=dims)
    return x


def apply(node: Node, args: list[Named], frame: Frame) -> Named:
    """Each distinct block runs once, on the rows that picked it (which lie along a dim "")."""
    a, (pick, *given) = node.attrs, args
    body = frame.scope.body(a["body"])
    own = block_rows(body)
    rows: tuple[str, ...] = a["rows"]
    picks = pick.to(rows)
    flat = picks.reshape(-1)
    over = frame.graph[node.inputs[0]].type.of
    assert over is not None
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) < frame.size(over):
        raise MeaningError(f"a pick outside 0 .. {frame.size(over)}")
    rest = tuple(d for d in node.type.dims if d.name not in rows)
    dims = ("", *(d.name for d in rest))
    out = torch.zeros(
        flat.numel(), *(frame.size(d) for d in rest), dtype=frame.dtype(node.type.dtype)
    )
    for block in flat.unique().tolist():
        mine = (flat == block).nonzero().squeeze(-1)
        chosen = [
            _rows_of(value, rows, picks.shape, mine) if own in wanted.type.names else value
            for wanted, value in zip(body.inputs, given, strict=True)
        ]
        number = over.start.at(frame.sizes) + block
        result = frame.run_block(a["body"], chosen, a["child"], number, a["dims"], len(mine))
        out[mine] = result.to(dims).to(out.dtype)
    return Named(out.reshape(*picks.shape, *out.shape[1:]), (*rows, *dims[1:]))


def _rows_of(value: Named, rows: tuple[str, ...], shape: torch.Size, mine: Tensor) -> Named:
    """The chosen rows of an argument, along a dim called ""; it is the same along rows it lacks."""
    rest = tuple(d for d in value.dims if d not in rows)
    tensor = value.to((*rows, *rest))
    tensor = tensor.expand(*shape, *tensor.shape[len(rows) :]).flatten(0, len(rows) - 1)
    return Named(tensor[mine], ("", *rest))


def branch(node: Node, args: list[Named], frame: Frame) -> Named:
    then = holds(node.attrs["when"], frame.sizes)
    if frame.step.branches != "guard":
        then = frame.step.branches == "then"
    return frame.run(node.attrs["then" if then else "otherwise"], args)


def composite(node: Node, args: list[Named], frame: Frame) -> Named:
    return frame.run(node.attrs["body"], args)
