"""Checks calls: functions, used blocks, arrays of them, chains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.diagnostics import Span, counted, near
from dsl.files import exporter
from dsl.primitives import BUILTINS, check_builtin
from dsl.products import shown_axes
from dsl.scope import Failed
from dsl.typed import (
    Axis,
    CallBlock,
    CallFn,
    Chain,
    Expr,
    Formal,
    Index,
    Iota,
    Product,
    Sum,
    Use,
)
from dsl.walking import sizes

if TYPE_CHECKING:
    from dsl.equations import Checker


@dataclass(frozen=True)
class Signature:
    """What a caller sees of a def or function."""

    name: str
    indices: tuple[Index, ...]  # formal indices, bound by the caller
    formals: tuple[Formal, ...]
    result_axes: tuple[Axis, ...]
    result_of: Index | None
    span: Span
    result_type: str | None = None  # the type it says after its result


@dataclass(frozen=True)
class Used:
    """A used block as its user sees it: the declaration and the signatures of its defs."""

    use: Use
    indices: tuple[Index, ...]
    defs: dict[str, Signature]
    private: frozenset[str]  # defs whose signature names indices of the block's own
    broken: frozenset[str]  # defs whose signature is wrong, which is reported


def _private(checker: Checker, e: ast.Call, used: Used, method: str) -> Failed:
    where = f"def {method}" if method != "call" else "the def"
    return checker.error(
        "E0503",
        f"{where} of '{used.use.block}' takes or gives an index that only '{used.use.block}' knows",
        e.span,
        notes=[(used.use.span, "used here")],
        hint="in the signature, name only time and what the block takes: block B[d, h] { ... }",
    )


def check_call(checker: Checker, e: ast.Call) -> Expr:
    """The typed form of a call.

    Raises:
        Failed: a mistake has been reported.
    """
    name = e.name.text
    if name in checker.uses:
        return _used(checker, e)
    if e.member is not None:
        raise checker.error(
            "E0205",
            f"no block is used under the name '{name}'",
            e.name.span,
            hint=near(name, checker.uses) or "a def of a used block is called: name.method(...)",
        )
    if name in checker.defs:
        if e.subscripts is not None:
            span = e.subscripts[0].span.to(e.subscripts[-1].span)
            raise checker.error(
                "E0501", f"'{name}' is a def of this block and takes no indices", span
            )
        return _call(checker, e, checker.defs[name], {}, method=name)
    visible = checker.scope.unit.visible.get(name)
    if visible is not None and isinstance(visible[0], ast.Fn):
        return _function(checker, e)
    if name == "chain" and e.subscripts is not None:
        return _chain(checker, e)
    if name in BUILTINS:
        return check_builtin(checker, e)
    if visible is not None and isinstance(visible[0], ast.ConstFn):
        return checker.compile_time(e)
    raise _unknown(checker, e)


def _unknown(checker: Checker, e: ast.Call) -> Failed:
    name = e.name.text
    if checker.scope.is_broken(name) or name in checker.failed:
        return Failed()
    checker.failed.add(name)  # told once in this def
    visible = checker.scope.unit.visible
    if name in visible and isinstance(visible[name][0], ast.Block):
        return checker.error(
            "E0205",
            f"'{name}' is a block: use it before calling it",
            e.name.span,
            hint=f"use inner = {name}[...], and then inner(...)",
        )
    if checker.find(name) is not None:
        return checker.error(
            "E0207",
            f"'{name}' is a value and cannot be called",
            e.name.span,
            hint=f"if a product is meant, write {name} * (...)",
        )
    functions = [n for n, (d, _) in visible.items() if isinstance(d, ast.Fn)]
    known = [*functions, *BUILTINS, *checker.uses, *checker.defs]
    elsewhere = checker.conditional.get(name)
    if elsewhere is not None:
        return checker.error(
            "E0207",
            f"'{name}' is not always there",
            e.name.span,
            notes=[(elsewhere, "declared here, under a condition")],
        )
    return checker.error(
        "E0207",
        f"no function or used block is called '{name}'",
        e.name.span,
        hint=exporter(name) or near(name, known),
    )


# -- functions and blocks --------------------------------------------------------------------------


def _function(checker: Checker, e: ast.Call) -> Expr:
    signature = checker.scope.context.fn_signature(e.name.text, checker.scope.unit)
    given = e.subscripts or ()
    if len(given) != len(signature.indices):
        wanted = ", ".join(i.name for i in signature.indices)
        number, here = len(signature.indices), len(given) or "none"
        raise checker.error(
            "E0501",
            f"'{e.name.text}' takes {counted(number, 'index', 'indices')} in brackets, not {here}",
            e.span,
            f"expected {e.name.text}[{wanted}](...)" if wanted else "",
            notes=[(signature.span, "declared here")],
        )
    bind = {f: checker.scope.axis(s) for f, s in zip(signature.indices, given, strict=True)}
    decl, _ = checker.scope.context.function(e.name.text, checker.scope.unit)
    for sub, (formal, axis) in zip(given, bind.items(), strict=True):
        if isinstance(axis, Index) and (
            axis.kind == "time" or (axis.kind == "history" and formal.name in sizes(decl.body))
        ):
            raise checker.error(
                "E0411",
                f"'{e.name.text}' works on an index of fixed extent, and '{axis}' is {axis.kind}",
                sub.span,
                notes=[(formal.span, "declared here")],
                hint="what the function does not name is carried through: leave it out",
            )
    return _call(checker, e, signature, bind, fn=e.name.text)


def _used(checker: Checker, e: ast.Call) -> Expr:
    used, pick = _piece(checker, e)
    method = e.member.text if e.member is not None else "call"
    signature = used.defs.get(method)
    if method in used.broken or used.use.target[1].broken & {method, "*"}:
        raise Failed
    if method in used.private:
        raise _private(checker, e, used, method)
    if signature is None:
        raise checker.error(
            "E0208",
            f"'{used.use.block}' has no def '{method}'",
            (e.member or e.name).span,
            notes=[(used.use.span, "used here")],
            hint=near(method, used.defs)
            or (f"its unnamed def is called: {e.name.text}(...)" if "call" in used.defs else ""),
        )
    bind = dict(zip(used.indices, used.use.bind, strict=True))
    array = used.use.array
    if array is None:
        if e.subscripts is not None:
            raise checker.error(
                "E0501",
                f"'{e.name.text}' is one block, not an array of them",
                e.span,
                notes=[(used.use.span, "used here")],
            )
        return _call(checker, e, signature, bind, use=e.name.text, method=method)
    assert pick is not None
    return _call(
        checker, e, signature, bind, use=e.name.text, method=method, pick=pick, array=array
    )


def _piece(checker: Checker, e: ast.Call) -> tuple[Used, Expr | None]:
    """What a call names: a used block, or the piece of an array that the subscript is a position
    of, and that position."""
    used = checker.uses[e.name.text]
    array = used.use.array
    if array is None:
        return used, None
    if e.subscripts is None or len(e.subscripts) != 1:
        raise checker.error(
            "E0501",
            f"'{e.name.text}' is an array over '{array}': say which",
            e.span,
            notes=[(used.use.span, "used here")],
            hint=f"{e.name.text}[pick[k]](...) runs the picked ones, "
            f"chain[{array}]({e.name.text}, ...) one after another",
        )
    (given,) = e.subscripts
    if given.to is not None or len(given.parts) != 1:
        raise checker.error("E0401", f"one position of '{array}' is expected here", given.span)
    pick = checker.expr(given.parts[0])
    for piece in checker.pieces[e.name.text]:
        if piece.use.array is not None and _is_position(pick, piece.use.array):
            return piece, pick
    what = f"picks a position of '{pick.of}'" if pick.of is not None else "is a number"
    raise checker.error(
        "E0404",
        f"this {what}, and the array runs over '{array}'",
        given.span,
        notes=[(array.span, f"'{array}' is declared here")],
    )


def _is_position(pick: Expr, array: Index) -> bool:
    """Does ``pick`` hold a position of the array's index, or of one that stands for the same?"""
    if isinstance(pick, Iota):
        return pick.index is array
    if pick.kind != "index" or pick.of is None:
        return False
    return pick.of is array or (array.alias is not None and pick.of.alias == array.alias)


