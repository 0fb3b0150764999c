"""Checks blocks and functions, each under one outcome of its compile-time conditions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dsl import syntax as ast
from dsl import typed
from dsl.calls import Signature, Used
from dsl.context import Context
from dsl.diagnostics import Diagnostics, Span, near
from dsl.equations import Binding, Checker
from dsl.extents import Extent
from dsl.files import Library, Unit
from dsl.primitives import BUILTINS
from dsl.products import reads
from dsl.scope import Failed, Scope, atoms, size_name
from dsl.typed import Axis, Index
from dsl.variants import Decide, flatten

DTYPES = ("act", "f32")


@dataclass(frozen=True)
class Head:
    """What others see of a block: its indices and the signatures of its defs."""

    indices: tuple[Index, ...]
    defs: dict[str, Signature]
    private: frozenset[str]


class ProgramChecker(Context):
    """Checks blocks and functions of one library, each under given conditions."""

    def __init__(self, library: Library, found: Diagnostics):
        super().__init__(library, found)
        self._formals: dict[int, tuple[Index, ...]] = {}
        self._signatures: dict[int, Signature | None] = {}
        self._heads: dict[int, Head] = {}

    # -- signatures ------------------------------------------------------------------------------

    def formals(self, decl: ast.Block | ast.Fn) -> tuple[Index, ...]:
        """The formal indices of a block or function, made once."""
        if id(decl) not in self._formals:
            self._formals[id(decl)] = tuple(
                Index(i.text, Extent.name(size_name(i.text)), span=i.span, formal=True)
                for i in decl.indices
            )
        return self._formals[id(decl)]

    def base_scope(self, decl: ast.Block | ast.Fn, unit: Unit) -> Scope:
        """The scope of a block or function before its own members are entered."""
        scope = Scope(self, unit, decl.name.text, self.file_scope(unit))
        for index in self.formals(decl):
            scope.add_index(index, index.span)
        if isinstance(decl, ast.Block):
            scope.consts.settings = tuple(s.name.text for s in decl.settings)
        return scope

    def fn_signature(self, name: str, unit: Unit) -> Signature:
        """The signature of a visible function.

        Raises:
            Failed: its declaration is wrong (reported where it stands).
        """
        decl, home = self.function(name, unit)
        if id(decl) not in self._signatures:
            scope = self.base_scope(decl, home)
            scope.found = Diagnostics()  # mistakes here are reported when the function is checked
            try:
                self._signatures[id(decl)] = self.signature(decl, scope, self.formals(decl))
            except Failed:
                self._signatures[id(decl)] = None
        signature = self._signatures[id(decl)]
        if signature is None:
            raise Failed
        return signature

    def head(self, decl: ast.Block, unit: Unit) -> Head:
        if id(decl) not in self._heads:
            defs: dict[str, Signature] = {}
            private: set[str] = set()
            for member in _all_defs(decl.members):
                scope = self.base_scope(decl, unit)
                scope.found = Diagnostics()
                try:
                    defs[member.name.text] = self.signature(member, scope, ())
                except Failed:
                    private.add(member.name.text)
            self._heads[id(decl)] = Head(self.formals(decl), defs, frozenset(private))
        return self._heads[id(decl)]

    def signature(
        self, decl: ast.Def | ast.Fn, scope: Scope, indices: tuple[Index, ...]
    ) -> Signature:
        formals: list[typed.Formal] = []
        failed = False
        for formal in decl.formals:
            try:
                formals.append(self._formal(formal, formals, scope))
            except Failed:
                failed = True
        result_axes = scope.axes(decl.result.subscripts)
        of = scope.index(decl.result.of) if decl.result.of else None
        if failed:
            raise Failed
        return Signature(decl.name.text, indices, tuple(formals), result_axes, of, decl.name.span)

    def _formal(self, formal: ast.Formal, before: list[typed.Formal], scope: Scope) -> typed.Formal:
        axes = scope.axes(formal.subscripts)
        of = scope.index(formal.of) if formal.of else None
        if formal.value is None:
            return typed.Formal(formal.name.text, axes, of, formal.span)
        shifted = _shift(formal.value)
        source = next((f for f in before if shifted and f.name == shifted[0]), None)
        time = [a for a in axes if isinstance(a, Index) and a.kind == "time"]
        if (
            shifted is None
            or source is None
            or source.axes != axes
            or [str(a) for a in axes] != [shifted[1]]
            or not time
        ):
            scope.found.error(
                "E0508",
                "an input may be another input moved along time, and nothing else",
                formal.value.span,
                hint="after[t] = token[t + 1]",
            )
            raise Failed
        return typed.Formal(formal.name.text, axes, source.of, formal.span, shifted[0], shifted[2])

    # -- blocks ----------------------------------------------------------------------------------

    def block(self, decl: ast.Block, unit: Unit, decide: Decide) -> typed.Block:
        """The typed form of a block when its conditions turn out as ``decide`` says."""
        scope = self.base_scope(decl, unit)
        members = list(flatten(decl.members, decide))
        taken: dict[str, Span] = {}
        self._enter(scope, members)
        stored = tuple(
            s
            for m in members
            if isinstance(m, ast.ParamDecl)
            for s in self._stored(m, scope, taken)
        )
        uses: list[typed.Use] = []
        for member in members:
            if isinstance(member, ast.UseDecl):
                self._use(member, scope, taken, uses, unit)
        values = {s.name: Binding(s.name, s.role, s.axes, s.span) for s in stored}
        broken = {m.name.text for m in members if isinstance(m, (ast.ParamDecl, ast.UseDecl))}
        broken -= set(values) | {u.name for u in uses}
        signatures: dict[str, Signature] = {}
        for member in members:
            if isinstance(member, ast.Def):
                _claim(scope, taken, member.name, "def")
                try:
                    signatures[member.name.text] = self.signature(member, scope, ())
                except Failed:
                    broken.add(member.name.text)
        defs: dict[str, typed.Def] = {}
        for member in members:
            if isinstance(member, ast.Def) and member.name.text in signatures:
                checker = Checker(
                    Scope(self, unit, f"{decl.name.text}.{member.name.text}", scope), dict(values)
                )
                checker.failed |= broken
                checker.defs = signatures
                self._give_uses(checker, uses)
                try:
                    defs[member.name.text] = self.definition(
                        member, signatures[member.name.text], checker, decide
                    )
                except Failed:
                    pass
        settings = {s.name.text: s.value for s in decl.settings}
        return typed.Block(
            decl.name.text,
            self.formals(decl),
            settings,
            stored,
            tuple(uses),
            defs,
            scope.consts,
            decl.name.span,
        )

    def _give_uses(self, checker: Checker, uses: list[typed.Use]) -> None:
        for use in uses:
            target, home = use.target
            head = self.head(target, home)
            used = Used(use, head.indices, head.defs, head.private)
            checker.pieces.setdefault(use.name, []).append(used)
            checker.uses.setdefault(use.name, used)

    def _enter(self, scope: Scope, items: list[ast.Item]) -> None:
        """Indices and constants of a block or def."""
        for item in items:
            if isinstance(item, ast.ConstDecl):
                if item.keys or item.value is None:
                    scope.found.error(
                        "E0308",
                        "only constants at the left margin read config.json",
                        item.span,
                        hint="declare the constant outside the block",
                    )
                else:
                    scope.consts.local[item.name.text] = item
            elif isinstance(item, ast.IndexDecl):
                scope.declare(item)

    def _stored(
        self, decl: ast.ParamDecl, scope: Scope, taken: dict[str, Span]
    ) -> list[typed.Stored]:
        _claim(scope, taken, decl.name, decl.role)
        try:
            axes = scope.axes(decl.subscripts)
            dtype = _dtype(scope, decl.dtype) or "act"
        except Failed:
            return []
        dynamic = [a for axis in axes for a in atoms(axis) if a.kind != "plain"]
        if dynamic:
            scope.found.error(
                "E0411",
                f"'{decl.name.text}' is stored and cannot range over {dynamic[0].kind}",
                decl.span,
                hint="what is kept from token to token is written: cached name[s,...] = ...",
            )
            return []
        return [typed.Stored(decl.name.text, axes, dtype, decl.role, decl.name.span)]

    def _use(
        self,
        decl: ast.UseDecl,
        scope: Scope,
        taken: dict[str, Span],
        uses: list[typed.Use],
        unit: Unit,
    ) -> None:
        name = decl.name.text
        pieces = [u for u in uses if u.name == name]
        if not (decl.array is not None and pieces and all(u.array is not None for u in pieces)):
            _claim(scope, taken, decl.name, "use")
        visible = unit.visible.get(decl.block.text)
        if visible is None or not isinstance(visible[0], ast.Block):
            if not scope.is_broken(decl.block.text):
                blocks = [n for n, (d, _) in unit.visible.items() if isinstance(d, ast.Block)]
                hint = near(decl.block.text, blocks) or "is an import missing?"
                what = "is a function, not a block" if visible else "is no block"
                scope.found.error(
                    "E0205", f"'{decl.block.text}' {what}", decl.block.span, hint=hint
                )
            return
        target = visible[0]
        try:
            array = scope.index(decl.array) if decl.array else None
            bind = tuple(scope.index(i) for i in decl.indices)
        except Failed:
            return
        if len(bind) != len(target.indices):
            wanted = f"[{', '.join(i.text for i in target.indices)}]"
            scope.found.error(
                "E0501",
                f"'{target.name.text}' takes {len(target.indices)} indices, not {len(bind)}",
                decl.span,
                f"expected {target.name.text}{wanted}",
                notes=[(target.name.span, "declared here")],
            )
            return
        known = [s.name.text for s in target.settings]
        for setting in decl.settings:
            if setting.name.text not in known:
                scope.found.error(
                    "E0306",
                    f"'{target.name.text}' has no setting '{setting.name.text}'",
                    setting.name.span,
                    notes=[(target.name.span, "declared here")],
                    hint=near(setting.name.text, known),
                )
        settings = {s.name.text: s.value for s in decl.settings if s.name.text in known}
        found = (target, visible[1])
        uses.append(typed.Use(name, target.name.text, found, array, bind, settings, decl.span))

    # -- defs and functions ----------------------------------------------------------------------

    def fn(self, decl: ast.Fn, unit: Unit, decide: Decide) -> typed.Fn:
        """The typed form of a function.

        Raises:
            Failed: its signature or result is wrong (reported).
        """
        scope = self.base_scope(decl, unit)
        signature = self.signature(decl, scope, self.formals(decl))
        checker = Checker(Scope(self, unit, decl.name.text, scope), {})
        definition = self.definition(decl, signature, checker, decide)
        return typed.Fn(
            decl.name.text, self.formals(decl), definition, checker.scope.consts, decl.name.span
        )

    def definition(
        self, decl: ast.Def | ast.Fn, signature: Signature, checker: Checker, decide: Decide
    ) -> typed.Def:
        scope = checker.scope
        for formal in signature.formals:
            before = checker.values.get(formal.name)
            if before is not None:
                scope.found.error(
                    "E0203",
                    f"'{formal.name}' is declared twice",
                    formal.span,
                    notes=[(before.span, "first declared here")],
                )
            kind = "index" if formal.of is not None else "number"
            checker.values[formal.name] = Binding(
                formal.name, "value", formal.axes, formal.span, kind, formal.of
            )
        items = list(flatten(decl.body, decide))
        self._enter(scope, items)
        equations = [i for i in items if isinstance(i, ast.Equation)]
        checker.later = {e.name.text: e.name.span for e in equations}
        typed_equations: list[typed.Equation] = []
        for equation in equations:
            checker.later.pop(equation.name.text, None)
            try:
                typed_equations.append(self._equation(equation, decl.result, signature, checker))
            except Failed:
                checker.failed.add(equation.name.text)
        result = decl.result.name.text
        if not any(e.name.text == result for e in equations):
            if scope.is_broken(result):
                raise Failed
            scope.found.error(
                "E0505",
                f"the result '{result}' is never defined",
                decl.result.span,
                hint=near(result, [e.name.text for e in equations])
                or f"{_written(decl.result)} = ...",
            )
            raise Failed
        constants = {n: c.value for n, c in scope.consts.local.items() if c.value is not None}
        return typed.Def(
            decl.name.text,
            signature.formals,
            result,
            signature.result_axes,
            signature.result_of,
            tuple(typed_equations),
            constants,
            decl.name.span,
        )

    def _equation(
        self, e: ast.Equation, result: ast.Result, signature: Signature, checker: Checker
    ) -> typed.Equation:
        scope = checker.scope
        name = e.name.text
        before = checker.values.get(name)
        if before is not None:
            scope.found.error(
                "E0203",
                f"'{name}' is defined twice",
                e.name.span,
                notes=[(before.span, "first defined here")],
                hint="a value keeps its meaning: give the second one another name",
            )
            raise Failed
        if name in BUILTINS:
            scope.found.error(
                "E0203",
                f"'{name}' is a function of the language",
                e.name.span,
                hint="choose another name",
            )
            raise Failed
        written = axes = scope.axes(e.subscripts)
        dtype = _dtype(scope, e.dtype)
        left, kind = axes, e.kind
        if kind == "cached":
            left = _over_time(scope, e, axes)
        shown = _written(e)
        value = checker.equation(e, left, shown)
        if name == result.name.text:
            dtype = dtype or _dtype(scope, result.dtype)
            self._matches_result(e, axes, result, signature, value, scope)
            axes = signature.result_axes
        decided_by = reads(checker, value) if kind != "cached" else frozenset({"value"})
        checker.values[name] = Binding(
            name, "value", axes, e.name.span, value.kind, value.of, decided_by
        )
        return typed.Equation(name, kind, written, axes, dtype, value, e.span)

    def _matches_result(
        self,
        e: ast.Equation,
        axes: tuple[Axis, ...],
        result: ast.Result,
        signature: Signature,
        value: typed.Expr,
        scope: Scope,
    ) -> None:
        wanted = signature.result_axes
        fits = len(axes) == len(wanted) and all(
            a == w or (not isinstance(w, typed.Sum) and not _dynamic(a, w) and a.size == w.size)
            for a, w in zip(axes, wanted, strict=True)
        )
        if not fits:
            scope.found.error(
                "E0402",
                f"the result is declared as {_written(result)}",
                e.name.span,
                f"defined as {_written(e)}",
                notes=[(result.span, "declared here")],
            )
            raise Failed
        if signature.result_of is not value.of and signature.result_of is not None:
            scope.found.error(
                "E0404",
                f"the result holds positions of '{signature.result_of}'",
                e.value.span,
                notes=[(result.span, "declared here")],
            )
            raise Failed


def _dynamic(a: Axis, b: Axis) -> bool:
    return any(i.kind != "plain" for axis in (a, b) for i in atoms(axis))


def _over_time(scope: Scope, e: ast.Equation, axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """The axes of a cached value's right side: its time where the left has its history."""
    histories = [a for a in axes if isinstance(a, Index) and a.kind == "history"]
    if len(histories) != 1:
        scope.found.error(
            "E0506",
            f"'{e.name.text}' is cached, so it stands along one history",
            e.name.span,
            hint="index s : history t, and then: cached name[s,...] = ... over t",
        )
        raise Failed
    of = histories[0].of
    assert of is not None
    if of in axes:
        scope.found.error(
            "E0506", f"'{e.name.text}' is cached and cannot range over '{of}' too", e.name.span
        )
        raise Failed
    return tuple(of if a is histories[0] else a for a in axes)


