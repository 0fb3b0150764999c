"""Lowers subscripts: each place in brackets becomes a view of the value, or a gather."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compiler.ir import Dim
from compiler.passes.build import dim_of
from dsl import typed
from dsl.extents import Extent, ExtentError
from dsl.instances import fail
from dsl.shifts import furthest

if TYPE_CHECKING:
    from compiler.passes.lower import BodyLowering


def subscripted(lower: BodyLowering, node: str, e: typed.Value) -> str:
    """``x[t,(h,n),pick[k]]``: the node that holds it."""
    held = [_held(lower, e, axis) for axis in e.axes]
    # Renames that swap names (a Gram matrix read transposed) go through names of their own.
    renamed = [
        (dim, sub)
        for dim, sub in zip(held, e.subscripts, strict=True)
        if isinstance(sub, typed.Take) and lower.dim(sub.axis).name != dim.name
    ]
    names = {d.name for d in held}
    if any(lower.dim(sub.axis).name in names for _, sub in renamed if isinstance(sub, typed.Take)):
        for position, (dim, sub) in enumerate(zip(held, e.subscripts, strict=True)):
            if isinstance(sub, typed.Take) and lower.dim(sub.axis).name == dim.name:
                continue
            aside = Dim(f"{dim.name}~", dim.size, dim.kind, dim.form, dim.parts, dim.start)
            node = lower.view("rename", node, [dim.name], [aside], e.span, dim=dim.name, to=aside)
            held[position] = aside
    for axis, dim, sub in zip(e.axes, held, e.subscripts, strict=True):
        if isinstance(sub, typed.Part) and isinstance(axis, typed.Index) and axis.alias is not None:
            whole = _held(lower, e, axis.alias)  # an index that stands for a sum
            node = lower.view("rename", node, [dim.name], [whole], e.span, dim=dim.name, to=whole)
            dim = whole
        node = _apply(lower, node, dim, sub, e)
    return node


def _held(lower: BodyLowering, e: typed.Value, axis: typed.Axis) -> Dim:
    """The dim that stands for a declared axis: parameters keep the block's own names."""
    stored = e.role in ("param", "state")
    return dim_of(lower.instance, axis) if stored else lower.dim(axis)


def _apply(lower: BodyLowering, node: str, dim: Dim, sub: typed.Sub, e: typed.Value) -> str:
    match sub:
        case typed.Take(axis=axis):
            to = lower.dim(axis)
            if to.name == dim.name:
                return node
            return lower.view("rename", node, [dim.name], [to], e.span, dim=dim.name, to=to)
        case typed.Part(part=part, inner=inner):
            own = _part_dim(lower, dim, part, e)
            node = lower.view("part", node, [dim.name], [own], e.span, dim=dim.name, part=own.name)
            return _apply(lower, node, own, inner, e)
        case typed.Split(axes=axes, inner=inners):
            parts = dim.parts if dim.form == "product" else tuple(_held(lower, e, a) for a in axes)
            taken = set(lower.type(node).names) - {dim.name}
            into = tuple(_free(d, taken) for d in parts)
            node = lower.view(
                "unflatten", node, [dim.name], list(into), e.span, dim=dim.name, into=into
            )
            for own, inner in zip(into, inners, strict=True):
                node = _apply(lower, node, own, inner, e)
            return node
        case typed.At(value=value, scope=scope):
            at = lower.number(value, scope)
            size = dim.size.at(lower.elaborator.instances.sizes)
            if not isinstance(at, int) or isinstance(at, bool) or not 0 <= at < size:
                text = f"'{dim.name}' runs from 0 to {size - 1}, and this is {at}"
                raise fail("E0401", text, value.span)
            return lower.view("select", node, [dim.name], [], e.span, dim=dim.name, at=at)
        case typed.Shift():
            return _shift(lower, node, dim, sub, e)
        case typed.Pick(value=value):
            f32, lower.f32 = lower.f32, False
            index = lower.expr(value)
            lower.f32 = f32
            type = lower.type(node)
            shared = {d.name for d in type.dims}
            new = [d for d in lower.type(index).dims if d.name not in shared]
            dims = []
            for d in type.dims:
                dims += new if d.name == dim.name else [d]
            lead = [d for d in dims if d in lower.lifted.values()]
            dims = [*lead, *[d for d in dims if d not in lead]]
            return lower.emit(
                "gather", (node, index), dims, type.dtype, e.span, type.of, dim=dim.name
            )
    raise AssertionError(sub)


def _shift(lower: BodyLowering, node: str, dim: Dim, sub: typed.Shift, e: typed.Value) -> str:
    into = [lower.dim(sub.time)]
    attrs = {"history": dim.name, "sign": sub.sign, "offset": _offset(lower, sub)}
    if sub.index is not None:
        into.append(lower.dim(sub.index))
        attrs["index"] = into[1].name
    return lower.view("shift", node, [dim.name], into, e.span, **attrs)


def _offset(lower: BodyLowering, shift: typed.Shift) -> Extent:
    """How many tokens after its time a shift begins, which is none."""
    sizes = lower.elaborator.instances.sizes
    try:
        ahead = lower.extent(furthest(shift)).at(sizes)
        lower.extent(shift.offset).at(sizes)
    except ExtentError as error:
        raise fail(
            "E0412", f"this is no token before '{shift.time}': {error}", shift.span
        ) from None
    if ahead > 0:
        text = f"nothing is read after '{shift.time}': this reaches {ahead} ahead"
        raise fail("E0412", text, shift.span)
    return lower.extent(shift.offset)


def _part_dim(lower: BodyLowering, dim: Dim, part: typed.Axis, e: typed.Value) -> Dim:
    wanted = _held(lower, e, part)
    return next((p for p in dim.parts if p.name == wanted.name), wanted)


def _free(dim: Dim, taken: set[str]) -> Dim:
    if dim.name not in taken:
        return dim
    return Dim(f"{dim.name}~", dim.size, dim.kind, dim.form, dim.parts, dim.start)
