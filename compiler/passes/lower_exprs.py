"""Lowers the built-in forms of an expression: products, reducers, choices, stacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compiler.ir import Dim
from dsl import typed
from dsl.diagnostics import Span
from dsl.extents import Extent, ExtentError
from dsl.instances import fail

if TYPE_CHECKING:
    from compiler.passes.lower import BodyLowering

FLOATS = ("act", "f32")


def contraction(lower: BodyLowering, e: typed.Contraction) -> str:
    """Factors that share a summed index are contracted; the others multiply the result."""
    over = tuple(lower.dim(a).name for a in e.over)
    nodes = [(lower.expr(f.value), f.divides) for f in e.factors]
    summed = [n for n in nodes if set(lower.type(n[0]).names) & set(over)]
    rest = [n for n in nodes if n not in summed]
    result: str | None = None
    if summed:
        factors = tuple(
            lower.map("div", (lower.constant(1.0, e.span), n), e.span) if divides else n
            for n, divides in summed
        )
        dims = tuple(d for d in lower.union(*factors) if d.name not in over)
        dtype = lower.builder.dtype(*factors)
        if dtype not in FLOATS:
            factors = tuple(to_float(lower, f, e.span) for f in factors)
            dtype = "f32"
        result = lower.emit("contract", factors, dims, dtype, e.span, over=over)
    for node, divides in rest:
        if result is None:
            result = (
                lower.map("div", (lower.constant(1.0, e.span), node), e.span) if divides else node
            )
        else:
            result = lower.map("div" if divides else "mul", (result, node), e.span)
    assert result is not None
    return result


def to_float(lower: BodyLowering, node: str, span: Span) -> str:
    type = lower.type(node)
    return node if type.dtype in FLOATS else lower.emit("cast", (node,), type.dims, "f32", span)


def reduce(lower: BodyLowering, e: typed.Reduce) -> str:
    node = lower.expr(e.arg)
    over = tuple(lower.dim(a).name for a in e.over)
    type = lower.type(node)
    dtype = "f32" if e.fn == "mean" and type.dtype == "i64" else type.dtype
    dims = [d for d in type.dims if d.name not in over]
    return lower.emit("reduce", (node,), dims, dtype, e.span, fn=e.fn, over=over)


def choice(lower: BodyLowering, e: typed.Choice) -> str:
    node = lower.expr(e.arg)
    over = lower.dim(e.over)
    parts: tuple[Dim, ...] = ()
    if over.name not in lower.type(node).names:
        assert isinstance(e.over.alias, typed.Product)
        parts = tuple(lower.dim(p) for p in e.over.alias.parts)
        names = tuple(p.name for p in parts)
        node = lower.view("flatten", node, list(names), [over], e.span, dims=names, into=over)
    type = lower.type(node)
    if e.fn == "softmax":
        node = to_float(lower, node, e.span)
        return lower.emit(
            "softmax", (node,), type.dims, lower.type(node).dtype, e.span, over=over.name
        )
    if e.fn == "in_top":
        assert e.count is not None
        instances = lower.elaborator.instances
        number = lower.number(e.count, e.scope)
        count = lower.extent(instances.extent_of(e.count, lower.instance, number))
        _enough(lower, e, over, count)
        node = lower.emit("in_top", (node,), type.dims, "bool", e.span, over=over.name, count=count)
        if parts:
            node = lower.view(
                "unflatten", node, [over.name], list(parts), e.span, dim=over.name, into=parts
            )
        return node
    assert e.to is not None
    to = lower.dim(e.to)
    _enough(lower, e, over, to.size)
    dims = tuple(to if d.name == over.name else d for d in type.dims)
    if e.fn == "top":
        return lower.emit("top", (node,), dims, type.dtype, e.span, over=over.name, to=to.name)
    return lower.emit("argtop", (node,), dims, "i64", e.span, over, over=over.name, to=to.name)


def _enough(lower: BodyLowering, e: typed.Choice, over: Dim, count: Extent) -> None:
    """Nothing chooses more than there is. How many positions a history has, only a run knows."""
    sizes = lower.elaborator.instances.sizes
    if over.kind != "plain":
        return
    try:
        chosen, there = count.at(sizes), over.size.at(sizes)
    except ExtentError as error:
        raise fail("E0304", str(error), e.span) from None
    if chosen > there:
        text = f"{e.fn} cannot choose {chosen} of the {there} of '{over.name}'"
        raise fail("E0304", text, e.span)


def join(lower: BodyLowering, e: typed.Join) -> str:
    nodes = [lower.expr(a) for a in e.args]
    axis = lower.dim(e.axis)
    dims = tuple(d for d in lower.union(*nodes) if d not in axis.parts)
    filled = []
    for number, node in enumerate(nodes):
        own = (axis.parts[number],) if e.fn == "concat" else ()
        missing = tuple(d for d in dims if d.name not in lower.type(node).names)
        if missing:
            node = lower.emit(
                "expand", (node,), (*dims, *own), lower.type(node).dtype, e.span, dims=missing
            )
        filled.append(node)
    return lower.emit(e.fn, filled, (*dims, axis), lower.builder.dtype(*filled), e.span, dim=axis)
