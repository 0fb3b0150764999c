"""What names mean: indices, constants, blocks and functions, as one file or block sees them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dsl import syntax as ast
from dsl.compile_time import Readable
from dsl.constants import NAMED, ConstantError, polynomial
from dsl.diagnostics import Diagnostics, Span, near
from dsl.extents import Extent, ExtentError
from dsl.files import Unit, exporter
from dsl.typed import Axis, Index, Product, Sum

if TYPE_CHECKING:
    from dsl.context import Context


UNKNOWN = "?"  # starts the names of extents that a mistake leaves unknown


class Failed(Exception):
    """A mistake has been reported; what depends on it is left out."""


def size_name(index: str) -> str:
    """The symbol of a formal index's extent, until a use binds it."""
    return f"size({index})"


def setting_name(setting: str, owner: str) -> str:
    """The symbol of a block setting in extents, until a use gives it a value."""
    return f"{setting}@{owner}"


@dataclass
class ConstScope:
    """What a constant expression inside a block or function can name.

    ``local`` are its own ``const``s; ``settings`` belong to ``owner``; the rest are the program's.
    """

    owner: str
    functions: Mapping[str, ast.ConstFn]
    local: dict[str, ast.ConstDecl] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    indices: dict[str, Index] = field(default_factory=dict)


