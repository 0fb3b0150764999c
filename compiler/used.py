"""Which constants a model reads, at the values that they have: of a file that knows several kinds
of rotary scaling, those of the kind that is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from compiler.ir import Dim, Program
from compiler.passes.elaborate import Elaborator
from dsl import syntax as ast
from dsl.constants import Constant, Constants
from dsl.diagnostics import Diagnostics, Span
from dsl.program import CheckedProgram
from dsl.templates import Placeholder, parts
from dsl.walking import walk


class _Recording(Constants):
    """Notes which constant, or None for the model itself, reads which."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.reads: dict[str | None, set[str]] = {None: set()}

    def value(self, name: str, span: Span) -> Constant:
        reader = self._open[-1] if self._open else None
        self.reads.setdefault(reader, set()).add(name)
        return super().value(name, span)


def used(source: CheckedProgram) -> set[str]:
    """Names of the constants that the model depends on, those that others are made of included."""
    old = source.constants
    constants = _Recording(old.declared, old.functions, old.presets, old.choices, Diagnostics())
    elaborator = Elaborator(replace(source, constants=constants))
    _ = elaborator.instances.values  # asks for every constant: what follows asks for those needed
    constants.reads[None].clear()
    program = elaborator.run()
    waiting = [*constants.reads[None], *_in_sizes(program), *_in_names(program)]
    for need, _ in source.library.declarations(ast.Require):
        assert isinstance(need, ast.Require)
        read = need.items.value if need.items else need.condition
        if read is not None:
            waiting += [e.name.text for e in walk(read) if isinstance(e, ast.Ref)]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += constants.reads.get(name, ())
    return found & old.declared.keys()


def _in_sizes(program: Program) -> Iterator[str]:
    for dim in _dims(program):
        yield from dim.size.names | dim.start.names


def _dims(program: Program) -> Iterator[Dim]:
    for module in program.modules.values():
        for parameter in module.parameters:
            yield from parameter.type.dims
        yield from (child.array for child in module.children if child.array is not None)
    for body in program.bodies.values():
        for node in body:
            yield from node.type.dims


def _in_names(program: Program) -> Iterator[str]:
    for module in program.modules.values():
        for name in module.names.values():
            for part in parts(name.template):
                if isinstance(part, Placeholder):
                    yield from part.names
