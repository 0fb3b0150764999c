"""What one program has in common: its files, its constants, its time axes, indices of its files."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.constants import NAMED, ConstantError, polynomial
from dsl.diagnostics import Diagnostics, Span
from dsl.extents import Extent
from dsl.files import Library, Unit
from dsl.scope import Failed, Scope, stand_in
from dsl.typed import Index
from dsl.walking import spelled

if TYPE_CHECKING:
    from dsl.calls import Signature


class Context:
    """One program being checked: its files, its constants' names, its time axes."""

    def __init__(self, library: Library, found: Diagnostics, chosen: Collection[str] = ()):
        self.library = library
        self.found = found
        self.chosen = frozenset(chosen)  # constants that a preset or the user sets
        self.constants = _constants(library, found)
        self._told: set[tuple[int, str]] = set()
        self._times: dict[str, Index] = {}
        self._histories: dict[str, Index] = {}
        self._file_indices: dict[tuple[int, str], Index] = {}
        self._file_scopes: dict[int, Scope] = {}
        self._extents: dict[str, Extent] = {}

    def fn_signature(self, name: str, unit: Unit) -> Signature:
        raise NotImplementedError  # the checker of blocks and functions knows

    def function(self, name: str, unit: Unit) -> tuple[ast.Fn, Unit]:
        """The function that ``unit`` knows under ``name``, and the file it stands in."""
        decl, home = unit.visible[name]
        assert isinstance(decl, ast.Fn)
        return decl, home

    def tell_once(self, found: Diagnostics, unit: Unit, name: str) -> bool:
        """Is this the first mistake in a file about this name? Those about a signature are looked
        for twice and told once."""
        if found is not self.found:
            return True
        new = (id(unit), name) not in self._told
        self._told.add((id(unit), name))
        return new

    def file_scope(self, unit: Unit) -> Scope:
        return self._file_scopes.setdefault(id(unit), Scope(self, unit, ""))

    def file_index(self, unit: Unit, name: str) -> Index:
        """An index declared at a file's top level, made once."""
        key = (id(unit), name)
        if key not in self._file_indices:
            decl = unit.indices[name]
            # Found if the extent asks for itself, and kept if the declaration is wrong.
            self._file_indices[key] = stand_in(decl, "open")
            scope = self.file_scope(unit)
            try:
                self._file_indices[key] = scope.build_index(decl)
            except Failed:
                self._file_indices[key] = stand_in(decl)
                scope.failed.add(name)
        return self._file_indices[key]

    def time(self, name: str, span: Span) -> Index:
        """The one time axis, whichever files declare it."""
        if name not in self._times:
            for other, before in self._times.items():
                hint = "what it will be: docs/language.md, section 17"
                if any(s and s.source.name.startswith("std/") for s in (span, before.span)):
                    hint = f"the standard library calls it t: index {other} : time"
                self.found.error(
                    "E0410",
                    f"a second time axis, beside '{other}', is not built yet",
                    span,
                    notes=[(before.span, "the first is declared here")],
                    hint=hint,
                )
                break
            self._times[name] = Index(name, Extent.name("time"), "time", span)
        return self._times[name]

    def history(self, name: str, of: Index, span: Span) -> Index:
        if name not in self._histories:
            self._histories[name] = Index(name, Extent.name("history"), "history", span, of=of)
        return self._histories[name]

    def constant_extent(self, name: str) -> Extent:
        """A constant's symbol, or the polynomial it is declared to be if nothing else sets it."""
        if name not in self._extents:
            decl = self.constants[name]
            self._extents[name] = Extent.name(name)  # also ends a circle of definitions
            derived = decl.value is not None and not isinstance(decl.value, ast.Literal)
            if derived and not decl.keys and name not in self.chosen:
                assert decl.value is not None
                scope = self.file_scope(self.library.root)
                with suppress(ConstantError, Failed):
                    self._extents[name] = polynomial(
                        decl.value, scope._extent_name, scope._extent_size
                    )
        return self._extents[name]


def _constants(library: Library, found: Diagnostics) -> dict[str, ast.ConstDecl]:
    """Constants by name. A file's own declaration goes before those of files that it imports."""
    declared: dict[str, list[tuple[ast.ConstDecl, Unit]]] = {}
    for declaration, unit in library.declarations(ast.ConstDecl):
        assert isinstance(declaration, ast.ConstDecl)
        name, span = declaration.name.text, declaration.name.span
        if name in NAMED:
            found.error("E0203", f"'{name}' is the number {NAMED[name]:.6}...", span)
        before = declared.setdefault(name, [])
        twice = next((d for d, u in before if u is unit), None)
        if twice is not None:
            _declared_twice(twice, declaration, found)
        else:
            before.append((declaration, unit))
    meant: dict[str, ast.ConstDecl] = {}
    for name, declarations in declared.items():
        (first, home), *others = [
            (d, u) for d, u in declarations if not any(v.imports(u) for _, v in declarations)
        ]
        for other, _ in others:
            if not _same(first, other):
                hint = "a file that imports both says which is meant by declaring it too"
                _declared_twice(first, other, found, hint)
                break
        for own, unit in declarations:
            if home.imports(unit) and not own.keys and not _same(first, own):
                _redefined(first, own, unit, found)
        meant[name] = first
    return meant


def _redefined(new: ast.ConstDecl, own: ast.ConstDecl, unit: Unit, found: Diagnostics) -> None:
    """What a file reads from config.json may be given another meaning; what it works out for
    itself may not, or a name chosen twice by chance would change its equations."""
    found.error(
        "E0203",
        f"'{new.name.text}' is a constant that {unit.source.name} works out for itself",
        new.name.span,
        notes=[(own.name.span, "declared here")],
        hint="constants of all files share their names: choose another one",
    )


def _declared_twice(
    first: ast.ConstDecl, second: ast.ConstDecl, found: Diagnostics, hint: str = ""
) -> None:
    name = second.name
    found.error(
        "E0203",
        f"constant '{name.text}' is declared twice",
        name.span,
        notes=[(first.name.span, "first declared here")],
        hint=hint,
    )


def _same(a: ast.ConstDecl, b: ast.ConstDecl) -> bool:
    def value(decl: ast.ConstDecl) -> str:
        return spelled(decl.value) if decl.value is not None else ""

    return a.keys == b.keys and value(a) == value(b)