def _chain(checker: Checker, e: ast.Call) -> Expr:
    assert e.subscripts is not None
    axis = checker.scope.axis(e.subscripts[0])
    if len(e.subscripts) != 1 or not isinstance(axis, Index) or len(e.arguments) < 2:
        raise checker.error(
            "E0501",
            "a chain names one index, an array of blocks over it, and what the first block takes",
            e.span,
            hint="chain[a](layers, x[t,d])",
        )
    first = e.arguments[0]
    name = first.name.text if isinstance(first, ast.Ref) and first.subscripts is None else ""
    pieces = [u for u in checker.pieces.get(name, []) if u.use.array is axis]
    if not pieces:
        if name in checker.failed or checker.scope.is_broken(name):
            raise Failed
        raise _no_array(checker, first, name, axis)
    used = pieces[0]
    signature = used.defs.get("call")
    if "call" in used.broken:
        raise Failed
    if "call" in used.private:
        raise _private(checker, e, used, "call")
    if signature is None:
        raise checker.error(
            "E0208",
            f"a chain calls the unnamed def of its blocks, and '{used.use.block}' has none",
            first.span,
            notes=[(used.use.span, "used here")],
        )
    bind = dict(zip(used.indices, used.use.bind, strict=True))
    rest = ast.Call(e.name, None, None, e.arguments[1:], e.span)
    call = _call(checker, rest, signature, bind, use=name)
    assert isinstance(call, CallBlock)
    differs, hint = "", ""
    if set(call.free) != set(call.args[0].free):
        differs = f"takes {shown_axes(call.args[0].free)}, gives {shown_axes(call.free)}"
    elif (gives := signature.result_type or "act") != (takes := signature.formals[0].dtype):
        differs = f"takes {takes}, gives {gives}"
        hint = "say f32 of both, def (x[...]: f32) -> y[...]: f32, or of neither"
    if differs:
        raise checker.error(
            "E0502",
            f"a block of a chain must give what it takes, and '{used.use.block}' does not",
            e.span,
            differs,
            notes=[(signature.span, "declared here")],
            hint=hint,
        )
    return Chain(e.span, call.free, call.kind, call.of, use=name, index=axis, args=call.args)


