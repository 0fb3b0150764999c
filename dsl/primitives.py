"""Checks the functions of the language: elementwise ones, reducers, choices, joins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.diagnostics import Span
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
    "exp": 1, "log": 1, "sqrt": 1, "rsqrt": 1, "sin": 1, "cos": 1, "tanh": 1, "sigmoid": 1,
    "abs": 1, "floor": 1, "ceil": 1, "min": 2, "max": 2,
}  # fmt: skip
# How each function that takes indices is written.
EXAMPLES = {
    "sum": "sum[i](...)",
    "mean": "mean[i](...)",
    "max": "max[i](...)",
    "min": "min[i](...)",
    "softmax": "softmax[s](...)",
    "top": "top[e -> k](...)",
    "argtop": "argtop[e -> k](...)",
    "in_top": "in_top[g, 4](...)",
    "stack": "stack[o](..., ...)",
    "concat": "concat[n|j](..., ...)",
    "broadcast": "broadcast[i](...)",
    "chain": "chain[a](layers, ...)",
}
REDUCERS = ("sum", "mean", "max", "min")
BUILTINS = frozenset({*ELEMENTWISE, *EXAMPLES, "where", "position", "size"})


def check_builtin(checker: Checker, e: ast.Call) -> Expr:
    """The typed form of a call of one of the language's functions.

    Raises:
        Failed: a mistake has been reported.
    """
    name = e.name.text
    if name == "size":
        return checker.compile_time(e)
    if name == "position":
        raise checker.error(
            "E0501", "'position' is no function", e.name.span, hint="write position[t]"
        )
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
            e.name.span,
            hint=f"write {EXAMPLES[name]}",
        )
    if name not in EXAMPLES:
        raise checker.error(
            "E0501",
            f"'{name}' takes no indices",
            e.subscripts[0].span.to(e.subscripts[-1].span),
            hint=f"it works on each element by itself: {name}({', '.join(['...'] * _arity(name))})",
        )
    if name in REDUCERS:
        return _reduce(checker, e)
    if name == "broadcast":
        return _broadcast(checker, e)
    if name in ("stack", "concat"):
        return _join(checker, e)
    return _choice(checker, e)


def _arity(name: str) -> int:
    return 3 if name == "where" else ELEMENTWISE.get(name, 1)


def _arguments(checker: Checker, e: ast.Call, number: int) -> list[Expr]:
    _number_of_arguments(checker, e, number)
    return checker.all(e.arguments)


def _number_of_arguments(checker: Checker, e: ast.Call, number: int) -> None:
    if len(e.arguments) != number:
        raise checker.error(
            "E0501",
            f"'{e.name.text}' takes {number} argument{'s' * (number != 1)}, not {len(e.arguments)}",
            e.span,
            hint="where(condition, a, b) is a where the condition holds, and b elsewhere"
            if e.name.text == "where"
            else "",
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


def _inside(checker: Checker, e: tuple[ast.Expr, ...], axes: list[Axis]) -> list[Expr]:
    """Arguments of what works on ``axes``, which are not summed by the products inside."""
    before = checker.reduced
    checker.reduced = before | frozenset(axes) | frozenset(a for x in axes for a in _parts(x))
    try:
        return checker.all(e)
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
        f"'{what}' works on '{axis}', which this argument does not range over",
        arg.span,
        f"ranges over {shown_axes(arg.free)}",
        notes=[(axis.span if isinstance(axis, Index) else None, f"'{axis}' is declared here")],
    )


def _reduce(checker: Checker, e: ast.Call) -> Expr:
    assert e.subscripts is not None
    axes = list(checker.scope.axes(e.subscripts))
    _number_of_arguments(checker, e, 1)
    (given,) = _inside(checker, e.arguments, axes)
    arg = checker._want(given, "number")
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
                f"'{name}' says which index it chooses from, and which one counts what it takes",
                e.subscripts[0].span.to(e.subscripts[-1].span),
                hint=f"write {EXAMPLES[name]}",
            )
        to = checker.scope.index(first.to)
        if to.kind != "plain":
            raise checker.error(
                "E0411",
                f"'{name}' takes a number that is known when the model is compiled",
                first.to.span,
                f"'{to}' is {to.kind}",
            )
        first = ast.Subscript(first.parts, None, first.span)
    elif name == "in_top":
        if len(e.subscripts) != 2 or len(e.subscripts[1].parts) != 1:
            raise checker.error(
                "E0501",
                "'in_top' says which index it works on, and how many it takes",
                e.subscripts[0].span.to(e.subscripts[-1].span),
                hint=f"write {EXAMPLES[name]}",
            )
        count = e.subscripts[1].parts[0]
        checker.scope.extent(count)
    elif len(e.subscripts) != 1:
        raise checker.error(
            "E0501", f"'{name}' works on one index", first.span.to(e.subscripts[-1].span)
        )
    axis = checker.scope.axis(first)
    if not isinstance(axis, Index):
        raise checker.error(
            "E0401",
            f"'{name}' works on one index, and '{axis}' is several",
            first.span,
            hint=f"name it: index e = {axis}",
        )
    _number_of_arguments(checker, e, 1)
    (given,) = _inside(checker, e.arguments, [axis])
    arg = checker._want(given, "number")
    parts = _ranges_over(checker, arg, axis, name)
    not_along_time(checker, parts, e.span)
    if axis.kind == "history" and name in ("top", "argtop"):
        raise checker.error("E0410", f"'{name}' over a history is not built yet", e.span)
    keeps = tuple(axis if a == parts[0] else a for a in arg.free if a == parts[0] or a not in parts)
    if to is not None and to in arg.free:
        raise checker.error(
            "E0409",
            f"'{to}' is an index of the argument already",
            e.subscripts[0].span,
            notes=[(arg.span, f"ranges over {shown_axes(arg.free)}")],
            hint=f"declare another index for what '{name}' takes: index k : 2",
        )
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
        raise checker.error(
            "E0501",
            f"'{name}' makes one index",
            e.subscripts[0].span.to(e.subscripts[-1].span),
            hint=f"write {EXAMPLES[name]}",
        )
    axis = checker.scope.axis(e.subscripts[0])
    args = _inside(checker, e.arguments, list(axis.parts) if isinstance(axis, Sum) else [])
    for arg in args:
        checker._want(arg, "number")
    if name == "stack":
        if not isinstance(axis, Index) or axis.extent.constant != len(args):
            raise checker.error(
                "E0501",
                f"{len(args)} are stacked here, and '{axis}' is not an index of extent {len(args)}",
                e.span,
                notes=[(_declared(axis), f"'{axis}' is declared here")],
                hint=f"declare one: index o : {len(args)}",
            )
        _none_has(checker, axis, args)
        _alike(checker, args, ())
        free = union(*(a.free for a in args))
        return Join(e.span, (*free, axis), fn=name, axis=axis, args=tuple(args))
    parts = axis.parts if isinstance(axis, Sum) else ()
    if len(parts) != len(args):
        several = f"concat takes one argument for each part of '{axis}', not {len(args)}"
        raise checker.error(
            "E0501",
            several if parts else f"concat makes a sum of indices, and '{axis}' is none",
            e.span,
            hint=f"write {EXAMPLES[name]}",
        )
    for part, arg in zip(parts, args, strict=True):
        if part not in arg.free:
            raise checker.error(
                "E0403",
                f"'concat' puts '{part}' here, which this argument does not range over",
                arg.span,
                f"ranges over {shown_axes(arg.free)}",
                hint=f"the arguments stand in the order of {axis}",
            )
    _alike(checker, args, parts)
    rest = [a for a in union(*(a.free for a in args)) if a not in parts]
    return Join(e.span, (*rest, axis), fn=name, axis=axis, args=tuple(args))


def _declared(axis: Axis) -> Span | None:
    return axis.span if isinstance(axis, Index) else None


def _none_has(checker: Checker, axis: Axis, args: list[Expr]) -> None:
    for arg in args:
        if axis in arg.free:
            raise checker.error(
                "E0409",
                f"this argument ranges over '{axis}' already",
                arg.span,
                f"ranges over {shown_axes(arg.free)}",
                notes=[(_declared(axis), f"'{axis}' is declared here")],
            )


def _alike(checker: Checker, args: list[Expr], parts: tuple[Axis, ...]) -> None:
    """What is joined ranges over the same indices, but for numbers, which go with anything."""
    first: Expr | None = None
    for arg in args:
        rest = set(arg.free) - set(parts)
        if not rest:
            continue
        if first is None:
            first = arg
        elif rest != set(first.free) - set(parts):
            raise checker.error(
                "E0406",
                "what is joined must range over the same indices",
                arg.span,
                f"ranges over {shown_axes(arg.free)}",
                notes=[(first.span, f"ranges over {shown_axes(first.free)}")],
                hint="if one is meant to be repeated, say so: broadcast[i](...)",
            )


def _broadcast(checker: Checker, e: ast.Call) -> Expr:
    assert e.subscripts is not None
    axes = checker.scope.axes(e.subscripts)
    (arg,) = _arguments(checker, e, 1)
    for axis in axes:
        _none_has(checker, axis, [arg])
    return Broadcast(e.span, (*axes, *arg.free), arg.kind, arg.of, axes=axes, arg=arg)