class Scope:
    """Names visible in one place; ``parent`` is the enclosing place (def in block in file)."""

    def __init__(self, context: Context, unit: Unit, owner: str, parent: Scope | None = None):
        self.context = context
        self.unit = unit
        self.owner = owner
        self.parent = parent
        self.indices: dict[str, Index] = {}
        self.failed: set[str] = set()  # names whose declaration is wrong, which has been reported
        self.later: dict[str, Span] = {}  # indices and constants declared further down
        self._extents: dict[str, Extent] = {}  # of local constants
        self.found: Diagnostics = parent.found if parent is not None else context.found
        if parent is None:
            functions = {n: d for n, (d, _) in unit.visible.items() if isinstance(d, ast.ConstFn)}
            self.consts = ConstScope(owner, functions)
        else:
            up = parent.consts
            self.consts = ConstScope(
                owner, up.functions, dict(up.local), up.settings, dict(up.indices)
            )

    # -- indices ---------------------------------------------------------------------------------

    def find_index(self, name: str) -> Index | None:
        if name in self.indices:
            return self.indices[name]
        if self.parent is not None:
            return self.parent.find_index(name)
        if name in self.unit.indices:
            return self.context.file_index(self.unit, name)
        return None

    def known_indices(self) -> list[str]:
        mine = list(self.indices)
        return mine + (self.parent.known_indices() if self.parent else list(self.unit.indices))

    def index(self, name: ast.Name) -> Index:
        """The index called ``name``.

        Raises:
            Failed: there is none (reported).
        """
        index = self.find_index(name.text)
        if index is None:
            if not self.is_broken(name.text):
                self._unknown_index(name)
            raise Failed
        return index

    def _unknown_index(self, name: ast.Name) -> None:
        text = name.text
        later = self.declared_later(text)
        if later is not None:
            self.found.error(
                "E0504",
                f"index '{text}' is used before it is declared",
                name.span,
                notes=[(later, "declared here")],
            )
            return
        hint = near(text, self.known_indices())
        if not hint and self.is_constant(text):
            hint = f"'{text}' is a constant; an index of this extent is declared: index i : {text}"
        elsewhere = self.context.library.index_elsewhere(text)
        if not hint and elsewhere is not None:
            hint = f"indices are not imported: declare it in this file, index {elsewhere.span.text}"
        if self.context.tell_once(self.found, self.unit, text):
            self.found.error("E0206", f"no index is called '{text}'", name.span, hint=hint)

    def declared_later(self, name: str) -> Span | None:
        """Where a name is declared that no line so far has declared."""
        if name in self.later:
            return self.later[name]
        return self.parent.declared_later(name) if self.parent is not None else None

    def add_index(self, index: Index, span: Span | None) -> None:
        before = self.indices.get(index.name)
        if before is not None:
            self.found.error(
                "E0203",
                f"index '{index.name}' is declared twice",
                span,
                notes=[(before.span, "first declared here")],
            )
        self.indices[index.name] = index
        self.consts.indices[index.name] = index

    def declare(self, decl: ast.IndexDecl) -> None:
        """Enter an ``index`` declaration."""
        try:
            self.add_index(self.build_index(decl), decl.name.span)
        except Failed:
            self.indices[decl.name.text] = stand_in(decl)
            self.failed.add(decl.name.text)

    def build_index(self, decl: ast.IndexDecl) -> Index:
        name = decl.name.text
        match decl.kind:
            case "time":
                return self.context.time(name, decl.name.span)
            case "history":
                assert decl.of is not None
                of = self.index(decl.of)
                if of.kind != "time":
                    self.found.error(
                        "E0411",
                        f"a history belongs to a time index, and '{of.name}' is none",
                        decl.of.span,
                        notes=[(of.span, "declared here")],
                        hint=f"index {of.name} : time",
                    )
                    raise Failed
                return self.context.history(name, of, decl.name.span)
            case "alias":
                assert decl.alias is not None
                axis = self.axis(decl.alias)
                return Index(name, axis.size, span=decl.name.span, alias=axis)
            case "range":
                assert decl.start is not None and decl.size is not None
                start, stop = self.extent(decl.start), self.extent(decl.size)
                return Index(name, stop - start, span=decl.name.span, start=start)
        assert decl.size is not None
        return Index(name, self.extent(decl.size), span=decl.name.span)

    def axis(self, subscript: ast.Subscript) -> Axis:
        """A declared axis: an index, ``n|j`` or ``(h, n)``."""
        if subscript.to is not None:
            self.found.error("E0401", "'->' belongs to top and argtop", subscript.span)
            raise Failed
        axis = self._axis(subscript)
        try:
            axis.size  # noqa: B018 - a product may be beyond what an extent can be
        except ExtentError as error:
            self.found.error("E0304", str(error), subscript.span)
            raise Failed from None
        return axis

    def _axis(self, subscript: ast.Subscript) -> Axis:
        if len(subscript.parts) > 1:
            return Sum(self._alone(tuple(self.axis_of(p) for p in subscript.parts), subscript.span))
        return self.axis_of(subscript.parts[0])

    def axis_of(self, expr: ast.Expr) -> Axis:
        match expr:
            case ast.Ref(name=name, member=None, subscripts=None):
                return self.index(name)
            case ast.Group(items=items) if len(items) > 1:
                return Product(self._alone(tuple(self.axis(i) for i in items), expr.span))
            case ast.Group(items=(only,)):
                return self.axis(only)
        self.found.error(
            "E0401",
            "an index is expected here",
            expr.span,
            hint="declare one: index i : 8" if isinstance(expr, ast.Literal) else "",
        )
        raise Failed

    def _alone(self, parts: tuple[Axis, ...], span: Span) -> tuple[Axis, ...]:
        """The parts of a sum or product, none of which is time or history."""
        for index in (i for part in parts for i in atoms(part)):
            if index.kind != "plain":
                self.found.error(
                    "E0411",
                    f"'{index.name}' is {index.kind}: it cannot be part of another index",
                    span,
                )
                raise Failed
        return parts

    def axes(self, subscripts: tuple[ast.Subscript, ...]) -> tuple[Axis, ...]:
        """The declared axes of a value; each index at most once."""
        axes: list[Axis] = []
        seen: dict[Index, Span] = {}
        failed = False
        for subscript in subscripts:
            try:
                axis = self.axis(subscript)
            except Failed:
                failed = True
                continue
            for index in atoms(axis):
                if index in seen:
                    self.found.error(
                        "E0409",
                        f"'{index.name}' stands twice among the indices of one value",
                        subscript.span,
                        notes=[(seen[index], "it stands here already")],
                        hint="declare a second index of the same extent",
                    )
                    failed = True
                seen[index] = subscript.span
            axes.append(axis)
        if failed:
            raise Failed
        return tuple(axes)

    # -- constants and extents -------------------------------------------------------------------

    def is_constant(self, name: str) -> bool:
        return (
            name in self.consts.local
            or name in self.consts.settings
            or name in self.context.constants
            or name in NAMED
        )

    def extent(self, expr: ast.Expr) -> Extent:
        """The extent that an expression spells.

        Raises:
            Failed: it spells none (reported).
        """
        try:
            return polynomial(expr, self._extent_name, self._extent_size)
        except ConstantError as error:
            error.report(self.found)
            raise Failed from None

    def _extent_name(self, name: str, span: Span) -> Extent:
        if name in self.consts.local:
            if name not in self._extents:
                value = self.consts.local[name].value
                assert value is not None
                self._extents[name] = polynomial(value, self._extent_name, self._extent_size)
            return self._extents[name]
        if name in self.consts.settings:
            return Extent.name(setting_name(name, self.consts.owner.split(".")[0]))
        if name in self.context.constants:
            return self.context.constant_extent(name)
        hint = near(name, [*self.consts.local, *self.consts.settings, *self.context.constants])
        if self.find_index(name) is not None:
            hint = f"the extent of index '{name}' is size({name})"
        if self.is_broken(name):
            raise Failed
        later = self.declared_later(name)
        if later is not None:
            self.found.error(
                "E0504",
                f"'{name}' is used before it is declared",
                span,
                notes=[(later, "declared here")],
            )
            raise Failed
        hint = hint or exporter(name, "const")
        raise ConstantError("E0204", f"no constant is called '{name}'", span, hint)

    def _extent_size(self, name: str, span: Span) -> Extent:
        index = self.index(ast.Name(name, span))
        if index.kind == "open":
            message = f"the extent of '{name}' depends on itself"
            self.found.error("E0302", message, span, notes=[(index.span, "declared here")])
            raise Failed
        if index.kind != "plain":
            self.found.error("E0411", f"how long '{name}' is, only a run knows", span)
            raise Failed
        return index.extent

    def readable(
        self, values: Mapping[str, Span | None] | None = None, failed: Collection[str] = ()
    ) -> Readable:
        """What a compile-time expression may name here; ``values`` are known, but not yet then."""
        indices = {n: index.span for n in self.known_indices() if (index := self.find_index(n))}
        return Readable(
            self.found,
            {*self.consts.local, *self.consts.settings, *self.context.constants},
            self.consts.functions,
            lambda name: name in failed or self.is_broken(name),
            self._has_size,
            values=indices | dict(values or {}),
            later=self.declared_later,
        )

    def _has_size(self, name: ast.Name) -> bool:
        try:
            index = self.index(name)
        except Failed:
            return False
        if index.kind != "plain":
            self.found.error("E0411", f"how long '{name.text}' is, only a run knows", name.span)
            return False
        self.consts.indices.setdefault(name.text, index)
        return True

    # -- blocks and functions --------------------------------------------------------------------

    def is_broken(self, name: str) -> bool:
        """Is the declaration of ``name`` wrong, unreadable, or in a file that is missing?"""
        if name in self.failed or name in self.unit.broken or "*" in self.unit.broken:
            return True
        return self.parent is not None and self.parent.is_broken(name)


def stand_in(decl: ast.IndexDecl, kind: str = "plain") -> Index:
    """For an index whose declaration is wrong, so that its uses are no further mistakes."""
    return Index(
        decl.name.text, Extent.name(UNKNOWN + decl.name.text), kind=kind, span=decl.name.span
    )


def is_known(extent: Extent) -> bool:
    """Is it made of what is declared without a mistake?"""
    return not any(name.startswith(UNKNOWN) for name in extent.names)


def atoms(axis: Axis) -> list[Index]:
    """The indices that an axis is made of."""
    if isinstance(axis, Index):
        return [axis]
    return [i for part in axis.parts for i in atoms(part)]
