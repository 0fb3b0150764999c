"""How a value's declared axes are subscripted: whole, in parts, taken apart, picked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.diagnostics import Span
from dsl.extents import Extent, ExtentError
from dsl.scope import Failed, atoms
from dsl.typed import At, Axis, Index, Part, Pick, Product, Split, Sub, Sum, Take

if TYPE_CHECKING:
    from dsl.equations import Checker


def subscript(checker: Checker, axis: Axis, given: ast.Subscript, declared: Span | None) -> Sub:
    """How ``given`` takes ``axis``; ``declared`` is where the value got that axis.

    Raises:
        Failed: it does not fit (reported).
    """
    if given.to is not None:
        checker.found.error("E0401", "'->' belongs to top and argtop", given.span)
        raise Failed
    if len(given.parts) > 1:
        wanted = Sum(tuple(checker.scope.axis_of(p) for p in given.parts))
        return _sum(checker, axis, wanted, given.span, declared)
    return _one(checker, axis, given.parts[0], declared)


def taken(sub: Sub) -> list[Axis]:
    """The axes that a subscript leaves the value ranging over."""
    match sub:
        case Take(axis=axis):
            return [axis]
        case Part(inner=inner):
            return taken(inner)
        case Split(inner=inners):
            return [a for inner in inners for a in taken(inner)]
        case Pick(value=value):
            return list(value.free)
    return []


def _sum(checker: Checker, axis: Axis, wanted: Sum, span: Span, declared: Span | None) -> Sub:
    if isinstance(axis, Index) and isinstance(axis.alias, Sum):
        axis = axis.alias
    if axis == wanted:
        return Take(wanted)
    if isinstance(axis, Sum) and len(axis.parts) == len(wanted.parts):
        if all(p.size == q.size for p, q in zip(axis.parts, wanted.parts, strict=True)):
            return Take(wanted)
    raise _mismatch(checker, axis, str(wanted), span, declared)


def _one(checker: Checker, axis: Axis, given: ast.Expr, declared: Span | None) -> Sub:
    match given:
        case ast.Group(items=items) if given.inner is None:
            return _product(checker, axis, items, given.span, declared)
        case ast.Group():
            assert given.inner is not None
            return _one(checker, axis, given.inner, declared)
        case ast.Literal(value=int()) if not isinstance(given.value, bool):
            return _at(checker, axis, given)
        case ast.Ref(name=name, member=None, subscripts=None):
            if checker.find(name.text) is None:
                index = checker.scope.find_index(name.text)
                if index is not None:
                    return _index(checker, axis, index, given.span, declared)
                if checker.scope.is_constant(name.text):
                    return _at(checker, axis, given)
                checker.scope.index(name)  # reports it
    return _pick(checker, axis, given, declared)


def _index(checker: Checker, axis: Axis, index: Index, span: Span, declared: Span | None) -> Sub:
    if axis is index:
        return Take(index)
    whole = axis.alias if isinstance(axis, Index) and isinstance(axis.alias, Sum) else axis
    if isinstance(whole, Sum):
        for part in whole.parts:
            if part is index:
                return Part(part, Take(index))
        for part in whole.parts:
            if isinstance(part, (Sum, Product)) and index in atoms(part):
                return Part(part, _index(checker, part, index, span, declared))
    if index.alias is not None and index.alias == axis:
        return Take(index)
    if isinstance(axis, Index) and axis.alias is not None and axis.alias == index.alias:
        return Take(index)
    kinds = {axis.kind if isinstance(axis, Index) else "plain", index.kind}
    if kinds == {"plain"} and not isinstance(axis, Sum) and axis.size == index.extent:
        return Take(index)
    raise _mismatch(checker, axis, index.name, span, declared, index)


def _product(
    checker: Checker,
    axis: Axis,
    items: tuple[ast.Subscript, ...],
    span: Span,
    declared: Span | None,
) -> Sub:
    if isinstance(axis, Index) and isinstance(axis.alias, Product):
        axis = axis.alias
    if isinstance(axis, Sum):
        for part in axis.parts:  # (h, n) of a stack of products
            if isinstance(part, Product) and len(part.parts) == len(items):
                return Part(part, _product(checker, part, items, span, declared))
    if isinstance(axis, Product):
        if len(axis.parts) != len(items):
            raise _mismatch(checker, axis, f"a product of {len(items)}", span, declared)
        inner = tuple(
            subscript(checker, a, i, declared) for a, i in zip(axis.parts, items, strict=True)
        )
        return Split(axis.parts, inner)
    assert isinstance(axis, Index)
    return _split(checker, axis, items, span, declared)


def _split(
    checker: Checker,
    axis: Index,
    items: tuple[ast.Subscript, ...],
    span: Span,
    declared: Span | None,
) -> Sub:
    """A plain index seen as a product: ``x[(p, o)]``, ``x[(p, 0)]``. The extents must multiply up."""
    known: list[Index | None] = []
    for item in items:
        expr = item.parts[0] if len(item.parts) == 1 else None
        if isinstance(expr, ast.Literal):
            known.append(None)
        elif expr is not None and isinstance(expr, ast.Ref) and expr.subscripts is None:
            known.append(checker.scope.index(expr.name))
        else:
            checker.found.error("E0401", "an index or a number is expected here", item.span)
            raise Failed
    rest = Extent.of(1)
    for index in known:
        rest = rest * (index.extent if index is not None else 1)
    open_places = known.count(None)
    try:
        missing = axis.extent / rest if open_places == 1 else Extent.of(1)
    except ExtentError:
        missing = Extent.of(0)
    if open_places > 1 or rest * missing != axis.extent or (open_places and not missing.constant):
        names = ", ".join(i.name if i else "_" for i in known)
        checker.found.error(
            "E0402",
            f"({names}) does not take '{axis.name}' apart",
            span,
            f"extent {rest}, and '{axis.name}' has {axis.extent}",
            notes=[(declared, f"declared with '{axis.name}' here")],
        )
        raise Failed
    axes = tuple(i if i is not None else Index("_", missing) for i in known)
    inner = tuple(
        Take(i) if i is not None else _at(checker, axes[n], items[n].parts[0])
        for n, i in enumerate(known)
    )
    return Split(axes, inner)


def _at(checker: Checker, axis: Axis, given: ast.Expr) -> Sub:
    size = axis.size.constant
    if isinstance(given, ast.Literal) and isinstance(given.value, int) and size is not None:
        if not 0 <= given.value < size:
            checker.found.error(
                "E0401",
                f"'{axis}' runs from 0 to {size - 1}",
                given.span,
                f"{given.value} is outside",
            )
            raise Failed
    return At(given, checker.scope.consts)


def _pick(checker: Checker, axis: Axis, given: ast.Expr, declared: Span | None) -> Sub:
    value = checker.expr(given, inside_subscript=True)
    if value.kind != "index" or value.of is None:
        checker.found.error(
            "E0404",
            "this is a number, not a position of an index",
            given.span,
            hint="positions come from argtop, or from an input declared 'of' an index",
        )
        raise Failed
    target = axis if isinstance(axis, Index) else None
    if value.of is axis or (
        target is not None and target.alias is not None and target.alias == value.of.alias
    ):
        return Pick(value)
    if value.of.alias is not None and value.of.alias == axis:
        return Pick(value)
    checker.found.error(
        "E0404",
        f"this picks a position of '{value.of.name}', and '{axis}' stands here",
        given.span,
        notes=[
            (declared, f"declared with '{axis}' here"),
            (value.of.span, f"'{value.of.name}' is declared here"),
        ],
    )
    raise Failed


def _mismatch(
    checker: Checker,
    axis: Axis,
    given: str,
    span: Span,
    declared: Span | None,
    index: Index | None = None,
) -> Failed:
    notes: list[tuple[Span | None, str]] = [(declared, f"declared with '{axis}' here")]
    hint = ""
    if index is not None:
        kinds = {index.kind, axis.kind if isinstance(axis, Index) else "plain"}
        if kinds == {"time", "history"}:
            hint = "a value over time is read along its history once it is marked: cached name[s,..] = ..."
        elif isinstance(axis, Index) and index.kind == axis.kind == "plain":
            hint = (
                f"'{given}' has extent {index.extent}, '{axis}' has {axis.extent}: "
                "only provably equal extents may stand for each other"
            )
    checker.found.error(
        "E0402",
        f"'{given}' stands where '{axis}' is declared",
        span,
        f"expected {axis}",
        notes=notes,
        hint=hint,
    )
    return Failed()
