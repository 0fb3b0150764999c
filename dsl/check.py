"""Checks blocks and functions, each under one outcome of its compile-time conditions."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeGuard

from dsl import syntax as ast
from dsl import typed
from dsl.calls import Signature, Used
from dsl.context import Context
from dsl.definitions import claim, define, dtype_of, enter
from dsl.diagnostics import Diagnostics, Span, counted, near
from dsl.equations import Binding, Checker
from dsl.extents import Extent
from dsl.files import Library, Unit, exporter
from dsl.scope import Failed, Scope, atoms, size_name
from dsl.typed import Index
from dsl.variants import Decide, conditional, conditions, flatten
from dsl.walking import all_items


@dataclass(frozen=True)
class Head:
    """What others see of a block: its indices and the signatures of its defs."""

    indices: tuple[Index, ...]
    defs: dict[str, Signature]
    private: frozenset[str]
    broken: frozenset[str]  # defs whose signature is wrong, which is reported with the block


class ProgramChecker(Context):
    """Checks blocks and functions of one library, each under given conditions."""

    def __init__(self, library: Library, found: Diagnostics, chosen: Collection[str] = ()):
        super().__init__(library, found, chosen)
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
            own = {i.name.text for i in all_items(decl.members) if isinstance(i, ast.IndexDecl)}
            under = {id(item) for item, _ in conditional(decl.members)}
            defs: dict[str, Signature] = {}
            private: set[str] = set()
            broken: set[str] = set()
            for member in all_items(decl.members):
                if not isinstance(member, ast.Def):
                    continue
                name = member.name.text
                scope = self.base_scope(decl, unit)
                scope.found = Diagnostics()
                try:
                    signature = self.signature(member, scope, ())
                except Failed:
                    missing = {d.span.text for d in scope.found.found if d.span is not None}
                    (private if missing & own else broken).add(name)
                    continue
                if id(member) not in under and name in defs:
                    continue  # declared twice, which is told with the block
                if name in defs and not _alike(defs[name], signature):
                    self.found.error(
                        "E0510",
                        f"the def '{name}' does not always take and give the same",
                        signature.span,
                        notes=[(defs[name].span, "it does otherwise here")],
                        hint="conditions belong in its body: def ... { if ... { } else { } }",
                    )
                defs[name] = signature
            self._heads[id(decl)] = Head(
                self.formals(decl), defs, frozenset(private), frozenset(broken)
            )
        return self._heads[id(decl)]

    def signature(
        self, decl: ast.Def | ast.Fn, scope: Scope, indices: tuple[Index, ...]
    ) -> Signature:
        formals: list[typed.Formal] = []
        failed = False
        for formal in decl.formals if isinstance(decl, ast.Fn) else ():
            if formal.dtype is not None:
                self.found.error(
                    "E0603",
                    "a function takes what it is given, act or f32",
                    formal.dtype.span,
                    hint="leave the type out, or say it of an equation",
                )
                failed = True
        for formal in decl.formals:
            try:
                formals.append(self._formal(formal, formals, scope))
            except Failed:
                failed = True
        result_axes = scope.axes(decl.result.subscripts)
        of = scope.index(decl.result.of) if decl.result.of else None
        if len({f.name for f in formals}) < len(formals):
            seen: dict[str, Span] = {}
            for formal in decl.formals:
                claim(scope, seen, formal.name)
            failed = True
        if failed:
            raise Failed
        dtype = decl.result.dtype.text if decl.result.dtype else None
        name = decl.name
        return Signature(name.text, indices, tuple(formals), result_axes, of, name.span, dtype)

    def _formal(self, formal: ast.Formal, before: list[typed.Formal], scope: Scope) -> typed.Formal:
        axes = scope.axes(formal.subscripts)
        of = scope.index(formal.of) if formal.of else None
        dtype = dtype_of(scope, formal.dtype) or "act"
        if formal.dtype is not None and (of is not None or formal.value is not None):
            what = "positions" if of is not None else "an input that is another one moved"
            self.found.error("E0603", f"{what} cannot be given a type", formal.dtype.span)
            raise Failed
        if formal.value is None:
            return typed.Formal(formal.name.text, axes, of, formal.span, dtype=dtype)
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
                "an input may be another one moved ahead along time, and nothing else",
                formal.value.span,
                hint="token[t] of w, after[t] = token[t + 1]",
            )
            raise Failed
        return typed.Formal(formal.name.text, axes, source.of, formal.span, shifted[0], shifted[2])

    # -- blocks ----------------------------------------------------------------------------------

    def check_head(self, decl: ast.Block | ast.Fn, unit: Unit) -> None:
        """What is the same however the conditions turn out: the conditions, and the settings."""
        scope = self.base_scope(decl, unit)
        items = decl.members if isinstance(decl, ast.Block) else decl.body
        values = {i.name.text: i.name.span for i in all_items(items) if _is_local(i)}
        reads = scope.readable(values)
        reads.size, reads.place = None, "where conditions are decided"
        for condition in conditions(items):
            reads.check(condition)
        if isinstance(decl, ast.Block):
            self.head(decl, unit)
            taken: dict[str, Span] = {}
            outside = scope.readable()
            outside.size, outside.place = None, "in the default of a setting"
            outside.constants = self.constants
            for setting in decl.settings:
                claim(scope, taken, setting.name)
                outside.check(setting.value)

    def block(self, decl: ast.Block, unit: Unit, decide: Decide) -> typed.Block:
        """The typed form of a block when its conditions turn out as ``decide`` says."""
        scope = self.base_scope(decl, unit)
        members = list(flatten(decl.members, decide))
        taken = {s.name.text: s.name.span for s in decl.settings}
        enter(scope, members, taken)
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
        bodies: list[ast.Def] = []
        for member in members:
            if isinstance(member, ast.Def):
                claim(scope, taken, member.name)
                name = member.name.text
                if name in signatures or name in broken:
                    continue  # declared twice, which is told
                try:
                    signatures[name] = self.signature(member, scope, ())
                    bodies.append(member)
                except Failed:
                    broken.add(name)
        defs: dict[str, typed.Def] = {}
        for member in bodies:
            name = member.name.text
            body_scope = Scope(self, unit, f"{decl.name.text}.{name}", scope)
            checker = Checker(body_scope, dict(values))
            checker.failed |= broken
            checker.defs = signatures
            checker.conditional = _conditional(decl.members, members)
            self._give_uses(checker, uses)
            with suppress(Failed):
                defs[name] = define(checker, member, signatures[name], decide)
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
            used = Used(use, head.indices, head.defs, head.private, head.broken)
            checker.pieces.setdefault(use.name, []).append(used)
            checker.uses.setdefault(use.name, used)

    def _stored(
        self, decl: ast.ParamDecl, scope: Scope, taken: dict[str, Span]
    ) -> list[typed.Stored]:
        claim(scope, taken, decl.name)
        try:
            axes = scope.axes(decl.subscripts)
            dtype = dtype_of(scope, decl.dtype) or "act"
        except Failed:
            return []
        dynamic = [a for axis in axes for a in atoms(axis) if a.kind != "plain"]
        if dynamic:
            scope.found.error(
                "E0411",
                f"'{decl.name.text}' is stored and cannot range over {dynamic[0].kind}",
                decl.name.span,
                f"'{dynamic[0]}' is {dynamic[0].kind}",
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
            claim(scope, taken, decl.name)
        visible, home = unit.visible.get(decl.block.text, (None, unit))
        if not isinstance(visible, ast.Block) or visible.is_model:
            if not scope.is_broken(decl.block.text):
                self._no_block(decl.block, visible, scope)
            return
        try:
            array = self._array(decl, scope, pieces)
            bind = tuple(self._bound(i, scope) for i in decl.indices)
        except Failed:
            return
        if len(bind) != len(visible.indices):
            wanted = ", ".join(i.text for i in visible.indices)
            number = counted(len(visible.indices), "index", "indices")
            scope.found.error(
                "E0501",
                f"'{visible.name.text}' takes {number} in brackets, not {len(bind) or 'none'}",
                decl.span,
                f"expected {visible.name.text}[{wanted}]" if wanted else "",
                notes=[(visible.name.span, "declared here")],
            )
            return
        settings = self._settings(decl, visible, scope)
        uses.append(
            typed.Use(name, visible.name.text, (visible, home), array, bind, settings, decl.span)
        )

    def _no_block(self, name: ast.Name, visible: object, scope: Scope) -> None:
        text = name.text
        if not self.tell_once(scope.found, scope.unit, text):
            return
        if isinstance(visible, ast.Block):
            what, hint = "is a model, not a block", "what several models use is a block"
        elif visible is not None:
            what, hint = "is a function, not a block", f"call it in an equation: {text}(...)"
        else:
            known = scope.unit.visible.items()
            blocks = [n for n, (d, _) in known if isinstance(d, ast.Block)]
            what, hint = "is no block", exporter(text) or near(text, blocks)
        scope.found.error("E0205", f"'{text}' {what}", name.span, hint=hint)

    def _array(self, decl: ast.UseDecl, scope: Scope, pieces: list[typed.Use]) -> Index | None:
        """The index of an array of blocks."""
        if decl.array is None:
            return None
        array = self._bound(decl.array, scope)
        for piece in pieces:
            if piece.array is array:
                scope.found.error(
                    "E0203",
                    f"'{decl.name.text}[{array}]' is declared twice",
                    decl.name.span,
                    notes=[(piece.span, "first declared here")],
                )
                raise Failed
        return array

    def _bound(self, name: ast.Name, scope: Scope) -> Index:
        """An index that blocks can be made for: how long it is must be known before a run."""
        index = scope.index(name)
        if index.kind != "plain":
            scope.found.error(
                "E0411",
                f"blocks are made for indices of fixed extent, and '{index}' is {index.kind}",
                name.span,
                hint="time and history are not bound: what is called is lifted over them",
            )
            raise Failed
        return index

    def _settings(self, decl: ast.UseDecl, target: ast.Block, scope: Scope) -> dict[str, ast.Expr]:
        known = [s.name.text for s in target.settings]
        reads = scope.readable()
        reads.size, reads.place = None, "in a setting"
        seen: dict[str, Span] = {}
        out: dict[str, ast.Expr] = {}
        for setting in decl.settings:
            name = setting.name.text
            claim(scope, seen, setting.name)
            if name not in known:
                scope.found.error(
                    "E0306",
                    f"'{target.name.text}' has no setting '{name}'",
                    setting.name.span,
                    notes=[(target.name.span, "declared here")],
                    hint=near(name, known),
                )
            elif reads.check(setting.value):
                out[name] = setting.value
        return out

    # -- defs and functions ----------------------------------------------------------------------

    def fn(self, decl: ast.Fn, unit: Unit, decide: Decide) -> typed.Fn:
        """The typed form of a function.

        Raises:
            Failed: its signature or result is wrong (reported).
        """
        scope = self.base_scope(decl, unit)
        signature = self.signature(decl, scope, self.formals(decl))
        checker = Checker(Scope(self, unit, decl.name.text, scope), {})
        checker.conditional = _conditional(decl.body, list(flatten(decl.body, decide)))
        definition = define(checker, decl, signature, decide)
        return typed.Fn(
            decl.name.text, self.formals(decl), definition, checker.scope.consts, decl.name.span
        )


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


def _is_local(item: ast.Item) -> TypeGuard[ast.ConstDecl | ast.ParamDecl | ast.Equation]:
    return isinstance(item, (ast.ConstDecl, ast.ParamDecl, ast.Equation))


def _conditional(declared: tuple[ast.Item, ...], present: list[ast.Item]) -> dict[str, Span]:
    """What stands under a condition that does not hold this time, by name."""
    here = {id(item) for item in present}
    return {
        item.name.text: item.name.span
        for item, _ in conditional(declared)
        if id(item) not in here and not isinstance(item, ast.If)
    }


def _alike(a: Signature, b: Signature) -> bool:
    """Can a caller take one for the other?"""
    return (
        [(f.axes, f.of, f.dtype) for f in a.formals] == [(f.axes, f.of, f.dtype) for f in b.formals]
        and a.result_axes == b.result_axes
        and a.result_of is b.result_of
    )
