"""Checks the bodies of defs and functions: each equation in turn, and the result."""

from __future__ import annotations

from dsl import syntax as ast
from dsl import typed
from dsl.calls import Signature
from dsl.diagnostics import Span, near
from dsl.equations import Binding, Checker
from dsl.primitives import BUILTINS
from dsl.products import reads
from dsl.recurrences import belongs, start
from dsl.recurrences import enter as enter_scans
from dsl.scope import Failed, Scope, atoms
from dsl.typed import Axis, Index
from dsl.variants import Decide, flatten
from dsl.walking import all_items

DTYPES = ("act", "f32")


def define(
    checker: Checker, decl: ast.Def | ast.Fn, signature: Signature, decide: Decide
) -> typed.Def:
    """The typed form of a body when its conditions turn out as ``decide`` says.

    Raises:
        Failed: its result is never defined (reported).
    """
    scope = checker.scope
    taken: dict[str, Span] = {}
    for formal, declared in zip(signature.formals, decl.formals, strict=True):
        stored = checker.values.get(formal.name)
        claim(scope, {formal.name: stored.span} if stored else {}, declared.name)
        taken[formal.name] = formal.span
        kind = "index" if formal.of is not None else "number"
        checker.values[formal.name] = Binding(
            formal.name, "value", formal.axes, formal.span, kind, formal.of
        )
    items = list(flatten(decl.body, decide))
    enter(scope, items, taken)
    equations = [i for i in items if isinstance(i, ast.Equation)]
    for equation in reversed(equations):
        checker.later[equation.name.text] = equation.name.span
    enter_scans(checker, decl, equations)
    done: list[typed.Equation] = []
    for equation in equations:
        checker.later.pop(equation.name.text, None)
        try:
            done.append(_equation(checker, equation, decl.result, signature))
        except Failed:
            checker.failed.add(equation.name.text)
            if equation.kind == "scan":
                checker.scans.states[equation.name.text] = None
    result = decl.result.name.text
    if not any(e.name.text == result for e in equations):
        if not scope.is_broken(result):
            _undefined(checker, decl, equations)
        raise Failed
    constants = {n: c.value for n, c in scope.consts.local.items() if c.value is not None}
    return typed.Def(
        decl.name.text,
        signature.formals,
        result,
        signature.result_axes,
        signature.result_of,
        tuple(done),
        constants,
        decl.name.span,
    )


def _undefined(checker: Checker, decl: ast.Def | ast.Fn, equations: list[ast.Equation]) -> None:
    result = decl.result
    name = result.name.text
    elsewhere = [
        i.name.span
        for i in all_items(decl.body)
        if isinstance(i, ast.Equation) and i.name.text == name
    ]
    hint = near(name, [e.name.text for e in equations]) or f"write {written(result)} = ..."
    if name in checker.values:
        hint = f"an input is no result: give the result another name, and write it = {name}..."
    checker.found.error(
        "E0505",
        f"the result '{name}' is not always defined" if elsewhere else f"'{name}' is never defined",
        result.span,
        "the result" if not elsewhere else "",
        notes=[(span, "defined here, under a condition") for span in elsewhere[:1]],
        hint="" if elsewhere else hint,
    )


def enter(scope: Scope, items: list[ast.Item], taken: dict[str, Span]) -> None:
    """Enter the indices and constants of a block or body, each known from its line on."""
    local = [i for i in items if isinstance(i, (ast.ConstDecl, ast.IndexDecl))]
    for item in reversed(local):
        scope.later[item.name.text] = item.name.span
    for item in local:
        name = item.name.text
        if isinstance(item, ast.IndexDecl):
            scope.declare(item)
            scope.later.pop(name, None)
            continue
        claim(scope, taken, item.name)
        if item.keys or item.value is None:
            scope.found.error(
                "E0308",
                "only constants at the left margin read config.json",
                item.span,
                hint="declare the constant outside the block",
            )
            scope.failed.add(name)
        elif scope.readable().check(item.value):
            scope.consts.local[name] = item
        else:
            scope.failed.add(name)
        scope.later.pop(name, None)


def claim(scope: Scope, taken: dict[str, Span], name: ast.Name) -> None:
    """Enter a name that must not have another meaning in the same block or body."""
    text = name.text
    before = taken.setdefault(text, name.span)
    if before is not name.span:
        message = f"'{text}' is declared twice"
        if text == "call":
            message = "the def without a name is declared twice"
        scope.found.error("E0203", message, name.span, notes=[(before, "first declared here")])
    elif text in BUILTINS:
        scope.found.error(
            "E0203",
            f"'{text}' is a function of the language",
            name.span,
            hint="choose another name",
        )


# -- equations -------------------------------------------------------------------------------------


