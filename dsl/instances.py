"""Blocks at the sizes they are used at.

A checked block speaks of its own indices; a use binds them to the user's. ``Instances`` follows the
uses down from the model: each block at each set of extents and settings once, with the extents
still symbolic, and with its compile-time conditions decided by the constants. ``dslc check`` walks
them to see that every extent is a whole number; elaboration turns each into a module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from dsl import syntax as ast
from dsl import typed
from dsl.check import ProgramChecker
from dsl.constants import Constant, ConstantError, Constants, evaluate, polynomial, shown
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Span
from dsl.extents import Extent, ExtentError
from dsl.files import Unit
from dsl.scope import ConstScope, atoms, setting_name, size_name
from dsl.variants import conditions

LONGEST = 2**31 - 1  # an index that counts further is a slip

Lookup = Callable[[str, Span], Constant]


def fail(code: str, message: str, span: Span | None, hint: str = "") -> DiagnosticError:
    return DiagnosticError([Diagnostic(code, message, span, hint=hint)])


@dataclass
class Instance:
    """A block at one set of extents and settings.

    ``symbols`` say what the extents of its formal indices and its settings are; ``name`` is the
    block's, with a number where the block occurs at several sizes.
    """

    name: str
    decl: ast.Block
    unit: Unit
    symbols: dict[str, Extent]
    settings: dict[str, Constant]
    block: typed.Block = field(init=False)

    def extent(self, extent: Extent) -> Extent:
        """An extent of the block's, in constants only."""
        return extent.substitute(self.symbols)


