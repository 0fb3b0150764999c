"""elaborate: from checked blocks to the graph.

Each block becomes a module for each set of extents it is used at, and each of its defs a body for
each way it is lifted. Functions are inlined; uses stay calls, arrays of blocks and loops over them
stay arrays and loops, so that neither 61 layers nor 256 experts make the program larger. Numbers
are needed only for compile-time conditions and scalar constants: extents stay symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from compiler.ir import ROWS, Child, Dim, Entry, EntryInput, Graph, Module, Parameter, Program, Type
from compiler.passes import wanted
from compiler.passes.build import Lifting, ModuleInstance
from compiler.passes.lower import BodyLowering
from dsl import syntax as ast
from dsl import typed
from dsl.constants import Constant, ConstantError, evaluate, polynomial
from dsl.diagnostics import Diagnostic, DiagnosticError, Diagnostics, Span
from dsl.extents import Extent, ExtentError
from dsl.files import Unit
from dsl.program import CheckedProgram
from dsl.scope import ConstScope, setting_name, size_name


def run(program: CheckedProgram) -> Program:
    """Elaborate a checked program.

    Raises:
        DiagnosticError: a constant has no value, an extent is not a whole number of at least one,
            or the file holds no model or several.
    """
    return wanted.run(Elaborator(program).run())


def fail(code: str, message: str, span: Span | None, hint: str = "") -> DiagnosticError:
    return DiagnosticError([Diagnostic(code, message, span, hint=hint)])


@dataclass
class Elaborator:
    """Makes modules and bodies on demand, each once."""

    source: CheckedProgram
    modules: dict[str, ModuleInstance] = field(default_factory=dict)
    bodies: dict[str, Graph] = field(default_factory=dict)
    _instances: dict[object, ModuleInstance] = field(default_factory=dict)
    _typed: dict[object, typed.Block | typed.Fn] = field(default_factory=dict)

    def run(self) -> Program:
        if self.source.model is None:
            raise fail(
                "E0507",
                f"{self.source.library.root.source.name} declares no model, or several",
                None,
                "pick one with --model NAME",
            )
        decl, unit = self.source.model
        root = self.instance(decl, unit, (), {}, {})
        entries = {}
        for entry in self.source.entries():
            formals = root.block.defs[entry.name.text].formals
            inputs = tuple(EntryInput(f.name, f.shift_of, f.shift) for f in formals)
            body = self.body(root, entry.name.text, Lifting(tuple(() for _ in formals)))
            entries[entry.name.text] = Entry(entry.name.text, body, inputs)
        modules = {name: self._module(instance) for name, instance in self.modules.items()}
        names = self.source.names.get(decl.name.text)
        ignored = tuple(str(literal.value) for literal in names.ignored) if names else ()
        return Program(
            decl.name.text, self.constants(), root.name, modules, self.bodies, entries, ignored
        )

    def constants(self) -> dict[str, Constant]:
        """Every constant that has a value."""
        out: dict[str, Constant] = {}
        for name, declaration in self.source.constants.declared.items():
            try:
                out[name] = self.source.constants.value(name, declaration.span)
            except ConstantError:
                continue  # not needed by this model, or its need has been reported
        return out

    # -- modules ---------------------------------------------------------------------------------

    def instance(
        self,
        decl: ast.Block,
        unit: Unit,
        extents: tuple[Extent, ...],
        settings: dict[str, Constant],
        setting_extents: dict[str, Extent],
    ) -> ModuleInstance:
        """The module of a block at these extents of its indices and these settings."""
        values = dict(settings)
        symbols = {setting_name(n, decl.name.text): e for n, e in setting_extents.items()}
        for setting in decl.settings:
            if setting.name.text not in values:
                values[setting.name.text] = self.evaluate(
                    setting.value, self.source.constants.value, None
                )
                symbols[setting_name(setting.name.text, decl.name.text)] = self._setting_extent(
                    setting, values
                )
        key = (id(decl), extents, tuple(sorted(values.items())))
        if key not in self._instances:
            for index, extent in zip(decl.indices, extents, strict=True):
                symbols[size_name(index.text)] = extent
            name = decl.name.text
            number = 1
            while name in self.modules:
                name, number = f"{decl.name.text}.{number}", number + 1
            instance = ModuleInstance(name, decl, unit, symbols, values)
            self._instances[key] = instance
            self.modules[name] = instance
            instance.block = self.typed_block(instance)
            self._sizes(instance)
        return self._instances[key]

    def _setting_extent(self, setting: ast.Setting, values: dict[str, Constant]) -> Extent:
        """A default setting as an extent: symbolic where its expression is one."""
        checker = self.source.checker

        def name(text: str, span: Span) -> Extent:
            if text not in checker.constants:
                raise ConstantError("E0204", text, span)
            return checker.constant_extent(text)

        def size(text: str, span: Span) -> Extent:
            raise ConstantError("E0206", text, span)

        try:
            return polynomial(setting.value, name, size)
        except ConstantError:
            value = values[setting.name.text]
            return Extent.of(value) if isinstance(value, int) else Extent.name(setting.name.text)

    def evaluate(
        self,
        expr: ast.Expr,
        lookup,
        size,  # type: ignore[no-untyped-def]
    ) -> Constant:
        def none(name: str, span: Span) -> Constant:
            raise ConstantError("E0206", f"no index '{name}' is known here", span)

        try:
            return evaluate(expr, lookup, size or none, self.source.constants.functions)
        except ConstantError as error:
            raise fail(error.code, error.message, error.span, error.hint) from None

    def typed_block(self, instance: ModuleInstance) -> typed.Block:
        decl, unit = instance.decl, instance.unit

        def decide(condition: ast.Expr) -> bool:
            return bool(self.evaluate(condition, instance.lookup(self, ConstScope("", {})), None))

        outcome = tuple(decide(c) for c in _conditions(decl.members))
        key = (id(decl), outcome)
        if key not in self._typed:
            checker = self.source.checker
            checker.found = Diagnostics()
            self._typed[key] = checker.block(decl, unit, decide)
        return self._typed[key]  # type: ignore[return-value]

    def typed_fn(self, decl: ast.Fn, unit: Unit) -> typed.Fn:
        def decide(condition: ast.Expr) -> bool:
            return bool(self.evaluate(condition, self.source.constants.value, None))

        outcome = tuple(decide(c) for c in _conditions(decl.body))
        key = (id(decl), outcome)
        if key not in self._typed:
            self._typed[key] = self.source.checker.fn(decl, unit, decide)
        return self._typed[key]  # type: ignore[return-value]

    def used(self, instance: ModuleInstance, use: typed.Use) -> ModuleInstance:
        """The module that a use of ``instance``'s block runs."""
        target, home = use.target  # type: ignore[misc]
        extents = tuple(instance.extent(axis.size) for axis in use.bind)
        lookup = instance.lookup(self, instance.block.scope)
        settings: dict[str, Constant] = {}
        setting_extents: dict[str, Extent] = {}
        for name, value in use.settings.items():
            settings[name] = number = self.evaluate(value, lookup, None)
            setting_extents[name] = self._use_extent(value, number, instance)
        return self.instance(target, home, extents, settings, setting_extents)

    def _use_extent(self, value: ast.Expr, number: Constant, instance: ModuleInstance) -> Extent:
        def name(text: str, span: Span) -> Extent:
            symbol = instance.symbols.get(setting_name(text, instance.decl.name.text))
            if symbol is not None:
                return symbol
            if text not in self.source.checker.constants:
                raise ConstantError("E0204", text, span)
            return self.source.checker.constant_extent(text)

        def size(text: str, span: Span) -> Extent:
            return instance.symbols[size_name(text)]

        try:
            return polynomial(value, name, size)
        except (ConstantError, KeyError):
            return Extent.of(number) if isinstance(number, int) else Extent.name("?")

    def extent_of(
        self, expr: ast.Expr, instance: ModuleInstance, number: Callable[[ast.Expr], Constant]
    ) -> Extent:
        """A compile-time number as an extent: symbolic where it is spelled as one."""
        value = number(expr)
        if not isinstance(value, int):
            raise fail("E0304", f"this is {value}, not a whole number", expr.span)
        return self._use_extent(expr, value, instance)

    def _module(self, instance: ModuleInstance) -> Module:
        block = instance.block
        parameters = tuple(
            Parameter(s.name, Type(s.dtype, tuple(instance.dim(a) for a in s.axes)), s.role, s.span)  # type: ignore[arg-type]
            for s in block.stored
        )
        children = tuple(
            Child(u.name, self.used(instance, u).name, instance.dim(u.array) if u.array else None)
            for u in block.uses
        )
        names: dict[str, str] = {}
        mapped = self.source.names.get(block.name)
        known = {p.name for p in parameters} | {c.name for c in children}
        for entry in mapped.entries if mapped else ():
            if entry.name.text in known:
                template = str(entry.template.value)
                if entry.array is not None:
                    template = template.replace(f"{{{entry.array.text}}}", "{}")
                names[entry.name.text] = template
        return Module(
            instance.name,
            block.name,
            parameters,
            children,
            names,
            dict(instance.methods),
            block.span,
        )

    def _sizes(self, instance: ModuleInstance) -> None:
        """Every extent of the block is a whole number, and at least one; loops may be empty."""
        sizes = {n: v for n, v in self.constants().items() if isinstance(v, int)}
        loops = {u.array for u in instance.block.uses if u.array is not None}
        axes = [a for s in instance.block.stored for a in s.axes]
        found = Diagnostics()
        for index in dict.fromkeys([*_all_indices(axes), *loops, *_declared(instance.block)]):
            if index.kind != "plain":
                continue
            extent = instance.extent(index.extent)
            try:
                value = extent.at(sizes)
                start = instance.extent(index.start).at(sizes)
            except ExtentError as error:
                found.error("E0304", f"index '{index.name}' has no extent: {error}", index.span)
                continue
            least = 0 if index in loops else 1
            if value < least or start < 0:
                shown = f" ({extent})" if extent.constant is None else ""
                found.error(
                    "E0304",
                    f"index '{index.name}' has extent {value}{shown}",
                    index.span,
                    hint=f"an extent is at least {least}",
                )
        found.raise_if_any()

    # -- bodies ----------------------------------------------------------------------------------

    def body(self, instance: ModuleInstance, method: str, lifting: Lifting) -> str:
        """The body of a def, lifted over the dims its arguments have beyond their formals."""
        key = (method, lifting)
        if key not in instance.bodies:
            name = f"{instance.name}.{method}"
            number = 1
            while name in self.bodies:
                name, number = f"{instance.name}.{method}.{number}", number + 1
            self.bodies[name] = Graph(name)  # claims the name; bodies it calls come first
            lowering = BodyLowering(self, instance, method, lifting, name)
            del self.bodies[name]
            self.bodies[name] = lowering.run()
            instance.bodies[key] = (name, lowering.lifted)
            dims = list(dict.fromkeys(d.name for arg in lifting.dims for d in arg))
            label = method + (f"@{','.join(dims)}" if dims else "")
            while label in instance.methods:
                label += "'"
            instance.methods[label] = name
        return instance.bodies[key][0]


def rows_dim() -> Dim:
    """The rows of one block of an array, under the name that bodies of ``apply`` know them by."""
    return Dim("rows", ROWS, "rows")


def _conditions(items: tuple[ast.Item, ...]) -> list[ast.Expr]:
    from dsl.check import conditions

    return list(conditions(items))


def _all_indices(axes: list[typed.Axis]) -> list[typed.Index]:
    from dsl.scope import atoms

    return [i for axis in axes for i in atoms(axis)]


def _declared(block: typed.Block) -> list[typed.Index]:
    return [i for i in block.scope.indices.values() if not i.formal]  # type: ignore[attr-defined]