def _equation(
    checker: Checker, e: ast.Equation, result: ast.Result, signature: Signature
) -> typed.Equation:
    scope = checker.scope
    name = e.name.text
    _free_name(checker, e)
    if e.kind == "scan":
        state = checker.scans.states.get(name)
        if state is None:
            raise Failed  # its left side is wrong, which is told
        axes = state.axes
    else:
        axes = scope.axes(e.subscripts)
    dtype = dtype_of(scope, e.dtype)
    left = _over_time(scope, e, axes) if e.kind == "cached" else axes
    value = checker.equation(e, left, written(e))
    belongs(checker, e, value, result.name.text)
    begins = None
    if e.kind == "scan":
        begins = start(checker, e, axes)
        del checker.scans.states[name]
        checker.scans.done[name] = e.name.span
    seen = axes
    if name == result.name.text:
        dtype = dtype or dtype_of(scope, result.dtype)
        _matches_result(checker, e, axes, result, signature, value)
        seen = signature.result_axes
    if e.kind == "cached" and value.kind == "bool":
        raise checker.error(
            "E0602", "only numbers and positions are cached", e.value.span, "this is a truth value"
        )
    if e.kind == "scan" and value.kind == "bool":
        raise checker.error("E0602", "a state is a number", e.value.span, "this is a truth value")
    kept = e.kind in ("cached", "scan")
    decided_by = reads(checker, value) if not kept else frozenset({"value"})
    checker.values[name] = Binding(
        name, "value", seen, e.name.span, value.kind, value.of, decided_by
    )
    return typed.Equation(name, e.kind, axes, seen, dtype, value, e.span, begins)


def _free_name(checker: Checker, e: ast.Equation) -> None:
    name = e.name.text
    before = checker.values.get(name)
    if before is not None:
        hint = "a value keeps its meaning: give the second one another name"
        if before.role != "value":
            hint = f"'{name}' is stored, and an equation does not change it"
        raise checker.error(
            "E0203",
            f"'{name}' is defined twice",
            e.name.span,
            notes=[(before.span, "first defined here")],
            hint=hint,
        )
    constant = checker.scope.consts.local.get(name)
    if constant is not None:
        raise checker.error(
            "E0203",
            f"'{name}' is declared twice",
            e.name.span,
            notes=[(constant.name.span, "first declared here")],
        )
    if name in BUILTINS:
        raise checker.error(
            "E0203",
            f"'{name}' is a function of the language",
            e.name.span,
            hint="choose another name",
        )


def _matches_result(
    checker: Checker,
    e: ast.Equation,
    axes: tuple[Axis, ...],
    result: ast.Result,
    signature: Signature,
    value: typed.Expr,
) -> None:
    wanted = signature.result_axes
    declared = [(result.span, "declared here")]
    fits = len(axes) == len(wanted) and all(
        a == w or (not isinstance(w, typed.Sum) and not _dynamic(a, w) and a.size == w.size)
        for a, w in zip(axes, wanted, strict=True)
    )
    if not fits:
        raise checker.error(
            "E0402",
            f"the result is declared as {written(result)}",
            e.name.span,
            f"defined as {written(e)}",
            notes=declared,
        )
    if value.kind == "bool":
        raise checker.error(
            "E0602",
            "a result is a number",
            e.value.span,
            "this is a truth value",
            notes=declared,
            hint="where(..., 1, 0) makes a number of it",
        )
    if signature.result_of is not value.of:
        what = f"a position of '{value.of}'" if value.of is not None else "a number"
        wanted_of = signature.result_of
        holds = f"positions of '{wanted_of}'" if wanted_of else "numbers"
        raise checker.error(
            "E0404",
            f"the result holds {holds}",
            e.value.span,
            f"this is {what}",
            notes=declared,
            hint="" if wanted_of else f"declare it so: {written(result)} of {value.of}",
        )


def _dynamic(a: Axis, b: Axis) -> bool:
    return any(i.kind != "plain" for axis in (a, b) for i in atoms(axis))


def _over_time(scope: Scope, e: ast.Equation, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The axes of a cached value's right side: its time where the left has its history."""
    histories = [a for a in axes if isinstance(a, Index) and a.kind == "history"]
    times = [a for a in axes if isinstance(a, Index) and a.kind == "time"]
    name = e.name.text
    if len(histories) != 1 or times:
        what = "no history" if not histories else "two histories" if not times else "time as well"
        time = str(times[0]) if times else "t"
        scope.found.error(
            "E0506",
            f"'{name}' is cached, so it stands along one history and no time",
            e.name.span,
            f"{written(e)} has {what}",
            hint=f"index s : history {time}, and then: cached {name}[s,...] = ..., "
            f"with {time} on the right",
        )
        raise Failed
    of = histories[0].of
    assert of is not None
    return tuple(of if a is histories[0] else a for a in axes)


def dtype_of(scope: Scope, name: ast.Name | None) -> str | None:
    """An element type.

    Raises:
        Failed: it is none (reported).
    """
    if name is None:
        return None
    if name.text not in DTYPES:
        scope.found.error(
            "E0603",
            f"'{name.text}' is no element type",
            name.span,
            hint=near(name.text, DTYPES) or "element types are act (the model's own) and f32",
        )
        raise Failed
    return name.text


def written(e: ast.Equation | ast.Result | ast.Formal) -> str:
    """The left side as it stands in the text."""
    subs = ",".join(s.span.text for s in e.subscripts)
    return f"{e.name.text}[{subs}]" if subs else e.name.text