class Instances:
    """Makes instances on demand, each once. Every method may raise ``DiagnosticError``."""

    def __init__(self, checker: ProgramChecker, constants: Constants):
        self.checker = checker
        self.constants = constants
        self.all: dict[str, Instance] = {}
        self._by_key: dict[object, Instance] = {}
        self._blocks: dict[object, typed.Block] = {}
        self._fns: dict[object, typed.Fn] = {}

    @cached_property
    def values(self) -> dict[str, Constant]:
        """Every constant that has a value."""
        out: dict[str, Constant] = {}
        for name, declaration in self.constants.declared.items():
            try:
                out[name] = self.constants.value(name, declaration.span)
            except ConstantError:
                continue  # not needed by this model, or its need has been reported
        return out

    @cached_property
    def sizes(self) -> dict[str, int]:
        """The constants that extents are evaluated with."""
        return {
            n: v for n, v in self.values.items() if isinstance(v, int) and not isinstance(v, bool)
        }

    # -- compile-time values -----------------------------------------------------------------------

    def evaluate(self, expr: ast.Expr, lookup: Lookup, size: Lookup | None = None) -> Constant:
        def no_size(name: str, span: Span) -> Constant:
            raise ConstantError("E0206", f"no index '{name}' is known here", span)

        try:
            return evaluate(expr, lookup, size or no_size, self.constants.functions)
        except ConstantError as error:
            raise fail(error.code, error.message, error.span, error.hint) from None
        except ExtentError as error:
            raise fail("E0304", str(error), expr.span) from None

    def lookup(self, instance: Instance, scope: ConstScope | None = None) -> Lookup:
        """What a block's constant expressions can name: its own, its settings, the program's."""
        local = scope.local if scope is not None else {}
        known: dict[str, Constant] = {}  # each is computed once, however often others name it

        def size(name: str, span: Span) -> Constant:
            assert scope is not None
            return instance.extent(scope.indices[name].extent).at(self.sizes)

        def look(name: str, span: Span) -> Constant:
            if name in local:
                if name not in known:
                    value = local[name].value
                    assert value is not None
                    known[name] = self.evaluate(value, look, size)
                return known[name]
            if name in instance.settings:
                return instance.settings[name]
            return self.constants.value(name, span)

        return look

    def extent_of(self, expr: ast.Expr, instance: Instance | None, value: Constant) -> Extent:
        """A compile-time number as an extent: symbolic where it is spelled as one."""

        def name(text: str, span: Span) -> Extent:
            if instance is not None:
                symbol = instance.symbols.get(setting_name(text, instance.decl.name.text))
                if symbol is not None:
                    return symbol
            if text not in self.checker.constants:
                raise ConstantError("E0204", text, span)
            return self.checker.constant_extent(text)

        def size(text: str, span: Span) -> Extent:
            raise ConstantError("E0206", text, span)

        try:
            return polynomial(expr, name, size)
        except ConstantError:
            if not isinstance(value, int) or isinstance(value, bool):
                raise fail("E0304", f"this is {value}, not a whole number", expr.span) from None
            return Extent.of(value)

    # -- blocks ------------------------------------------------------------------------------------

    def root(self, decl: ast.Block, unit: Unit) -> Instance:
        """The model itself."""
        return self._instance(decl, unit, (), {}, {})

    def used(self, user: Instance, use: typed.Use) -> Instance:
        """The block that a use runs, at the user's extents."""
        target, home = use.target
        extents = tuple(user.extent(axis.size) for axis in use.bind)
        lookup = self.lookup(user, user.block.scope)
        values = {name: self.evaluate(value, lookup) for name, value in use.settings.items()}
        symbols = {
            name: self.extent_of(value, user, values[name])
            for name, value in use.settings.items()
            if isinstance(values[name], int) and not isinstance(values[name], bool)
        }
        return self._instance(target, home, extents, values, symbols)

    def walk(self, decl: ast.Block, unit: Unit) -> None:
        """Visit every instance below the model, so that every extent has been looked at."""
        seen: set[str] = set()
        queue = [self.root(decl, unit)]
        while queue:
            instance = queue.pop()
            if instance.name not in seen:
                seen.add(instance.name)
                self._check_calls(instance)
                queue += [self.used(instance, use) for use in instance.block.uses]

    def _instance(
        self,
        decl: ast.Block,
        unit: Unit,
        extents: tuple[Extent, ...],
        settings: dict[str, Constant],
        setting_extents: dict[str, Extent],
    ) -> Instance:
        values, given = dict(settings), dict(setting_extents)
        for setting in decl.settings:
            name = setting.name.text
            if name not in values:
                values[name] = value = self.evaluate(setting.value, self.constants.value)
                if isinstance(value, int) and not isinstance(value, bool):
                    given[name] = self.extent_of(setting.value, None, value)
        key = (id(decl), extents, tuple(sorted((n, repr(v)) for n, v in values.items())))
        if key not in self._by_key:
            symbols = {setting_name(n, decl.name.text): e for n, e in given.items()}
            symbols |= {size_name(i.text): e for i, e in zip(decl.indices, extents, strict=True)}
            name, number = decl.name.text, 1
            while name in self.all:
                name, number = f"{decl.name.text}.{number}", number + 1
            instance = Instance(name, decl, unit, symbols, values)
            instance.block = self._block(instance)
            self._by_key[key] = self.all[name] = instance
            self._check_extents(instance)
        return self._by_key[key]

    def _block(self, instance: Instance) -> typed.Block:
        lookup = self.lookup(instance)

        def decide(condition: ast.Expr) -> bool:
            return bool(self.evaluate(condition, lookup))

        decl = instance.decl
        key = (id(decl), tuple(decide(c) for c in conditions(decl.members)))
        if key not in self._blocks:
            before = len(self.checker.found.found)
            self._blocks[key] = self.checker.block(decl, instance.unit, decide)
            if len(self.checker.found.found) > before:
                raise DiagnosticError(self.checker.found.found[before:])
        return self._blocks[key]

    def fn(self, decl: ast.Fn, unit: Unit) -> typed.Fn:
        """The typed form of a function, its conditions decided."""

        def decide(condition: ast.Expr) -> bool:
            return bool(self.evaluate(condition, self.constants.value))

        key = (id(decl), tuple(decide(c) for c in conditions(decl.body)))
        if key not in self._fns:
            self._fns[key] = self.checker.fn(decl, unit, decide)
        return self._fns[key]

    def _check_calls(self, instance: Instance) -> None:
        """The extents of functions' own indices, at the sizes they are called with."""
        found = Diagnostics()
        seen: set[object] = set()
        for definition in instance.block.defs.values():
            for equation in definition.equations:
                for e in equation.expressions():
                    if isinstance(e, typed.CallFn):
                        self._check_call(e, instance.extent, e.span, seen, found)
                    elif isinstance(e, typed.Choice):
                        self._check_choice(e, instance, found)
        found.raise_if_any()

    def _check_choice(self, e: typed.Choice, instance: Instance, found: Diagnostics) -> None:
        """Nothing chooses more than there is, or a part of one."""
        if e.over.kind != "plain" or (e.to is None and e.count is None):
            return
        count: Constant = None
        try:
            there = instance.extent(e.over.extent).at(self.sizes)
            if e.to is not None:
                count = instance.extent(e.to.extent).at(self.sizes)
        except ExtentError:
            return  # told where the index is declared
        if e.count is not None:
            count = self.evaluate(e.count, self.lookup(instance, e.scope))
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= there:
            found.error(
                "E0304",
                f"'{e.fn}' cannot choose {shown(count)} of the {there} of '{e.over}'",
                e.span if e.count is None else e.count.span,
                notes=[(e.over.span, f"'{e.over}' is declared here")],
            )

    def _check_call(
        self,
        e: typed.CallFn,
        resolve: Callable[[Extent], Extent],
        span: Span,
        seen: set[object],
        found: Diagnostics,
    ) -> None:
        """``span`` is the call in the block: functions that it reaches are told there."""
        fn = self.fn(*e.target)
        symbols = {size_name(formal.name): resolve(axis.size) for formal, axis in e.bind}
        key = (fn.name, tuple(symbols.items()))
        if key in seen:
            return
        seen.add(key)

        def inner(extent: Extent) -> Extent:
            return extent.substitute(symbols)

        for index in fn.scope.indices.values():
            if index.formal or index.kind != "plain":
                continue
            try:
                value = inner(index.extent).at(self.sizes)
            except ExtentError as error:
                reason = self._not_whole(inner(index.extent)) or str(error)
                waits = not inner(index.extent).names <= self.values.keys()
                found.error(
                    "E0301" if waits else "E0304",
                    f"'{fn.name}' cannot work at this size: its index '{index.name}' has "
                    f"extent {inner(index.extent)}, and {reason}",
                    span,
                    notes=[(index.span, "declared here")],
                )
                continue
            if not 1 <= value <= LONGEST:
                found.error(
                    "E0304",
                    f"'{fn.name}' cannot work at this size: its index '{index.name}' has "
                    f"extent {value}",
                    span,
                    notes=[(index.span, "declared here")],
                )
        for equation in fn.definition.equations:
            for nested in equation.expressions():
                if isinstance(nested, typed.CallFn):
                    self._check_call(nested, inner, span, seen, found)

    def _not_whole(self, extent: Extent) -> str:
        """Which constant of an extent is a number that no extent can have."""
        for name in sorted(extent.names & self.values.keys() - self.sizes.keys()):
            value = self.values[name]
            shown = (
                "null"
                if value is None
                else str(value).lower()
                if isinstance(value, bool)
                else repr(value)
            )
            return f"'{name}' is {shown}, not a whole number"
        return ""

    def _check_extents(self, instance: Instance) -> None:
        """Every extent is a whole number of at least one; loops over blocks may be empty."""
        block = instance.block
        loops = {u.array for u in block.uses if u.array is not None}
        indices = [i for s in block.stored for axis in s.axes for i in atoms(axis)]
        indices += [i for i in block.scope.indices.values() if not i.formal]
        found = Diagnostics()
        for index in dict.fromkeys([*indices, *loops]):
            if index.kind != "plain":
                continue
            try:
                value = instance.extent(index.extent).at(self.sizes)
                start = instance.extent(index.start).at(self.sizes)
            except ExtentError as error:
                extent = instance.extent(index.extent)
                reason = self._not_whole(extent) or str(error)
                # A constant without a value may wait for a checkpoint.
                code = "E0304" if extent.names <= self.values.keys() else "E0301"
                found.error(code, f"index '{index.name}' has no extent: {reason}", index.span)
                continue
            least = 0 if index in loops else 1
            if not least <= value <= LONGEST or start < 0:
                extent = instance.extent(index.extent)
                shown = f" ({extent})" if extent.constant is None else ""
                bound = f"at most {LONGEST}" if value > LONGEST else f"at least {least}"
                found.error(
                    "E0304",
                    f"index '{index.name}' has extent {value}{shown}",
                    index.span,
                    hint=f"an extent is {bound}",
                )
        found.raise_if_any()
