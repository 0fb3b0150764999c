"""Checks what reads other tokens: a history at ``t - 1``, ``t - i`` or ``t + c - last``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.extents import Extent
from dsl.typed import Axis, Index, Shift

if TYPE_CHECKING:
    from dsl.equations import Checker


def shifted(checker: Checker, axis: Axis, given: ast.Expr) -> Shift | None:
    """``t - 1``, ``t - i`` or ``t + c - last`` in the place of a history (or of time, which keeps
    nothing); None if ``given`` is nothing of that kind.

    Raises:
        Failed: it is, and wrong (reported).
    """
    if not isinstance(axis, Index) or axis.kind == "plain":
        return None
    time = axis.of if axis.kind == "history" else axis
    terms = _terms(given, 1)
    times = [sign for sign, e in terms if _index(checker, e) is time]
    if time is None or not times or len(terms) < 2:
        return None
    if axis.kind == "time" and checker.subscripted in checker.scans.done:
        name = checker.subscripted
        raise checker.error(
            "E0512",
            f"'{name}' at the token before is read only in the scan itself",
            given.span,
            notes=[(checker.scans.done[name], "the scan")],
            hint="what is needed of it afterwards is part of the state",
        )
    if axis.kind == "time":
        raise checker.error(
            "E0412",
            f"only what is kept can be read at another token than '{time}'",
            given.span,
            hint=f"what was before is cached along index s : history {time}, and read so:\n"
            f"cached u[s,...] = ..., and then u[{time}-1,...]\n"
            f"what is ahead is an input: def main(token[{time}] of w, "
            f"after[{time}] = token[{time} + 1])",
        )
    indices = [(sign, i) for sign, e in terms if (i := _index(checker, e)) and i is not time]
    if times != [1] or len(indices) > 1 or any(i.kind != "plain" for _, i in indices):
        raise checker.error(
            "E0412",
            f"this is no token before '{time}'",
            given.span,
            hint=f"tokens before are {time}-1, {time}-i, {time}+c-n: one index and whole numbers",
        )
    offset = Extent.of(0)
    for sign, e in terms:
        if _index(checker, e) is None:
            offset = offset + checker.scope.extent(e) * sign
    sign, index = indices[0] if indices else (1, None)
    if index is not None:
        offset = offset + index.start * sign
    shift = Shift(time, index, sign, offset, given.span)
    ahead = furthest(shift).constant
    if ahead is not None and ahead > 0:
        raise checker.error(
            "E0412",
            f"nothing is read after '{time}': this reaches {ahead} ahead",
            given.span,
            hint=f"what is ahead is an input: def main(token[{time}] of w, "
            f"after[{time}] = token[{time} + 1])",
        )
    return shift


def furthest(shift: Shift) -> Extent:
    """The latest token that a shift reads, counted from its time."""
    if shift.index is None or shift.sign < 0:
        return shift.offset
    return shift.offset + shift.index.extent - 1


def _terms(e: ast.Expr, sign: int) -> list[tuple[int, ast.Expr]]:
    match e:
        case ast.Binary(op="+" | "-" as op, left=left, right=right):
            return _terms(left, sign) + _terms(right, sign if op == "+" else -sign)
        case ast.Group() if e.inner is not None:
            return _terms(e.inner, sign)
        case ast.Unary(op="-", operand=operand):
            return _terms(operand, -sign)
    return [(sign, e)]


def _index(checker: Checker, e: ast.Expr) -> Index | None:
    match e:
        case ast.Ref(name=name, member=None, subscripts=None):
            binding = checker.find(name.text)
            if binding is None or binding.kind != "index":
                return checker.scope.find_index(name.text)
    return None
