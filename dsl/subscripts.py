"""How a value's declared axes are subscripted: whole, in parts, taken apart, picked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.diagnostics import Span
from dsl.extents import Extent, ExtentError
from dsl.scope import Failed, atoms, is_known
from dsl.shifts import shifted
from dsl.typed import (
    At,
    Axis,
    Index,
    Part,
    Pick,
    Position,
    Product,
    Shift,
    Split,
    Sub,
    Sum,
    Take,
)

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
        case Shift(time=time, index=index):
            return [time] if index is None else [time, index]
    return []


def _sum(checker: Checker, axis: Axis, wanted: Sum, span: Span, declared: Span | None) -> Sub:
    if isinstance(axis, Index) and isinstance(axis.alias, Sum):
        axis = axis.alias
    if axis == wanted:
        return Take(wanted)
    if isinstance(axis, Sum) and [p.size for p in axis.parts] == [p.size for p in wanted.parts]:
        return Take(wanted)
    for part in axis.parts if isinstance(axis, Sum) else ():
        if (part.alias if isinstance(part, Index) else part) == wanted:  # a sum within a sum
            return Part(part, Take(wanted))
    if isinstance(axis, Index) and (axis.kind, axis.alias) == ("plain", None):
        if not is_known(wanted.size):
            raise Failed
        if wanted.size == axis.extent:
            return Take(wanted)
    raise _mismatch(checker, axis, str(wanted), span, declared, wanted=wanted)


def _one(checker: Checker, axis: Axis, given: ast.Expr, declared: Span | None) -> Sub:
    shift = shifted(checker, axis, given)
    if shift is not None:
        return shift
    match given:
        case ast.Group(items=(only,)) if given.inner is None and len(only.parts) > 1:
            return subscript(checker, axis, only, declared)
        case ast.Group(items=items) if given.inner is None:
            return _product(checker, axis, items, given.span, declared)
        case ast.Group():
            assert given.inner is not None
            return _one(checker, axis, given.inner, declared)
        case ast.Literal(value=int()) if not isinstance(given.value, bool):
            return _at(checker, axis, given)
        case ast.Unary(op="-", operand=ast.Literal(value=int(value))):
            raise _outside(checker, axis, -value, given.span)
        case ast.Ref(name=name, member=None, subscripts=None):
            binding, index = checker.find(name.text), checker.scope.find_index(name.text)
            # A number cannot be a position, so a value of that kind hides no index.
            if index is not None and (binding is None or binding.kind != "index"):
                return _index(checker, axis, index, given.span, declared)
            if binding is None:
                if checker.scope.is_constant(name.text):
                    return _at(checker, axis, given)
                checker.scope.index(name)  # reports it
        case ast.Binary(op="+" | "-", left=ast.Ref(name=name, subscripts=None)):
            if checker.find(name.text) is None and checker.scope.find_index(name.text) is axis:
                raise checker.error(
                    "E0410",
                    f"reading a value moved along '{axis}' is not built yet",
                    given.span,
                    hint="an input may be another one moved along time: "
                    "def main(token[t] of w, after[t] = token[t + 1])",
                )
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
    if kinds == {"plain"} and axis.size == index.extent:
        return Take(index)
    raise _mismatch(checker, axis, index.name, span, declared, index)


def _product(
    checker: Checker,
    axis: Axis,
    items: tuple[ast.Subscript, ...],
    span: Span,
    declared: Span | None,
) -> Sub:
    if isinstance(axis, Index) and isinstance(axis.alias, (Product, Sum)):
        axis = axis.alias
    if isinstance(axis, Sum):
        # (h, n) of a stack of products: that very one, else the one that has as many parts
        products = {p: whole for p in axis.parts if (whole := _factors(p, len(items)))}
        given = [item.span.text.replace(" ", "") for item in items]
        same = [p for p, whole in products.items() if [str(a) for a in whole] == given]
        for part in same or list(products)[:1]:
            return Part(part, _product(checker, part, items, span, declared))
    if isinstance(axis, Product):
        if len(axis.parts) != len(items):
            raise _mismatch(checker, axis, span.text, span, declared)
        inner = tuple(
            subscript(checker, a, i, declared) for a, i in zip(axis.parts, items, strict=True)
        )
        return Split(axis.parts, inner)
    if not isinstance(axis, Index) or axis.kind != "plain":
        raise _mismatch(checker, axis, span.text, span, declared)
    return _split(checker, axis, items, span, declared)


def _factors(axis: Axis, count: int) -> tuple[Axis, ...]:
    """The factors of a product, or of an index that stands for one, if it has so many."""
    if isinstance(axis, Index) and axis.alias is not None:
        axis = axis.alias
    return axis.parts if isinstance(axis, Product) and len(axis.parts) == count else ()


def _split(
    checker: Checker,
    axis: Index,
    items: tuple[ast.Subscript, ...],
    span: Span,
    declared: Span | None,
) -> Sub:
    """A plain index seen as a product: ``x[(p, o)]``, ``x[(p, 0)]``, if the extents multiply up."""
    known = [_place(checker, item) for item in items]
    if not is_known(axis.size) or not all(i is None or is_known(i.extent) for i in known):
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
        raise checker.error(
            "E0402",
            f"{span.text} does not take '{axis}' apart",
            span,
            f"has extent {rest}, and '{axis}' has {axis.extent}",
            notes=[
                (declared, f"declared with '{axis}' here"),
                (axis.span, f"'{axis}' is declared here"),
            ],
            hint="the extents of the parts must multiply up to it, whatever the constants are",
        )
    axes = tuple(i if i is not None else Index("_", missing) for i in known)
    inner = tuple(
        Take(i) if i is not None else _at(checker, axes[n], items[n].parts[0])
        for n, i in enumerate(known)
    )
    return Split(axes, inner)


def _place(checker: Checker, item: ast.Subscript) -> Index | None:
    """What stands in one place of a product: an index, or a fixed position (None)."""
    match item.parts:
        case (ast.Literal(value=int(value)),) if item.to is None and not isinstance(value, bool):
            return None
        case (ast.Ref(name=name, member=None, subscripts=None),) if item.to is None:
            index = checker.scope.index(name)
            if index.kind == "plain":
                return index
    raise checker.error("E0401", "an index or a whole number is expected here", item.span)


def _at(checker: Checker, axis: Axis, given: ast.Expr) -> Sub:
    if isinstance(axis, Index) and axis.kind != "plain":
        raise checker.error(
            "E0411",
            f"'{axis}' has no fixed positions: a step may begin anywhere",
            given.span,
            hint=f"where a token stands in its sequence is position[{axis}]",
        )
    size = axis.size.constant
    match given:
        case ast.Literal(value=int(value)) if size is not None and value >= size:
            raise _outside(checker, axis, value, given.span)
    return At(given, checker.scope.consts)


def _outside(checker: Checker, axis: Axis, value: int, span: Span) -> Failed:
    size = axis.size.constant
    reach = f"from 0 to {size - 1}" if size is not None else "from 0 on"
    return checker.error("E0401", f"'{axis}' counts {reach}", span, f"{value} is outside")


def _pick(checker: Checker, axis: Axis, given: ast.Expr, declared: Span | None) -> Sub:
    value = checker.expr(given)
    if value.kind != "index" or value.of is None:
        what = "truth value" if value.kind == "bool" else "number"
        raise checker.error(
            "E0404",
            f"this is a {what}, not a position of '{axis}'",
            given.span,
            hint="positions come from argtop, or from an input declared 'of' an index"
            if not isinstance(value, Position)
            else f"what stands there: where({axis} == {given.span.text}, 1, 0), times the value",
        )
    target = axis if isinstance(axis, Index) else None
    if value.of is axis or (
        target is not None and target.alias is not None and target.alias == value.of.alias
    ):
        return Pick(value)
    if value.of.alias is not None and value.of.alias == axis:
        return Pick(value)
    raise checker.error(
        "E0404",
        f"this picks a position of '{value.of}', and '{axis}' stands here",
        given.span,
        f"expected a position of '{axis}'",
        notes=[
            (declared, f"declared with '{axis}' here"),
            (value.of.span, f"'{value.of}' is declared here"),
        ],
    )


def _mismatch(
    checker: Checker,
    axis: Axis,
    given: str,
    span: Span,
    declared: Span | None,
    index: Index | None = None,
    wanted: Sum | None = None,
) -> Failed:
    if not is_known(axis.size) or (index is not None and not is_known(index.extent)):
        return Failed()
    notes: list[tuple[Span | None, str]] = [(declared, f"declared with '{axis}' here")]
    hint = ""
    if index is not None:
        kind = axis.kind if isinstance(axis, Index) else "plain"
        if (kind, index.kind) == ("time", "history"):
            hint = f"what is read along a history is cached first: cached name[{index},...] = ..."
        elif (kind, index.kind) == ("history", "time"):
            hint = f"what is cached is read along its history, name[{axis},...], or before: "
            hint += f"name[{index}-1,...]"
        elif isinstance(axis, Index) and kind == index.kind == "plain":
            hint = (
                f"'{index}' has extent {index.extent}, and '{axis}' has {axis.extent}: "
                "they must be equal whatever the constants are"
            )
    elif wanted is not None and isinstance(axis, Index) and axis.kind == "plain":
        hint = (
            f"the parts have {wanted.size} together, and '{axis}' has {axis.extent}: "
            "they must be equal whatever the constants are"
        )
    return checker.error(
        "E0402",
        f"'{given}' stands where '{axis}' is declared",
        span,
        f"expected {axis}",
        notes=notes,
        hint=hint,
    )
