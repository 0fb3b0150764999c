"""Checks scans: a value that is replaced from token to token, and reads itself at the token before.

A scan's name is known before its equation: its right side, and the equations above it that help to
say it, read it at ``t - 1``. Those belong to the scan. What they hold depends on the state, so it
is computed token by token, and nothing but the scan reads it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl import typed
from dsl.diagnostics import Span
from dsl.products import reads, union
from dsl.scope import Failed
from dsl.typed import Axis, Expr, Index

if TYPE_CHECKING:
    from dsl.equations import Binding, Checker


@dataclass
class Scans:
    """The scans of one def.

    ``states`` are those whose equation has not been checked yet, None where the left side is wrong;
    ``part_of`` says which scan a value belongs to, and ``reading`` whose states the equation at
    hand reads.
    """

    states: dict[str, Binding | None] = field(default_factory=dict)
    done: dict[str, Span] = field(default_factory=dict)
    part_of: dict[str, str] = field(default_factory=dict)
    reading: dict[str, Span] = field(default_factory=dict)


def enter(checker: Checker, decl: ast.Def | ast.Fn, equations: list[ast.Equation]) -> None:
    """Make the states of a def's scans known."""
    from dsl.equations import Binding

    for e in equations:
        name = e.name.text
        if e.kind != "scan" or name in checker.scans.states:
            continue
        checker.scans.states[name] = None
        try:
            if isinstance(decl, ast.Fn):
                raise checker.error(
                    "E0512",
                    f"'{name}' is kept from token to token, and a function keeps nothing",
                    e.name.span,
                    hint="a scan stands in a def of a block",
                )
            axes = checker.scope.axes(e.subscripts)
            times = [a for a in axes if isinstance(a, Index) and a.kind == "time"]
            if len(times) != 1 or any(isinstance(a, Index) and a.kind == "history" for a in axes):
                what = "a history" if len(times) == 1 else "no time"
                raise checker.error(
                    "E0512",
                    f"'{name}' is a scan, so it stands along time and no history",
                    e.name.span,
                    f"it has {what}",
                    hint=f"scan {name}[t,...] = ... reads {name}[t-1,...], along index t : time",
                )
            checker.scans.states[name] = Binding(name, "before", axes, e.name.span)
        except Failed:
            continue


# -- the token before ------------------------------------------------------------------------------


def before(checker: Checker, e: ast.Ref) -> Expr:
    """``S[t-1,...]``, in the equation of ``S`` or above it.

    Raises:
        Failed: it is read at another token, or otherwise wrongly (reported).
    """
    name = e.name.text
    state = checker.scans.states[name]
    if state is None:
        raise Failed
    place = next(n for n, a in enumerate(state.axes) if isinstance(a, Index) and a.kind == "time")
    time = state.axes[place]
    assert isinstance(time, Index)
    given = list(e.subscripts or ())
    if len(given) == len(state.axes):
        if not _is_before(checker, given[place], time):
            inside = checker.defining == name
            where = "in its own equation" if inside else "above its equation"
            raise checker.error(
                "E0512",
                f"'{name}' is read at '{time} - 1' {where}, and at no other token",
                given[place].span,
                notes=[] if inside else [(state.span, "its equation")],
                hint="values at tokens further before are cached, or part of the state"
                if inside
                else f"what reads it at '{time}' stands below its equation",
            )
        ref = ast.Ref(ast.Name(time.name, given[place].span), None, None, given[place].span)
        given[place] = ast.Subscript((ref,), None, given[place].span)
    checker.scans.reading.setdefault(name, e.span)
    return checker.value(state, ast.Ref(e.name, None, tuple(given), e.span))


def _is_before(checker: Checker, given: ast.Subscript, time: Index) -> bool:
    match given.parts:
        case (
            ast.Binary(
                op="-", left=ast.Ref(name=name, subscripts=None), right=ast.Literal(value=int(by))
            ),
        ) if given.to is None and not isinstance(by, bool):
            return by == 1 and checker.scope.find_index(name.text) is time
    return False