def _claim(scope: Scope, taken: dict[str, Span], name: ast.Name, what: str) -> None:
    before = taken.get(name.text)
    if before is not None:
        scope.found.error(
            "E0203",
            f"'{name.text}' is declared twice",
            name.span,
            notes=[(before, "first declared here")],
        )
    taken.setdefault(name.text, name.span)


def _dtype(scope: Scope, name: ast.Name | None) -> str | None:
    if name is None:
        return None
    if name.text not in DTYPES:
        scope.found.error(
            "E0603",
            f"'{name.text}' is no element type",
            name.span,
            hint=near(name.text, DTYPES)
            or f"element types are {' and '.join(DTYPES)} (the model's own)",
        )
        raise Failed
    return name.text


def _all_defs(items: tuple[ast.Item, ...]) -> Iterator[ast.Def]:
    for item in items:
        if isinstance(item, ast.Def):
            yield item
        elif isinstance(item, ast.If):
            yield from _all_defs(item.then)
            yield from _all_defs(item.otherwise)


def _shift(value: ast.Expr) -> tuple[str, str, int] | None:
    """``token[t + 1]`` as ("token", "t", 1)."""
    match value:
        case ast.Ref(name=name, member=None, subscripts=(ast.Subscript(parts=(part,)),)):
            match part:
                case ast.Binary(
                    op="+",
                    left=ast.Ref(name=index, subscripts=None),
                    right=ast.Literal(value=int(by)),
                ) if 0 < by < 1000:
                    return name.text, index.text, by
    return None


def _written(e: ast.Equation | ast.Result | ast.Formal) -> str:
    subs = ",".join(s.span.text for s in e.subscripts)
    return f"{e.name.text}[{subs}]" if subs else e.name.text