def _no_array(checker: Checker, first: ast.Expr, name: str, axis: Index) -> Failed:
    pieces = checker.pieces.get(name, [])
    if pieces:
        arrays = [str(u.use.array) for u in pieces if u.use.array is not None]
        what = f"is an array over '{arrays[0]}'" if arrays else "is one block, not an array of them"
        return checker.error(
            "E0205",
            f"'{name}' {what}",
            first.span,
            f"expected an array over '{axis}'",
            notes=[(pieces[0].use.span, "used here")],
        )
    known = [n for n, us in checker.pieces.items() if any(u.use.array is not None for u in us)]
    return checker.error(
        "E0205",
        f"no array of blocks is used under this name: a chain runs one over '{axis}'",
        first.span,
        hint=near(name, known) or f"use layers[{axis}] = Block[...]",
    )


def bound_axis(axis: Axis, bind: dict[Index, Axis]) -> Axis:
    """A callee's axis as the caller knows it."""
    if isinstance(axis, Index):
        return bind.get(axis, axis)
    parts = tuple(bound_axis(p, bind) for p in axis.parts)
    return Sum(parts) if isinstance(axis, Sum) else Product(parts)


def _call(
    checker: Checker,
    e: ast.Call,
    signature: Signature,
    bind: dict[Index, Axis],
    *,
    fn: str = "",
    use: str | None = None,
    method: str = "call",
    pick: Expr | None = None,
    array: Index | None = None,
) -> Expr:
    """Match arguments with formals. What an argument ranges over beyond its formal is carried
    through by name."""
    name = e.name.text
    if len(e.arguments) != len(signature.formals):
        wanted = ", ".join(f.name for f in signature.formals)
        number = counted(len(signature.formals), "argument", "arguments")
        raise checker.error(
            "E0501",
            f"'{name}' takes {number}, not {len(e.arguments)}",
            e.span,
            f"expected ({wanted})",
            notes=[(signature.span, "declared here")],
        )
    args = checker.all(e.arguments)
    lifted: list[Axis] = list(pick.free) if pick is not None else []
    for formal, arg in zip(signature.formals, args, strict=True):
        wanted_axes = [bound_axis(a, bind) for a in formal.axes]
        for n, axis in enumerate(wanted_axes):
            if axis in wanted_axes[:n]:
                raise checker.error(
                    "E0409",
                    f"'{axis}' stands for two indices of one argument of '{name}'",
                    arg.span,
                    notes=[(formal.span, "declared here")],
                    hint="declare a second index of the same extent",
                )
            if axis not in arg.free:
                raise checker.error(
                    "E0403",
                    f"'{name}' works on '{axis}', which this argument does not range over",
                    arg.span,
                    f"ranges over {shown_axes(arg.free)}",
                    notes=[(formal.span, "declared here")],
                )
        of = bound_axis(formal.of, bind) if formal.of is not None else None
        if of is not None and arg.of is not of:
            raise checker.error(
                "E0404",
                f"positions of '{of}' are expected here",
                arg.span,
                notes=[(formal.span, "declared here")],
            )
        if arg.kind == "bool":
            raise checker.error(
                "E0602", "a number is expected here", arg.span, "this is a truth value"
            )
        lifted += [a for a in arg.free if a not in wanted_axes and a not in lifted]
    results = [bound_axis(a, bind) for a in signature.result_axes]
    clash = [a for n, a in enumerate(results) if a in lifted or a in results[:n]]
    if clash:
        raise checker.error(
            "E0409",
            f"the result of '{name}' would range over '{clash[0]}' twice",
            e.span,
            f"an argument ranges over {shown_axes(tuple(lifted))}",
            notes=[(signature.span, "declared here")],
            hint="declare a second index of the same extent",
        )
    free = (*lifted, *results)
    result_of = bound_axis(signature.result_of, bind) if signature.result_of is not None else None
    of = result_of if isinstance(result_of, Index) else None
    kind = "index" if of is not None else "number"
    if fn:
        return CallFn(
            e.span,
            free,
            kind,
            of,
            fn=fn,
            target=checker.scope.context.function(fn, checker.scope.unit),
            bind=tuple(bind.items()),
            args=tuple(args),
        )
    return CallBlock(
        e.span,
        free,
        kind,
        of,
        use=use,
        array=array,
        method=method,
        pick=pick,
        args=tuple(args),
    )
