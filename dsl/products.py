"""Checks sums and products: what a product sums, and which terms go together.

The rule of summation: in one chain of ``*`` (and ``/``), an index that stands in at least two
factors and is not on the left is summed. Arguments of functions and terms of ``+`` are chains of
their own, decided from the inside out. Nothing is ever broadcast or summed silently where the
author may have meant something else; docs/language.md gives the reasons.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.diagnostics import Span
from dsl.scope import Failed
from dsl.subscripts import taken
from dsl.typed import (
    Axis,
    Broadcast,
    Choice,
    Contraction,
    Expr,
    Factor,
    Index,
    Iota,
    Join,
    Map,
    Pick,
    Position,
    Reduce,
    Scalar,
    Value,
)

if TYPE_CHECKING:
    from dsl.equations import Checker


def union(*frees: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes in order of first occurrence, each once."""
    return tuple(dict.fromkeys(axis for free in frees for axis in free))


def check_sum(checker: Checker, e: ast.Binary) -> Expr:
    left, right = checker.both(e)
    checker._want(left, "number")
    checker._want(right, "number")
    if isinstance(left, Scalar) and isinstance(right, Scalar):
        return checker._scalar(e, "number")
    # A number without indices goes with anything; otherwise both sides range over the same,
    # but for what a term cannot range over.
    for lacking, other in (left, right), (right, left):
        missing = [a for a in other.free if a not in lacking.free]
        if not missing or not lacking.free or _may_lack(checker, lacking, missing):
            continue
        names, axes = quoted(missing), ", ".join(map(str, missing))
        raise checker.error(
            "E0406",
            f"this term lacks {names}, which the other term has",
            lacking.span,
            f"ranges over {shown_axes(lacking.free)}",
            notes=[(other.span, f"ranges over {shown_axes(other.free)}")],
            hint=f"if it is meant to be repeated, say so: broadcast[{axes}](...)\n"
            f"if the other term is to be summed over {names}, write sum[{axes}](...)",
        )
    return Map(
        e.span,
        union(left.free, right.free),
        fn="add" if e.op == "+" else "sub",
        args=(left, right),
    )


def _may_lack(checker: Checker, term: Expr, missing: list[Axis]) -> bool:
    """Is ``term`` the same along these axes by what it is? What positions and numbers of indices
    alone decide is the same along everything else; what is stored, for all tokens."""
    decided_by = reads(checker, term)
    if "value" in decided_by:
        return False
    return not decided_by or all(isinstance(a, Index) and a.kind != "plain" for a in missing)


def reads(checker: Checker, e: Expr) -> frozenset[str]:
    """What decides an expression: a "value" of this token, what is "stored" (parameters and
    states), or, if empty, only constants, positions and the numbers of indices."""
    inner: list[Expr] = []
    found: frozenset[str] = frozenset()
    match e:
        case Scalar() | Iota() | Position():
            pass
        case Value(name=name, role=role, subscripts=subscripts):
            found = frozenset({"stored"})
            if role in ("value", "before"):
                known = checker.values.get(name)
                found = known.reads if known is not None else frozenset({"value"})
            inner += [s.value for s in subscripts if isinstance(s, Pick)]
        case Map(args=args) | Join(args=args):
            inner += args
        case Contraction(factors=factors):
            inner += [f.value for f in factors]
        case Reduce(arg=arg) | Choice(arg=arg) | Broadcast(arg=arg):
            inner.append(arg)
        case _:
            found = frozenset({"value"})
    return found.union(*(reads(checker, i) for i in inner))


