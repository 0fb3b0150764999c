"""Checks the functions of the language: elementwise ones, reducers, choices, joins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.products import not_along_time, shown_axes, union
from dsl.typed import (
    Axis,
    Broadcast,
    Choice,
    Expr,
    Index,
    Join,
    Map,
    Product,
    Reduce,
    Sum,
)

if TYPE_CHECKING:
    from dsl.equations import Checker

ELEMENTWISE = {
    "exp": 1, "log": 1, "sqrt": 1, "rsqrt": 1, "sin": 1, "cos": 1, "tanh": 1, "sigmoid": 1, "abs": 1,
    "floor": 1, "ceil": 1, "min": 2, "max": 2,
}  # fmt: skip
REDUCERS = ("sum", "mean", "max", "min")
INDEXED = ("softmax", "top", "argtop", "in_top", "stack", "concat", "broadcast", "chain", *REDUCERS)
BUILTINS = frozenset({*ELEMENTWISE, *INDEXED, "where", "position", "size"})


def check_builtin(checker: Checker, e: ast.Call) -> Expr:
    """The typed form of a call of one of the language's functions.

    Raises:
        Failed: a mistake has been reported.
    """
    name = e.name.text
    if name == "size":
        return checker.compile_time(e)
    if name == "position":
        raise checker.error("E0401", "positions are subscripted: position[t]", e.span)
    if e.subscripts is None:
        if name == "where":
            return _where(checker, e)
        if name in ELEMENTWISE:
            args = _arguments(checker, e, ELEMENTWISE[name])
            for arg in args:
                checker._want(arg, "number")
            return Map(e.span, union(*(a.free for a in args)), fn=name, args=tuple(args))
        raise checker.error(
            "E0501",
            f"'{name}' says in brackets which index it works on",
            e.span,
            hint=f"{name}[i](...)",
        )
    if name not in INDEXED:
        raise checker.error("E0501", f"'{name}' takes no indices", e.span)
    if name in REDUCERS:
        return _reduce(checker, e)
    if name == "broadcast":
        return _broadcast(checker, e)
    if name in ("stack", "concat"):
        return _join(checker, e)
    return _choice(checker, e)


def _arguments(checker: Checker, e: ast.Call, number: int) -> list[Expr]:
    _number_of_arguments(checker, e, number)
    return checker.all(e.arguments)


def _number_of_arguments(checker: Checker, e: ast.Call, number: int) -> None:
    if len(e.arguments) != number:
        plural = "s" * (number != 1)
        raise checker.error(
            "E0501",
            f"'{e.name.text}' takes {number} argument{plural}, not {len(e.arguments)}",
            e.span,
        )


def _where(checker: Checker, e: ast.Call) -> Expr:
    condition, then, otherwise = _arguments(checker, e, 3)
    checker._want(condition, "bool")
    kind = then.kind if then.kind == otherwise.kind == "bool" else "number"
    checker._want(then, kind)
    checker._want(otherwise, kind)
    return Map(
        e.span,
        union(condition.free, then.free, otherwise.free),
        kind,
        fn="where",
        args=(condition, then, otherwise),
    )


def _inside(checker: Checker, e: ast.Expr, axes: list[Axis]) -> Expr:
    """An argument of a reducer over ``axes``, which are not summed by the products inside it."""
    before = checker.reduced
    checker.reduced = before | frozenset(axes) | frozenset(a for x in axes for a in _parts(x))
    try:
        return checker.expr(e)
    finally:
        checker.reduced = before


def _parts(axis: Axis) -> list[Axis]:
    """What an index such as ``e = (g, m)`` may be spelled as."""
    if isinstance(axis, Index) and isinstance(axis.alias, Product):
        return list(axis.alias.parts)
    return []


def _ranges_over(checker: Checker, arg: Expr, axis: Axis, what: str) -> tuple[Axis, ...]:
    """The axes of ``arg`` that spell ``axis``: itself, or all parts of what it stands for."""
    if axis in arg.free:
        return (axis,)
    parts = tuple(_parts(axis))
    if parts and all(p in arg.free for p in parts):
        return parts
    raise checker.error(
        "E0403",
        f"{what} over '{axis}', which its argument does not range over",
        arg.span,
        f"ranges over {shown_axes(arg.free)}",
        notes=[(axis.span if isinstance(axis, Index) else None, f"'{axis}' is declared here")],
    )


def _reduce(checker: Checker, e: ast.Call) -> Expr:
    assert e.subscripts is not None
    axes = [checker.scope.axis(s) for s in e.subscripts]
    _number_of_arguments(checker, e, 1)
    arg = checker._want(_inside(checker, e.arguments[0], axes), "number")
    over = tuple(p for a in axes for p in _ranges_over(checker, arg, a, e.name.text))
    not_along_time(checker, over, e.span)
    free = tuple(a for a in arg.free if a not in over)
    return Reduce(e.span, free, fn=e.name.text, over=over, arg=arg)


def _choice(checker: Checker, e: ast.Call) -> Expr:
    """softmax[s](x), top[m -> i](x), argtop[e -> k](x), in_top[g, count](x)."""
    assert e.subscripts is not None
    name = e.name.text
    first = e.subscripts[0]
    to: Index | None = None
    count: ast.Expr | None = None
    if name in ("top", "argtop"):
        if len(e.subscripts) != 1 or first.to is None:
            raise checker.error(
                "E0501",
                f"'{name}' says what it chooses from and what it gives",
                e.span,
                hint=f"{name}[e -> k](...)",
            )
        to = checker.scope.index(first.to)
        first = ast.Subscript(first.parts, None, first.span)
    elif name == "in_top":
        if len(e.subscripts) != 2 or len(e.subscripts[1].parts) != 1:
            raise checker.error(
                "E0501", "'in_top' takes an index and how many", e.span, hint="in_top[g, 4](...)"
            )
        count = e.subscripts[1].parts[0]
        checker.scope.extent(count)
    elif len(e.subscripts) != 1:
        raise checker.error("E0501", f"'{name}' works on one index", e.span)
    axis = checker.scope.axis(first)
    if not isinstance(axis, Index):
        raise checker.error(
            "E0401",
            f"'{name}' works on one index, and '{axis}' is several",
            first.span,
            hint=f"name it: index e = {axis}",
        )
    _number_of_arguments(checker, e, 1)
    arg = checker._want(_inside(checker, e.arguments[0], [axis]), "number")
    parts = _ranges_over(checker, arg, axis, name)
    not_along_time(checker, parts, e.span)
    if axis.kind == "history" and name != "softmax":
        raise checker.error("E0410", f"'{name}' over a history is not built yet", e.span)
    keeps = tuple(axis if a == parts[0] else a for a in arg.free if a == parts[0] or a not in parts)
    if to is not None and to in arg.free:
        raise checker.error("E0409", f"'{to}' is an index of the argument already", e.span)
    free = tuple(to if a is axis and to is not None else a for a in keeps)
    kind = {"argtop": "index", "in_top": "bool"}.get(name, "number")
    of = axis if name == "argtop" else None
    if name == "in_top" and len(parts) > 1:
        free = tuple(p for a in free for p in (parts if a is axis else (a,)))
    return Choice(
        e.span,
        free,
        kind,
        of,
        fn=name,
        over=axis,
        to=to,
        count=count,
        scope=checker.scope.consts,
        arg=arg,
    )


def _join(checker: Checker, e: ast.Call) -> Expr:
    assert e.subscripts is not None
    name = e.name.text
    if len(e.subscripts) != 1:
        raise checker.error("E0501", f"'{name}' makes one index", e.span)
    axis = checker.scope.axis(e.subscripts[0])
    args = checker.all(e.arguments)
    for arg in args:
        checker._want(arg, "number")
    if name == "stack":
        if not isinstance(axis, Index) or axis.extent.constant != len(args):
            raise checker.error(
                "E0501",
                f"stack makes an index of extent {len(args)} here, and '{axis}' has {axis.size}",
                e.span,
            )
        if any(axis in a.free for a in args):
            raise checker.error("E0409", f"'{axis}' is an index of an argument already", e.span)
        rest = {frozenset(a.free) for a in args if a.free}
        if len(rest) > 1:
            raise checker.error("E0406", "what is stacked must range over the same indices", e.span)
        return Join(
            e.span, (*union(*(a.free for a in args)), axis), fn=name, axis=axis, args=tuple(args)
        )
    parts = axis.parts if isinstance(axis, Sum) else ()
    if len(parts) != len(args):
        raise checker.error(
            "E0501",
            f"concat takes one argument for each part of '{axis}'",
            e.span,
            hint="concat[n|j](a[n], b[j])",
        )
    for part, arg in zip(parts, args, strict=True):
        if part not in arg.free:
            raise checker.error("E0403", f"this does not range over '{part}'", arg.span)
    free = [a for a in union(*(a.free for a in args)) if a not in parts]
    return Join(e.span, (*free, axis), fn=name, axis=axis, args=tuple(args))


def _broadcast(checker: Checker, e: ast.Call) -> Expr:
    assert e.subscripts is not None
    axes = tuple(checker.scope.axis(s) for s in e.subscripts)
    (arg,) = _arguments(checker, e, 1)
    again = [a for a in axes if a in arg.free]
    if again:
        raise checker.error("E0409", f"the argument ranges over '{again[0]}' already", e.span)
    return Broadcast(e.span, (*axes, *arg.free), arg.kind, arg.of, axes=axes, arg=arg)
