"""elaborate: from checked blocks to the graph.

Each block becomes a module for each set of extents it is used at, and each of its defs a body for
each way it is lifted. Functions are inlined; uses stay calls, arrays of blocks and loops over them
stay arrays and loops, so that neither 61 layers nor 256 experts make the program larger. Numbers
are needed only for compile-time conditions and scalar constants: extents stay symbolic.
"""

from __future__ import annotations

from collections.abc import Iterable

from compiler.ir import (
    Child,
    Dim,
    Entry,
    EntryInput,
    Graph,
    Module,
    NamePart,
    Parameter,
    Program,
    Type,
)
from compiler.passes import bounds, caches, wanted
from compiler.passes.build import Lifting, dim_of
from compiler.passes.lower import BodyLowering
from dsl import typed
from dsl.entries import entries
from dsl.instances import Instance, Instances, fail
from dsl.program import CheckedProgram


def run(program: CheckedProgram) -> Program:
    """Elaborate a checked program.

    Raises:
        DiagnosticError: a constant has no value, an extent is not a whole number of at least one,
            or the file holds no model or several.
    """
    elaborated = Elaborator(program).run()
    caches.check(elaborated)
    return wanted.run(bounds.run(elaborated))


class Elaborator:
    """Makes modules and bodies on demand, each once."""

    def __init__(self, source: CheckedProgram):
        self.source = source
        self.instances = Instances(source.checker, source.constants)
        self.bodies: dict[str, Graph] = {}
        self._made: dict[tuple[str, str, Lifting], tuple[str, dict[str, Dim]]] = {}
        self._methods: dict[str, dict[str, str]] = {}

    def run(self) -> Program:
        if self.source.model is None:
            raise fail(
                "E0507",
                f"{self.source.library.root.source.name} declares no model, or several",
                None,
                "pick one with --model NAME",
            )
        decl, unit = self.source.model
        root = self.instances.root(decl, unit)
        points = {}
        for name in entries(root.block):
            formals = root.block.defs[name].formals
            inputs = tuple(EntryInput(f.name, f.shift_of, f.shift) for f in formals)
            body, _ = self.body(root, name, Lifting(tuple(() for _ in formals)))
            points[name] = Entry(name, body, inputs)
        self.instances.walk(decl, unit)
        modules = {i.name: self._module(i) for i in self.instances.all.values()}
        names = self.source.names.get(decl.name.text)
        ignored = tuple(str(literal.value) for literal in names.ignored) if names else ()
        return Program(
            decl.name.text,
            dict(self.instances.values),
            root.name,
            modules,
            self.bodies,
            points,
            ignored,
        )

    def _module(self, instance: Instance) -> Module:
        block = instance.block
        parameters = tuple(
            Parameter(s.name, self._stored_type(instance, s), s.role, s.span)  # type: ignore[arg-type]
            for s in block.stored
        )
        children = tuple(
            Child(
                u.name,
                self.instances.used(instance, u).name,
                dim_of(instance, u.array) if u.array else None,
            )
            for u in block.uses
        )
        return Module(
            instance.name,
            block.name,
            parameters,
            children,
            self._names(block, {p.name for p in parameters} | {c.name for c in children}),
            dict(self._methods.get(instance.name, {})),
            block.span,
        )

    def _stored_type(self, instance: Instance, stored: typed.Stored) -> Type:
        return Type(stored.dtype, tuple(dim_of(instance, a) for a in stored.axes))  # type: ignore[arg-type]

    def _names(self, block: typed.Block, members: Iterable[str]) -> dict[str, NamePart]:
        """The block's parts of checkpoint names."""
        mapped = self.source.names.get(block.name)
        return {
            entry.name.text: NamePart(
                str(entry.template.value), entry.array.text if entry.array else None, entry.span
            )
            for entry in (mapped.entries if mapped else ())
            if entry.name.text in members
        }

    # -- bodies ----------------------------------------------------------------------------------

    def body(self, instance: Instance, method: str, lifting: Lifting) -> tuple[str, dict[str, Dim]]:
        """The body of a def, lifted over the dims its arguments have beyond their formals, and its
        names for those dims."""
        key = (instance.name, method, lifting)
        if key not in self._made:
            name, number = f"{instance.name}.{method}", 1
            while name in self.bodies:
                name, number = f"{instance.name}.{method}.{number}", number + 1
            lowering = BodyLowering(self, instance, method, lifting, name)
            self.bodies[name] = Graph(name)  # claims the name
            graph = lowering.run()
            del self.bodies[name]  # bodies that it calls come first
            self.bodies[name] = graph
            self._made[key] = (name, lowering.lifted)
            dims = dict.fromkeys(d.name for arg in lifting.dims for d in arg)
            methods = self._methods.setdefault(instance.name, {})
            label = method + (f"@{','.join(dims)}" if dims else "")
            while label in methods:
                label += "'"
            methods[label] = name
        return self._made[key]