def part(checker: Checker, e: ast.Ref) -> None:
    """A value that belongs to a scan is read by that scan, before its equation ends.

    Raises:
        Failed: it is read afterwards (reported).
    """
    name = e.name.text
    scan = checker.scans.part_of.get(name)
    if scan is None:
        return
    if scan in checker.scans.done:
        raise checker.error(
            "E0512",
            f"'{name}' belongs to the scan of '{scan}', and is read only there",
            e.span,
            notes=[(checker.scans.done[scan], "the scan")],
            hint=f"'{name}' depends on {scan}[t-1,...]: what others need of it is part of the "
            "state",
        )
    checker.scans.reading.setdefault(scan, e.span)


def belongs(checker: Checker, e: ast.Equation, value: Expr, result: str) -> None:
    """Settle which scan an equation belongs to, if it reads a state.

    Raises:
        Failed: it may not read it (reported).
    """
    name, reading = e.name.text, dict(checker.scans.reading)
    if e.kind == "scan" and name not in reading and not reading:
        raise checker.error(
            "E0512",
            f"'{name}' never reads itself at the token before",
            e.name.span,
            hint="without that it is an equation like any other: leave 'scan' and 'from' out",
        )
    if not reading:
        return
    scan, *others = reading
    if e.kind == "scan" and scan != name:
        others = [s for s in reading if s != name]
        scan = name
    if others:
        raise checker.error(
            "E0512",
            f"two recurrences read each other: '{scan}' and '{others[0]}'",
            reading[others[0]],
            hint="one scan may hold both, as parts of a sum: "
            "scan c[t,n|j] = concat[n|j](...) from 0",
        )
    if e.kind == "cached" or (name == result and e.kind != "scan"):
        what = "is cached" if e.kind == "cached" else "is the result"
        raise checker.error(
            "E0512",
            f"'{name}' {what}, and reads '{scan}' before its equation",
            reading[scan],
            hint=f"what others read is made of {scan}[t,...], below its equation",
        )
    _carries(checker, scan, value)
    if e.kind != "scan":
        checker.scans.part_of[name] = scan


def _depends(checker: Checker, e: Expr) -> bool:
    return any(
        isinstance(v, typed.Value)
        and (v.role == "before" or (v.role == "value" and v.name in checker.scans.part_of))
        for v in typed.walk(e)
    )


def _carries(checker: Checker, scan: str, value: Expr) -> None:
    """What depends on the state is computed one token at a time: nothing in it is a call of a
    block, which runs for all tokens at once, or ranges over the history."""
    for e in typed.walk(value):
        inner: list[Expr] = []
        match e:
            case typed.CallBlock(args=args) | typed.Chain(args=args):
                if any(_depends(checker, a) for a in args):
                    raise checker.error(
                        "E0512",
                        f"a block cannot be called on what the scan of '{scan}' carries",
                        e.span,
                        hint="its equations may stand here, or in a function",
                    )
            case typed.Map(args=inner_args) | typed.Join(args=inner_args):
                inner = list(inner_args)
            case typed.Contraction(factors=factors):
                inner = [f.value for f in factors]
            case typed.CallFn(args=inner_args):
                inner = list(inner_args)
        if not any(_depends(checker, i) for i in inner):
            continue
        for axis in union(e.free, *(i.free for i in inner)):
            if isinstance(axis, Index) and axis.kind == "history":
                raise checker.error(
                    "E0512",
                    f"what the scan of '{scan}' carries cannot meet the history '{axis}'",
                    e.span,
                    hint=f"what is summed over '{axis}' first is a value of one token",
                )


def start(checker: Checker, e: ast.Equation, axes: tuple[Axis, ...]) -> Expr:
    """What a scan begins with: known before any token, along the axes without time.

    Raises:
        Failed: it is not (reported).
    """
    assert e.start is not None
    left = tuple(a for a in axes if not (isinstance(a, Index) and a.kind == "time"))
    shown = f"{e.name.text}[{','.join(map(str, left))}]" if left else e.name.text
    value = checker.right_side(e.start, e.name, left, shown)
    if value.kind == "bool":
        raise checker.error("E0602", "a state is a number", e.start.span, "this is a truth value")
    if "value" in reads(checker, value):
        raise checker.error(
            "E0512",
            f"'{e.name.text}' begins before the first token, with what no token decides",
            e.start.span,
            hint="a number, a parameter, or what is computed from these",
        )
    return value
