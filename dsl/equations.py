"""Checks the expressions of equations: what each names, and which indices it ranges over."""

from __future__ import annotations

from dataclasses import dataclass

from dsl import syntax as ast
from dsl.calls import Signature, Used, check_call
from dsl.diagnostics import Diagnostics, Span, counted, near
from dsl.files import exporter
from dsl.left_out import left_out
from dsl.primitives import BUILTINS
from dsl.products import check_product, check_sum, quoted, shown_axes, union
from dsl.recurrences import Scans, before, part
from dsl.scope import Failed, Scope
from dsl.subscripts import subscript, taken
from dsl.typed import (
    Axis,
    Contraction,
    Expr,
    Index,
    Iota,
    Map,
    Pick,
    Position,
    Product,
    Scalar,
    Sub,
    Value,
)

COMPARISONS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


@dataclass(frozen=True)
class Binding:
    """A name that an equation can read. ``of`` makes it an index value."""

    name: str
    role: str  # value, param, state
    axes: tuple[Axis, ...]
    span: Span
    kind: str = "number"
    of: Index | None = None
    reads: frozenset[str] = frozenset({"value"})  # see products.reads


class Checker:
    """Checks the expressions of one def or function. ``bound`` are the axes that are not summed:
    those on the left and those of enclosing reducers."""

    def __init__(self, scope: Scope, values: dict[str, Binding]):
        self.scope = scope
        self.values = values
        self.left: frozenset[Axis] = frozenset()
        self.reduced: frozenset[Axis] = frozenset()
        self.later: dict[str, Span] = {}  # names this def defines further down
        self.failed: set[str] = set()  # names whose own equation is wrong
        self.uses: dict[str, Used] = {}  # used blocks; of an array in pieces, the first
        self.pieces: dict[str, list[Used]] = {}
        self.defs: dict[str, Signature] = {}  # this block's own
        self.defining = ""  # what the equation at hand defines
        self.conditional: dict[str, Span] = {}  # names declared under conditions, wherever
        self.scans = Scans()
        self.subscripted = ""  # the value whose subscripts are looked at

    @property
    def found(self) -> Diagnostics:
        return self.scope.found

    def find(self, name: str) -> Binding | None:
        return self.values.get(name)

    def error(self, code: str, message: str, span: Span, label: str = "", **rest: object) -> Failed:
        self.found.error(code, message, span, label, **rest)  # type: ignore[arg-type]
        return Failed()

    # -- expressions -----------------------------------------------------------------------------

    def expr(self, e: ast.Expr) -> Expr:
        """The typed form of ``e``.

        Raises:
            Failed: a mistake in it has been reported.
        """
        match e:
            case ast.Literal(value=value):
                if isinstance(value, str) or value is None:
                    shown = f'"{value}"' if isinstance(value, str) else "null"
                    raise self.error("E0601", f"{shown} cannot stand in an equation", e.span)
                return self._scalar(e, "bool" if isinstance(value, bool) else "number")
            case ast.Ref():
                return self._ref(e)
            case ast.Call():
                return check_call(self, e)
            case ast.Group():
                if e.inner is None:
                    raise self.error(
                        "E0401",
                        "a product of indices stands only in brackets",
                        e.span,
                        hint="an index that takes both is declared: index e = (g,m)",
                    )
                return self.expr(e.inner)
            case ast.Choose():
                return self.compile_time(e)
            case ast.Unary(op="not", operand=operand):
                arg = self._want(self.expr(operand), "bool")
                return Map(e.span, arg.free, "bool", fn="not", args=(arg,))
            case ast.Unary(operand=operand):
                arg = self._want(self.expr(operand), "number")
                if isinstance(arg, Scalar):
                    return self._scalar(e, "number")
                return Map(e.span, arg.free, fn="neg", args=(arg,))
            case ast.Binary(op="*" | "/"):
                return check_product(self, e)
            case ast.Binary(op="+" | "-"):
                return check_sum(self, e)
            case ast.Binary(op="^"):
                return self._map("pow", e, "number", "number")
            case ast.Binary(op="and" | "or" as op):
                return self._map(op, e, "bool", "bool")
            case ast.Binary(op=op):
                return self._map(COMPARISONS[op], e, "number", "bool")
        raise self.error("E0601", "this cannot stand in an equation", e.span)

    def compile_time(self, e: ast.Expr) -> Scalar:
        """An expression that the constants decide. Its value waits for them, its names do not.

        Raises:
            Failed: it reads something else (reported).
        """
        values = {n: b.span for n, b in self.values.items()} | self.later
        reads = self.scope.readable(values, self.failed)
        if isinstance(e, ast.Choose):
            reads.instead = "between values chooses where(condition, a, b)"
        if not reads.check(e):
            raise Failed
        return self._scalar(e, "bool" if _is_truth(e) else "number")

    def _scalar(self, e: ast.Expr, kind: str) -> Scalar:
        return Scalar(e.span, (), kind, value=e, scope=self.scope.consts)

    def _want(self, value: Expr, kind: str) -> Expr:
        """``value`` if it is a number (or truth value) as wanted; positions count as numbers."""
        given = "number" if value.kind == "index" else value.kind
        if given != kind:
            names = {"number": "a number", "bool": "a truth value"}
            raise self.error(
                "E0602", f"{names[kind]} is expected here", value.span, f"this is {names[given]}"
            )
        return value

    def both(self, e: ast.Binary) -> tuple[Expr, Expr]:
        """Both sides checked, so that mistakes on each are reported."""
        left, right = self.all((e.left, e.right))
        return left, right

    def all(self, exprs: tuple[ast.Expr, ...]) -> list[Expr]:
        out: list[Expr] = []
        failed = False
        for e in exprs:
            try:
                out.append(self.expr(e))
            except Failed:
                failed = True
        if failed:
            raise Failed
        return out

    def _map(self, fn: str, e: ast.Binary, takes: str, gives: str) -> Expr:
        left, right = self.both(e)
        self._want(left, takes)
        self._want(right, takes)
        if isinstance(left, Scalar) and isinstance(right, Scalar):
            return self._scalar(e, gives)
        return Map(e.span, union(left.free, right.free), gives, fn=fn, args=(left, right))

    # -- names -----------------------------------------------------------------------------------

    def _ref(self, e: ast.Ref) -> Expr:
        name = e.name.text
        if e.member is not None:
            raise self.error("E0208", f"'{name}.{e.member.text}' is not a value", e.span)
        binding = self.find(name)
        if binding is not None:
            part(self, e)
            return self.value(binding, e)
        if name in self.scans.states:
            return before(self, e)
        if name == "position":
            return self._position(e)
        if e.subscripts is None:
            index = self.scope.find_index(name)
            if index is not None and not (
                self.scope.is_constant(name) and name not in self.scope.known_indices()
            ):
                if index.kind != "plain":
                    raise self.error(
                        "E0411",
                        f"'{name}' has no numbers of its own: a step may begin anywhere",
                        e.span,
                        hint=f"where a token stands in its sequence is position[{name}]",
                    )
                return Iota(e.span, (index,), index=index)
            if self.scope.is_constant(name):
                return self._scalar(e, "number")
        elif self.scope.is_constant(name):
            raise self.error("E0401", f"'{name}' is a constant and has no indices", e.span)
        raise self._unknown(e.name)

    def _position(self, e: ast.Ref) -> Expr:
        if e.subscripts is None or len(e.subscripts) != 1:
            raise self.error(
                "E0401", "positions are those of one index", e.span, hint="write position[t]"
            )
        axis = self.scope.axis(e.subscripts[0])
        if not isinstance(axis, Index) or axis.kind == "plain":
            raise self.error(
                "E0411",
                "only time and history have positions",
                e.span,
                f"'{axis}' is neither",
                hint=f"the numbers of an index are its name: {axis}"
                if isinstance(axis, Index)
                else "",
            )
        return Position(e.span, (axis,), index=axis)

    def _unknown(self, name: ast.Name) -> Failed:
        text = name.text
        if text in self.failed or self.scope.is_broken(text):
            return Failed()
        self.failed.add(text)  # told once in this def
        if text == self.defining:
            return self.error("E0504", f"'{text}' is used in its own definition", name.span)
        if text in self.later:
            return self.error(
                "E0504",
                f"'{text}' is used before it is defined",
                name.span,
                notes=[(self.later[text], "defined here")],
            )
        if text in self.uses or text in self.defs or text in BUILTINS:
            hint = f"call it: {text}(...)"
            return self.error("E0208", f"'{text}' is not a value", name.span, hint=hint)
        if text in self.scope.unit.visible:
            block = isinstance(self.scope.unit.visible[text][0], ast.Block)
            hint = f"use it first: use inner = {text}[...]" if block else f"call it: {text}(...)"
            return self.error("E0208", f"'{text}' is not a value", name.span, hint=hint)
        known = [*self.values, *self.scope.known_indices(), *self.scope.context.constants]
        known += [*self.scope.consts.settings, *self.scope.consts.local]
        elsewhere = self.conditional.get(text)
        return self.error(
            "E0204",
            f"nothing is called '{text}'" if elsewhere is None else f"'{text}' is not always there",
            name.span,
            notes=[(elsewhere, "declared here, under a condition")],
            hint="" if elsewhere is not None else near(text, known) or exporter(text, "const"),
        )

    def _in_order(self, binding: Binding, given: tuple[ast.Subscript, ...], span: Span) -> None:
        """The declared indices in another order are one mistake, not one for each place."""
        declared = {str(axis): axis for axis in binding.axes}
        written = [sub.span.text.replace(" ", "") for sub in given]
        if set(written) != set(declared) or written == list(declared):
            return
        if any(declared[w].size != a.size for w, a in zip(written, binding.axes, strict=True)):
            order = f"{binding.name}[{','.join(declared)}]"
            raise self.error(
                "E0402",
                f"the indices of '{binding.name}' stand in another order",
                span,
                f"declared as {order}",
                notes=[(binding.span, "declared here")],
                hint="nothing is transposed: names alone say what is summed",
            )

    def _once(self, subs: list[Sub], e: ast.Ref) -> None:
        """No index stands in two places of one value, whose diagonal that would be."""
        seen: set[Axis] = set()
        for sub in subs:
            own = [] if isinstance(sub, Pick) else taken(sub)
            for axis in own:
                if axis in seen:
                    raise self.error(
                        "E0409",
                        f"'{axis}' stands twice among the indices of one value",
                        e.span,
                        hint="for the diagonal, take a second index i of the same extent and sum "
                        f"where(i == {axis}, ..., 0) over it",
                    )
            seen.update(own)

    def value(self, binding: Binding, e: ast.Ref) -> Expr:
        """A named value with its subscripts.

        Raises:
            Failed: they do not fit (reported).
        """
        given = e.subscripts or ()
        if len(given) != len(binding.axes):
            declared = ", ".join(map(str, binding.axes))
            written = f"{binding.name}[{declared}]" if binding.axes else binding.name
            has = counted(len(binding.axes), "index", "indices")
            here = (
                f"{'none' if not given else len(given)} {'is' if len(given) < 2 else 'are'} given"
            )
            raise self.error(
                "E0401",
                f"'{binding.name}' has {has}, and {here}",
                e.span,
                f"declared as {written}",
                notes=[(binding.span, "declared here")],
            )
        self._in_order(binding, given, e.span)
        self.subscripted = binding.name
        subs: list[Sub] = []
        failed = False
        for axis, sub in zip(binding.axes, given, strict=True):
            try:
                subs.append(subscript(self, axis, sub, binding.span))
            except Failed:
                failed = True
        if failed:
            raise Failed
        self._once(subs, e)
        free = union(*(tuple(taken(s)) for s in subs))
        return Value(
            e.span,
            free,
            binding.kind,
            binding.of,
            name=binding.name,
            role=binding.role,
            axes=binding.axes,
            subscripts=tuple(subs),
        )

    # -- equations -------------------------------------------------------------------------------

    def equation(self, e: ast.Equation, left: tuple[Axis, ...], shown: str) -> Expr:
        """The right side of ``e``, which must range over exactly the axes on the left."""
        self.scans.reading.clear()
        return self.right_side(e.value, e.name, left, shown)

    def right_side(
        self, given: ast.Expr, name: ast.Name, left: tuple[Axis, ...], shown: str
    ) -> Expr:
        """An expression that defines ``name`` along ``left``."""
        wanted = union(*(_loose(axis) for axis in left))
        self.defining = name.text
        self.left = frozenset(wanted) | _aliases(wanted)
        self.reduced = frozenset()
        value = self.expr(given)
        self.matches(value, wanted, given.span, name.span, shown)
        return value

    def matches(
        self, value: Expr, wanted: tuple[Axis, ...], span: Span, left: Span, shown: str
    ) -> None:
        extra = [a for a in value.free if a not in wanted]
        missing = [a for a in wanted if a not in value.free]
        if extra:
            stands = "stand" if len(extra) > 1 else "stands"
            where = "in one factor only" if isinstance(value, Contraction) else "on the right"
            raise self.error(
                "E0405",
                f"{quoted(extra)} {stands} {where} and not on the left",
                span,
                f"ranges over {shown_axes(value.free)}",
                notes=[(left, f"the left side is {shown}")],
                hint=self._chained(extra) or left_out(value, extra, missing, wanted, shown),
            )
        if missing and (value.free or not isinstance(value, Scalar)):
            names = ", ".join(map(str, missing))
            raise self.error(
                "E0406",
                f"the right side lacks {quoted(missing)} of the left side",
                span,
                f"ranges over {shown_axes(value.free)}",
                notes=[(left, f"the left side is {shown}")],
                hint=f"if it is meant to be repeated, say so: broadcast[{names}](...)",
            )

    def _chained(self, extra: list[Axis]) -> str:
        """The hint where all blocks of an array were run at once and no index says what for."""
        for name, pieces in self.pieces.items():
            for axis in extra:
                if any(used.use.array is axis for used in pieces):
                    return f"to run the blocks one after another: chain[{axis}]({name}, ...)"
        return ""


def _loose(axis: Axis) -> tuple[Axis, ...]:
    """What a right side ranges over for one place on the left: a product's parts, one by one."""
    if isinstance(axis, Product):
        return tuple(a for part in axis.parts for a in _loose(part))
    return (axis,)


def _aliases(axes: tuple[Axis, ...]) -> frozenset[Axis]:
    """What indices like ``e = (g, m)`` stand for is on the left with them."""
    out: set[Axis] = set()
    for axis in axes:
        if isinstance(axis, Index) and axis.alias is not None:
            out |= set(_loose(axis.alias))
    return frozenset(out)


def _is_truth(e: ast.Expr) -> bool:
    """Is a compile-time expression a truth value by its form?"""
    match e:
        case ast.Literal(value=bool()) | ast.Unary(op="not"):
            return True
        case ast.Binary(op=op):
            return op in COMPARISONS or op in ("and", "or")
        case ast.Choose(then=then):
            return _is_truth(then)
        case ast.Group() if e.inner is not None:
            return _is_truth(e.inner)
    return False
