"""Checks expressions: which indices each ranges over, and what a product sums.

The rule of summation: in one chain of ``*`` (and ``/``), an index that stands in at least two
factors and is not on the left is summed. Arguments of functions and terms of ``+`` are chains of
their own, decided from the inside out. Nothing is ever broadcast or summed silently where the
author may have meant something else; docs/language.md gives the reasons.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsl import syntax as ast
from dsl.calls import Signature, Used, check_call
from dsl.diagnostics import Diagnostics, Span, near
from dsl.scope import Failed, Scope, atoms
from dsl.subscripts import subscript, taken
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
    Product,
    Reduce,
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
    reads: frozenset[str] = frozenset({"value"})  # see Checker.reads


def union(*frees: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Axes in order of first occurrence, each once."""
    return tuple(dict.fromkeys(axis for free in frees for axis in free))


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

    @property
    def found(self) -> Diagnostics:
        return self.scope.found

    def find(self, name: str) -> Binding | None:
        return self.values.get(name)

    def error(self, code: str, message: str, span: Span, label: str = "", **rest: object) -> Failed:
        self.found.error(code, message, span, label, **rest)  # type: ignore[arg-type]
        return Failed()

    # -- expressions -----------------------------------------------------------------------------

    def expr(self, e: ast.Expr, inside_subscript: bool = False) -> Expr:
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
                        hint="x[(g,m)]",
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
                return self._product(e)
            case ast.Binary(op="+" | "-"):
                return self._sum(e)
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
        if not self.scope.readable(values, self.failed).check(e):
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
            return self._value(binding, e)
        if name == "position" and e.subscripts is not None and len(e.subscripts) == 1:
            axis = self.scope.axis(e.subscripts[0])
            if not isinstance(axis, Index) or axis.kind == "plain":
                raise self.error(
                    "E0402", "only time and history have positions", e.span, f"'{axis}' is neither"
                )
            return Position(e.span, (axis,), index=axis)
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

    def _unknown(self, name: ast.Name) -> Failed:
        text = name.text
        if text in self.failed or self.scope.is_broken(text):
            return Failed()
        if text in self.later:
            return self.error(
                "E0504",
                f"'{text}' is used before it is defined",
                name.span,
                notes=[(self.later[text], "defined here")],
            )
        known = [*self.values, *self.scope.known_indices(), *self.scope.context.constants]
        if text in self.scope.unit.visible or text in self.uses:
            return self.error(
                "E0208", f"'{text}' is not a value", name.span, hint=f"call it: {text}(...)"
            )
        return self.error("E0204", f"nothing is called '{text}'", name.span, hint=near(text, known))

    def _value(self, binding: Binding, e: ast.Ref) -> Expr:
        given = e.subscripts or ()
        if len(given) != len(binding.axes):
            declared = ", ".join(map(str, binding.axes))
            written = f"{binding.name}[{declared}]" if binding.axes else binding.name
            raise self.error(
                "E0401",
                f"'{binding.name}' has {_count(len(binding.axes), 'index', 'indices')}, not {len(given)}",
                e.span,
                f"declared as {written}",
                notes=[(binding.span, "declared here")],
            )
        subs: list[Sub] = []
        failed = False
        for axis, sub in zip(binding.axes, given, strict=True):
            try:
                subs.append(subscript(self, axis, sub, binding.span))
            except Failed:
                failed = True
        if failed:
            raise Failed
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

    # -- sums and products -----------------------------------------------------------------------

    def _sum(self, e: ast.Binary) -> Expr:
        left, right = self.both(e)
        self._want(left, "number")
        self._want(right, "number")
        if isinstance(left, Scalar) and isinstance(right, Scalar):
            return self._scalar(e, "number")
        # A number without indices goes with anything; otherwise both sides range over the same,
        # but for what a term cannot range over.
        for lacking, other in (left, right), (right, left):
            missing = [a for a in other.free if a not in lacking.free]
            if not missing or not lacking.free or self._may_lack(lacking, missing):
                continue
            names = ", ".join(f"'{a}'" for a in missing)
            raise self.error(
                "E0406",
                f"this term lacks {names}, which the other term has",
                lacking.span,
                f"ranges over {_axes(lacking.free)}",
                notes=[(other.span, f"ranges over {_axes(other.free)}")],
                hint=f"if it is meant to be repeated, say so: broadcast[{', '.join(map(str, missing))}](...)\n"
                f"if the other term is to be summed over {names}, write sum[{', '.join(map(str, missing))}](...)",
            )
        return Map(
            e.span,
            union(left.free, right.free),
            fn="add" if e.op == "+" else "sub",
            args=(left, right),
        )

    def _may_lack(self, term: Expr, missing: list[Axis]) -> bool:
        """Is ``term`` the same along these axes by what it is? What positions and numbers of indices
        alone decide is the same along everything else; what is stored, for all tokens."""
        reads = self.reads(term)
        if "value" in reads:
            return False
        return not reads or all(isinstance(a, Index) and a.kind != "plain" for a in missing)

    def reads(self, e: Expr) -> frozenset[str]:
        """What decides an expression: a "value" of this token, what is "stored" (parameters and
        states), or, if empty, only constants, positions and the numbers of indices."""
        inner: list[Expr] = []
        found: frozenset[str] = frozenset()
        match e:
            case Scalar() | Iota() | Position():
                pass
            case Value(name=name, role=role, subscripts=subscripts):
                found = self.values[name].reads if role == "value" else frozenset({"stored"})
                inner += [s.value for s in subscripts if isinstance(s, Pick)]
            case Map(args=args) | Join(args=args):
                inner += args
            case Contraction(factors=factors):
                inner += [f.value for f in factors]
            case Reduce(arg=arg) | Choice(arg=arg) | Broadcast(arg=arg):
                inner.append(arg)
            case _:
                found = frozenset({"value"})
        return found.union(*map(self.reads, inner))

    def _product(self, e: ast.Binary) -> Expr:
        factors: list[Factor] = []
        groups: list[tuple[int, int]] = []  # stretches of factors that stood in parentheses
        failed = not self._flatten(e, factors, groups, False)
        if failed:
            raise Failed
        for factor in factors:
            self._want(factor.value, "number")
        counts: dict[Axis, list[int]] = {}
        for number, factor in enumerate(factors):
            for axis in factor.value.free:
                counts.setdefault(axis, []).append(number)
        bound = self.left | self.reduced
        over = tuple(a for a, at in counts.items() if len(at) > 1 and a not in bound)
        self.not_along_time(over, e.span)
        for first, last in groups:
            for axis in over:
                inside = [n for n in counts[axis] if first <= n < last]
                if len(inside) > 1 and len(inside) < len(counts[axis]):
                    outer = next(n for n in counts[axis] if not first <= n < last)
                    raise self.error(
                        "E0408",
                        f"'{axis}' would be summed inside the parentheses, and stands outside too",
                        e.span,
                        notes=[(factors[outer].value.span, f"'{axis}' stands here as well")],
                        hint="give the product in parentheses a name of its own, or use two different indices",
                    )
        self._check_parameters(factors, over, e.span)
        free = tuple(a for a in counts if a not in over)
        return Contraction(e.span, free, factors=tuple(factors), over=over)

    def not_along_time(self, over: tuple[Axis, ...], span: Span) -> None:
        """Nothing is summed or chosen along time: how many tokens a step has differs between prefill
        and decode.

        Raises:
            Failed: something is (reported).
        """
        for axis in over:
            if isinstance(axis, Index) and axis.kind == "time":
                raise self.error(
                    "E0411",
                    f"nothing sums along '{axis}': it runs over the tokens of one step, however many these are",
                    span,
                    hint=f"if '{axis}' is to be kept, it stands on the left\n"
                    f"over all tokens so far: index s : history {axis}, then cached c[s,...] = ... "
                    "and sum over s",
                )

    def _check_parameters(self, factors: list[Factor], over: tuple[Axis, ...], span: Span) -> None:
        if over:
            return
        for factor in factors:
            value = factor.value
            if not isinstance(value, Value) or value.role != "param":
                continue
            own = [a for s in value.subscripts if not isinstance(s, Pick) for a in taken(s)]
            others = {a for f in factors if f is not factor for a in f.value.free}
            alone = [a for a in own if a not in others]
            # A number scales a matrix; a factor with all of its indices scales element by element.
            if len(own) < 2 or not others or not alone or self.reduced.intersection(own):
                continue
            raise self.error(
                "E0407",
                f"nothing is summed in this product with '{value.name}'",
                span,
                f"'{value.name}' ranges over {_axes(value.free)}",
                hint="an index that both factors share and the left side lacks is summed; is one misnamed?\n"
                f"if each element is to be scaled, say so: broadcast[{', '.join(map(str, alone))}](...)",
            )

    def _flatten(
        self, e: ast.Expr, factors: list[Factor], groups: list[tuple[int, int]], divides: bool
    ) -> bool:
        """Collect the factors of a chain of products, looking through parentheses."""
        match e:
            case ast.Binary(op="*", left=left, right=right) if not divides:
                ok = self._flatten(left, factors, groups, False)
                return self._flatten(right, factors, groups, False) and ok
            case ast.Binary(op="/", left=left, right=right) if not divides:
                ok = self._flatten(left, factors, groups, False)
                return self._flatten(right, factors, groups, True) and ok
            case ast.Group() if not divides and e.inner is not None and _is_product(e.inner):
                first = len(factors)
                ok = self._flatten(e.inner, factors, groups, False)
                groups.append((first, len(factors)))
                return ok
        try:
            factors.append(Factor(self.expr(e), divides))
        except Failed:
            return False
        return True

    # -- equations -------------------------------------------------------------------------------

    def equation(self, e: ast.Equation, left: tuple[Axis, ...], shown: str) -> Expr:
        """The right side of ``e``, which must range over exactly the axes on the left."""
        wanted = union(*(_loose(axis) for axis in left))
        self.left = frozenset(wanted) | _aliases(wanted)
        self.reduced = frozenset()
        value = self.expr(e.value)
        self.matches(value, wanted, e.value.span, e.name.span, shown)
        return value

    def matches(
        self, value: Expr, wanted: tuple[Axis, ...], span: Span, left: Span, shown: str
    ) -> None:
        extra = [a for a in value.free if a not in wanted]
        missing = [a for a in wanted if a not in value.free]
        if extra:
            names = ", ".join(map(str, extra))
            plural = len(extra) > 1
            hint = f"sum it: sum[{names}](...), or add it on the left: {shown[:-1] + ',' if shown.endswith(']') else shown + '['}{names}]"
            for axis in extra:
                for index in wanted:
                    if (
                        isinstance(index, Index)
                        and index.alias is not None
                        and set(atoms(axis)) <= set(atoms(index.alias))
                    ):
                        hint = f"'{index}' is {index.alias}: write {index.alias} on the left"
            raise self.error(
                "E0405",
                f"{_quoted(extra)} {'stand' if plural else 'stands'} in one factor only and not on the left",
                span,
                f"ranges over {_axes(value.free)}",
                notes=[(left, f"the left side is {shown}")],
                hint=hint,
            )
        if missing and (value.free or not isinstance(value, Scalar)):
            names = ", ".join(map(str, missing))
            raise self.error(
                "E0406",
                f"the right side lacks {_quoted(missing)} of the left side",
                span,
                f"ranges over {_axes(value.free)}",
                notes=[(left, f"the left side is {shown}")],
                hint=f"if it is meant to be repeated, say so: broadcast[{names}](...)",
            )


def _loose(axis: Axis) -> tuple[Axis, ...]:
    """The axes a right side ranges over for one place on the left: a product's parts, one by one."""
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


def _is_product(e: ast.Expr) -> bool:
    if isinstance(e, ast.Group) and e.inner is not None:
        return _is_product(e.inner)
    return isinstance(e, ast.Binary) and e.op in "*/"


def _axes(axes: tuple[Axis, ...]) -> str:
    return f"[{', '.join(map(str, axes))}]" if axes else "no index"


def _quoted(axes: list[Axis]) -> str:
    return ", ".join(f"'{a}'" for a in axes)


def _count(number: int, one: str, many: str) -> str:
    return f"{'no' if number == 0 else number} {one if number == 1 else many}"