def check_product(checker: Checker, e: ast.Binary) -> Expr:
    factors: list[Factor] = []
    groups: list[tuple[int, int, Span]] = []  # stretches of factors that stood in parentheses
    failed = not _flatten(checker, e, factors, groups, False)
    if failed:
        raise Failed
    for factor in factors:
        checker._want(factor.value, "number")
    counts: dict[Axis, list[int]] = {}
    for number, factor in enumerate(factors):
        for axis in factor.value.free:
            counts.setdefault(axis, []).append(number)
    bound = checker.left | checker.reduced
    over = tuple(a for a, at in counts.items() if len(at) > 1 and a not in bound)
    not_along_time(checker, over, e.span)
    for first, last, place in groups:
        for axis in over:
            inside = [n for n in counts[axis] if first <= n < last]
            if len(inside) > 1 and len(inside) < len(counts[axis]):
                outer = next(n for n in counts[axis] if not first <= n < last)
                raise checker.error(
                    "E0408",
                    f"'{axis}' would be summed inside the parentheses, and stands outside too",
                    place,
                    notes=[(factors[outer].value.span, f"'{axis}' stands here as well")],
                    hint=f"if '{axis}' is summed once over all factors, leave the parentheses out\n"
                    f"or give what is in them a name: a[{axis},...] = ...",
                )
    _check_parameters(checker, factors, over, e.span)
    free = tuple(a for a in counts if a not in over)
    return Contraction(e.span, free, factors=tuple(factors), over=over)


def not_along_time(checker: Checker, over: tuple[Axis, ...], span: Span) -> None:
    """Nothing is summed or chosen along time: how many tokens a step has differs between prefill
    and decode.

    Raises:
        Failed: something is (reported).
    """
    for axis in over:
        if isinstance(axis, Index) and axis.kind == "time":
            raise checker.error(
                "E0411",
                f"nothing sums along '{axis}', which runs over the tokens of one step",
                span,
                hint=f"if '{axis}' is to be kept, it stands on the left\n"
                "what sums over all tokens so far is cached and sums over their history:\n"
                f"index s : history {axis}, and then cached c[s,...] = ...",
            )


def _check_parameters(
    checker: Checker, factors: list[Factor], over: tuple[Axis, ...], span: Span
) -> None:
    if over:
        return
    for value in (f.value for f in factors):
        if not isinstance(value, Value) or value.role != "param":
            continue
        own = [a for s in value.subscripts if not isinstance(s, Pick) for a in taken(s)]
        others = {a for f in factors if f.value is not value for a in f.value.free}
        alone = [a for a in own if a not in others]
        # A number scales a matrix; a factor with all of its indices scales element by element.
        if len(own) < 2 or not others or not alone or checker.reduced.intersection(own):
            continue
        kept = [a for a in own if a in others and a in checker.left and isinstance(a, Index)]
        if kept:
            hint = (
                f"'{kept[0]}' stands on the left, so it is kept; what is to be summed has an index "
                f"of its own:\nindex i : size({kept[0]}), and then {value.name}[...,i] * ...[i]"
            )
        else:
            hint = (
                "an index that both factors share and the left side lacks is summed: "
                "is one misnamed?\nif each element is to be scaled, say so: "
                f"broadcast[{', '.join(map(str, alone))}](...)"
            )
        raise checker.error(
            "E0407",
            f"nothing is summed in this product with '{value.name}'",
            span,
            f"'{value.name}' ranges over {shown_axes(value.free)}",
            hint=hint,
        )


def _flatten(
    checker: Checker,
    e: ast.Expr,
    factors: list[Factor],
    groups: list[tuple[int, int, Span]],
    divides: bool,
) -> bool:
    """Collect the factors of a chain of products, looking through parentheses."""
    match e:
        case ast.Binary(op="*", left=left, right=right) if not divides:
            ok = _flatten(checker, left, factors, groups, False)
            return _flatten(checker, right, factors, groups, False) and ok
        case ast.Binary(op="/", left=left, right=right) if not divides:
            ok = _flatten(checker, left, factors, groups, False)
            return _flatten(checker, right, factors, groups, True) and ok
        case ast.Group() if not divides and e.inner is not None and _is_product(e.inner):
            first = len(factors)
            ok = _flatten(checker, e.inner, factors, groups, False)
            groups.append((first, len(factors), e.span))
            return ok
    try:
        factors.append(Factor(checker.expr(e), divides))
    except Failed:
        return False
    return True


def _is_product(e: ast.Expr) -> bool:
    if isinstance(e, ast.Group) and e.inner is not None:
        return _is_product(e.inner)
    return isinstance(e, ast.Binary) and e.op in "*/"


def shown_axes(axes: tuple[Axis, ...]) -> str:
    return f"[{', '.join(map(str, axes))}]" if axes else "no index"


def quoted(axes: list[Axis]) -> str:
    """``'t', 'd'``"""
    return ", ".join(f"'{a}'" for a in axes)
