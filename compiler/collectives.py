"""Type rules of what ranks do together: reduce, gather, take their part, send tokens.

A value's type is one rank's. ``divided`` and ``whole`` go between a dim and a rank's part of it;
``docs/sharding.md`` tells the whole story.
"""

from __future__ import annotations

from dataclasses import replace

from compiler.ir import Dim, Node, Type
from compiler.rules import Scope, dim_of, join, need, union, without
from dsl.extents import Extent

Axes = tuple[str, ...]


def ranks(axes: Axes) -> Extent:
    """How many ranks stand along these axes together."""
    size = Extent.of(1)
    for axis in axes:
        size = size * Extent.name(f"ranks.{axis}")
    return size


def divided(dim: Dim, axes: Axes, redundant: int = 0) -> Dim:
    """One rank's part of a dim: ``h`` over tp is ``h/tp``. ``redundant`` entries come on top."""
    if not axes:
        return dim
    size = (dim.size + redundant) / ranks(axes)
    return replace(
        dim, name=f"{dim.name}/{'.'.join(axes)}", size=size, form="atom", parts=(), axes=axes
    )


def whole(dim: Dim) -> Dim:
    """The dim that one is a part of."""
    if not dim.axes:
        return dim
    name = dim.name.removesuffix(f"/{'.'.join(dim.axes)}")
    return replace(dim, name=name, size=dim.size * ranks(dim.axes), axes=())


def _other(type: Type, old: Dim, new: Dim) -> Type:
    return replace(type, dims=tuple(new if d.name == old.name else d for d in type.dims))


def all_reduce(node: Node, operands: list[Node], scope: Scope) -> Type:
    return operands[0].type


def wait(node: Node, operands: list[Node], scope: Scope) -> Type:
    (started,) = operands
    need(bool(started.attrs.get("starts")), f"%{started.name} is not started, but done")
    return started.type


def reduce_scatter(node: Node, operands: list[Node], scope: Scope) -> Type:
    return part(node, operands, scope)


def part(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim = dim_of(operand.type, node.attrs["dim"])
    return _other(operand.type, dim, divided(dim, node.attrs["axes"]))


def all_gather(node: Node, operands: list[Node], scope: Scope) -> Type:
    (operand,) = operands
    dim = dim_of(operand.type, node.attrs["dim"])
    need(bool(dim.axes), f"dim {dim.name} is whole")
    need(dim.axes == node.attrs["axes"], f"dim {dim.name} is not divided over {node.attrs['axes']}")
    return _other(operand.type, dim, whole(dim))


def gather_part(node: Node, operands: list[Node], scope: Scope) -> Type:
    table, index = operands
    dim = dim_of(table.type, node.attrs["dim"])
    need(bool(dim.axes), f"dim {dim.name} is whole")
    of = index.type.of
    need(of is not None and of.size == whole(dim).size, f"the index is of {of}, not of {dim.name}")
    left = Type(table.type.dtype, without(table.type, dim.name))
    return Type(table.type.dtype, union([left, index.type]))


def route(node: Node, operands: list[Node], scope: Scope) -> Type:
    """Which of a rank's own blocks each row that it gets is for."""
    pick, gate = operands
    need(set(gate.type.names) <= set(pick.type.names), f"a gate {gate.type} for picks {pick.type}")
    need(pick.type.of is not None, f"a pick indexes an array of blocks, not {pick.type}")
    assert pick.type.of is not None
    own = divided(pick.type.of, node.attrs["axes"], node.attrs["redundant"])
    return Type("i64", (_row(node),), of=own)


def dispatch(node: Node, operands: list[Node], scope: Scope) -> Type:
    sent, pick, x = operands
    rows = set(pick.type.names)
    left = tuple(d for d in x.type.dims if d.name not in rows)
    return replace(x.type, dims=(*sent.type.dims, *left))


def combine(node: Node, operands: list[Node], scope: Scope) -> Type:
    sent, pick, gate, y = operands
    left = without(y.type, *sent.type.names)
    rows = without(pick.type, node.attrs["picks"])
    dtype = join([gate, y])
    return Type(dtype, (*rows, *left))


def _row(node: Node) -> Dim:
    (row,) = node.type.dims if len(node.type.dims) == 1 else (None,)
    if row is None or row.kind != "rows":
        need(False, f"rows that were sent lie along one dim of kind rows, not {node.type}")
    assert row is not None
    return row
